"""The command line: exit codes, and all subcommands in one parser.

What a subcommand needs is imported inside it, so that `--help` and a typing error cost nothing. The exceptions of
`kairos_train.basics.errors` become one line on stderr and their exit codes; any other exception keeps its traceback.
"""

from __future__ import annotations

import argparse
import errno
import re
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType

from kairos_train import __version__
from kairos_train.basics.errors import EXIT_CODES, MachineFault, UserError
from kairos_train.basics.extras import missing_extra
from kairos_train.basics.log import log_to_stderr
from kairos_train.basics.secrets import redacted
from kairos_train.commands import (
    benchmarks,
    closed_loop,
    codec,
    data,
    evaluation,
    health,
    launch,
    operations,
    policies,
    training,
)
from kairos_train.commands.output import Result, Table, show
from kairos_train.commands.parsing import Parser, command, nearest

PROGRAM = "kairos-train"

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a disk says that takes no more: wherever that comes up, it is no fault of this project."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    log_to_stderr()
    sys.excepthook = _show_traceback
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
        return show(args.run(args), as_json=args.json)
    except tuple(EXIT_CODES) as error:
        return _fail(error, next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind)))
    except OSError as error:
        if error.errno not in FULL:
            raise
        return _fail(MachineFault(f"{error.filename or 'the disk'}: {error.strerror}; make room and start again"), 4)
    except ModuleNotFoundError as error:
        told = missing_extra(error)
        if told is None:
            raise
        return _fail(told, 2)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python does, without the secrets of URLs: messages of other packages hold what they were given."""
    print(redacted("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")


def _fail(error: Exception, code: int) -> int:
    print(f"{PROGRAM}: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
    return code


def run_demo(args: argparse.Namespace) -> Result:
    from evaluation.open_loop import format_table
    from kairos_train.demos.first import run

    found = run(env=args.env, fresh=args.fresh)
    text = f"{format_table(found['open_loop'])}\n\nDone in {found['minutes']:.1f} minutes."
    then = [f"kairos-train serve {found['places']['policy']}", f"kairos-train demo --env {args.env} --fresh"]
    return Result(found, text, look=found["places"], then=then)


def run_finetune_demo(args: argparse.Namespace) -> Result:
    from kairos_train.demos.finetune import run

    found = run(fresh=args.fresh)
    rows = [
        (task, counts["successes"], counts["episodes"], counts["interval95"]) for task, counts in found["tasks"].items()
    ]
    table = Table(rows, ("task", "solved", "of", "95 % interval"))
    return Result(found, table, look=found["places"], then=[f"kairos-train serve {found['places']['policy']}"])


# --- the parser ---


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    args, extra = build_parser().parse_known_args(argv)
    options = [word for word in extra if word.startswith("-")]
    if options or (extra and "overrides" not in args):
        word = (options or extra)[0]
        known = sorted(set(re.findall(r"--[a-z][\w-]*", args.parser.format_help())))
        name = word.split("=")[0]
        raise UserError(f"unknown argument {word!r}; {nearest(name, known)}{args.parser.prog} has: {', '.join(known)}")
    if "overrides" in args:
        args.overrides = [*args.overrides, *extra]  # argparse leaves over what stands behind an option
    return args


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(prog=PROGRAM, description="Train, check and evaluate video world-action models.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    training.add(commands)
    operations.add(commands)
    data.add(commands)
    codec.add(commands)
    policies.add(commands)
    evaluation.add(commands)
    closed_loop.add(commands)
    benchmarks.add(commands)
    health.add(commands)
    launch.add(commands)
    demo = command(commands, "demo", run_demo, "simulate, pack, train, export and evaluate, on a CPU")
    demo.add_argument("--env", choices=("metaworld", "push2d"), default="metaworld", help="the simulator")
    demo.add_argument("--fresh", action="store_true", help="remove what an earlier demo left and start over")
    finetune = command(commands, "finetune-demo", run_finetune_demo, "published weights to a judged policy, on a CPU")
    finetune.add_argument("--fresh", action="store_true", help="start over; the published weights stay")
    return parser


if __name__ == "__main__":
    sys.exit(main())
