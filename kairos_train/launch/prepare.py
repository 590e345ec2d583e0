"""The commands that make a run's data, as its configuration lists them (`prepare`)."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kairos_train.basics.errors import UserError, one_line, shown
from kairos_train.basics.log import logger


def prepare(commands: Sequence[str]) -> list[str]:
    """Make what is missing of an experiment's data; in the one process that is there before a run begins.

    Args:
        commands: of `kairos-train`, each with `--out DIR`; one whose DIR exists has been done.

    Returns:
        The folders, in the order of the commands.

    Raises:
        UserError: a command without `--out`, one that fails, or data that is missing in a run of many processes.
    """
    folders = []
    for line in commands:
        words = split_words(line, "prepare")
        if "--out" not in words[:-1]:
            raise UserError(f"prepare: {line!r} has no --out DIR, by which to see whether it is done; add it")
        folders.append(words[words.index("--out") + 1])
        if Path(folders[-1]).expanduser().exists():
            continue
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                f"prepare: {line!r} is still to be done; run `kairos-train data prepare` with the same settings"
            )
        logger.info(f"$ kairos-train {line}")
        done = subprocess.run(
            [sys.executable, "-m", "kairos_train.cli", *words], stdout=subprocess.DEVNULL, check=False
        )
        if done.returncode:
            raise UserError(f"prepare: {line!r} ended with exit code {done.returncode}; see the line above")
    return folders


def split_words(text: str, name: str) -> list[str]:
    """The words of a line, as the shell splits it.

    Args:
        name: for messages: where the line is given.

    Raises:
        UserError: a quote that is not closed, or a \\ at the end.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{name}: {shown(text)!r} cannot be split into words ({one_line(error)}); fix it") from error
