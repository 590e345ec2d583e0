"""How runs go: `status`, `report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kairos_train.basics.errors import UserError
from kairos_train.commands.parsing import command, count, print_json


def run_status(args: argparse.Namespace) -> int:
    from kairos_train.operations.reports import status
    from kairos_train.operations.reports.history import read_histories

    if args.watch and (args.json or args.svg):
        raise UserError("--watch shows the terminal again and again; leave it away with --json and --svg")
    if args.watch:
        try:
            status.watch(args.runs, seconds=args.watch)
        except KeyboardInterrupt:  # that is how one ends it
            return 0
    histories = read_histories(args.runs)
    if args.svg:
        status.write_svg(histories, args.svg)
    if args.json:
        return print_json({"runs": [status.summary(history) for history in histories]})
    status.show(histories)
    return 0


def run_report(args: argparse.Namespace) -> int:
    from kairos_train.operations.reports.history import read_histories
    from kairos_train.operations.reports.html_report import write_report

    histories = read_histories(args.runs)
    write_report(histories, args.out)
    return print_json({"page": str(args.out), "runs": {history.name: history.health.level for history in histories}})


def add(commands: Any) -> None:
    """Add the subcommands."""
    about = "folder of a run, or of a curriculum's stages"
    status = command(commands, "status", run_status, "how runs go: progress, health, restarts, goodput")
    status.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=about)
    status.add_argument("--json", action="store_true", help="for other programs")
    status.add_argument("--watch", type=count, default=None, metavar="SECONDS", help="show it again and again")
    status.add_argument("--svg", type=Path, default=None, metavar="FILE", help="draw it into a file as well")

    report = command(commands, "report", run_report, "one HTML page of runs, with plots")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=about)
    report.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="the page")
