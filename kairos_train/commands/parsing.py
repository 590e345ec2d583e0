"""What subcommands share: the parser and its one-line errors, overrides, devices, output."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kairos_train.basics.errors import UserError
from kairos_train.commands.output import Result


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and name the nearest legal word.

    Attributes:
        more: what stands below the help, made when it is shown, from the terminal's columns.
    """

    more: Callable[[int], str] | None = None

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            **{"allow_abbrev": False, "formatter_class": argparse.ArgumentDefaultsHelpFormatter, **settings}
        )
        self.register("type", Path, lambda text: Path(text).expanduser())  # where the shell left `~` alone

    def format_help(self) -> str:
        more = "" if self.more is None else f"\n{self.more(shutil.get_terminal_size().columns - 2)}\n"
        return super().format_help() + more

    def error(self, message: str) -> NoReturn:
        if match := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            choices = re.findall(r"[\w.-]+", match[2])
            raise UserError(f"{match[1]!r} is unknown; {nearest(match[1], choices)}choose from: {', '.join(choices)}")
        raise UserError(f"{message}; see {self.prog} --help")


def group(commands: Any, name: str, text: str) -> Any:
    """A command that only has subcommands."""
    parser = commands.add_parser(name, help=text, description=text)
    return parser.add_subparsers(metavar="COMMAND", required=True)


def command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], Result], text: str
) -> argparse.ArgumentParser:
    """A command that calls `run`, whose result is shown by `kairos_train.commands.output.show`."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="one JSON object, as into a pipe")
    parser.set_defaults(run=run, parser=parser)
    return parser


def with_overrides(parser: argparse.ArgumentParser) -> None:
    """Let the command take settings of a run."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="OVERRIDE", help="GROUP=OPTION or KEY=VALUE")
    parser.add_argument("--config-dir", type=Path, action="append", default=[], metavar="DIR", help="own configs")


def with_robot(parser: argparse.ArgumentParser, default: str) -> None:
    """Let the command take one of the robots that a model was trained on."""
    parser.add_argument(
        "--robot", default=None, metavar="NAME", help=f"of several trained on, by dataset; none: {default}"
    )


def count(text: str) -> int:
    """An argument from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def location(text: str) -> str:
    """An argument that is a path or URL."""
    return os.path.expanduser(text)


def nearest(word: str, legal: Sequence[str]) -> str:
    """ "did you mean X? ", or nothing."""
    close = difflib.get_close_matches(word, legal, n=1)
    return f"did you mean {close[0]}? " if close else ""


def config_of(args: argparse.Namespace, *, sections: Sequence[str] | None = None) -> Any:
    """The composed configuration; `sections` as for `load_config`."""
    from kairos_train.config.compose import load_config

    return load_config(args.overrides, config_dirs=args.config_dir, sections=sections)
