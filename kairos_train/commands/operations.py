"""How runs go: `status`, `report`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from kairos_train.basics.errors import UserError
from kairos_train.commands.output import Result, Table
from kairos_train.commands.parsing import command, count


def run_status(args: argparse.Namespace) -> Result:
    from kairos_train.operations.reports import status
    from kairos_train.operations.reports.history import read_histories

    if args.watch and (args.json or args.svg):
        raise UserError("--watch shows the terminal again and again; leave it away with --json and --svg")
    if args.watch:
        try:
            status.watch(args.runs, seconds=args.watch)
        except KeyboardInterrupt:  # that is how one ends it
            return Result()
    histories = read_histories(args.runs)
    look = {}
    if args.svg:
        status.write_svg(histories, args.svg)
        look["drawing"] = args.svg
    found = {"runs": [status.summary(history) for history in histories]}
    words = shlex.join(map(str, args.runs))
    return Result(found, status.render(histories), look=look, then=[f"kairos-train report {words} --out runs.html"])


def run_report(args: argparse.Namespace) -> Result:
    from kairos_train.operations.reports.history import read_histories
    from kairos_train.operations.reports.html_report import write_report

    histories = read_histories(args.runs)
    write_report(histories, args.out)
    levels = {history.name: history.health.level for history in histories}
    table = Table(list(levels.items()), ("run", "health"))
    return Result({"page": args.out, "runs": levels}, table, look={"page": args.out})


def add(commands: Any) -> None:
    """Add the subcommands."""
    about = "folder of a run, or of a curriculum's stages"
    status = command(commands, "status", run_status, "how runs go: progress, health, restarts, goodput")
    status.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=about)
    status.add_argument("--watch", type=count, default=None, metavar="SECONDS", help="show it again and again")
    status.add_argument("--svg", type=Path, default=None, metavar="FILE", help="draw it into a file as well")

    report = command(commands, "report", run_report, "one HTML page of runs, with plots")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=about)
    report.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="the page")
