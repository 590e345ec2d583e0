"""`healthcheck`: what a run needs, looked at before it starts."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from kairos_train.commands.output import Result, show
from kairos_train.commands.parsing import command


def run_healthcheck(args: argparse.Namespace) -> Result:
    from kairos_train.operations.preflight.health import check_health
    from kairos_train.training.engine.deepspeed_engine import stop_processes

    report = check_health(args.device, args.dir)
    result = Result(report.numbers(), document=report.table(), code=0 if report.ok else 1)  # read in logs of jobs
    if report.stuck:  # the backend's threads would wait for ever, and this process for them
        os._exit(show(result, as_json=args.json))
    stop_processes()
    return result


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = command(commands, "healthcheck", run_healthcheck, "GPUs, network, disk, versions and clocks of all nodes")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what to check")
    parser.add_argument("--dir", type=Path, default=Path(), metavar="RUN_DIR", help="whose disk is tried")
