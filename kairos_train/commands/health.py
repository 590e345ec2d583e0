"""`healthcheck`: what a run needs, looked at before it starts."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from kairos_train.commands.parsing import command, print_json


def run_healthcheck(args: argparse.Namespace) -> int:
    from kairos_train.operations.preflight.health import check_health
    from kairos_train.training.engine.deepspeed_engine import stop_processes

    report = check_health(args.device, args.dir)
    if int(os.environ.get("RANK", 0)) == 0:
        if args.json:
            print_json(report.numbers())
        else:
            print(report.table())
    code = 0 if report.ok else 1
    if report.stuck:  # the backend's threads would wait for ever, and this process for them
        sys.stdout.flush()
        os._exit(code)
    stop_processes()
    return code


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = command(commands, "healthcheck", run_healthcheck, "GPUs, network, disk, versions and clocks of all nodes")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what to check")
    parser.add_argument("--dir", type=Path, default=Path(), metavar="RUN_DIR", help="whose disk is tried")
    parser.add_argument("--json", action="store_true", help="one JSON object")
