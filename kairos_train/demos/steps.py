"""The steps of a demo: commands of `kairos-train`, each shown before it runs."""

from __future__ import annotations

import shlex
import subprocess
import sys

from kairos_train.basics.errors import RunStopped, UserError

UNSEEN_SEEDS = 10_000
"""First seed of the episodes that a policy is judged on; demonstrations start at 0, validation at 5,000."""


def argv(words: list) -> list[str]:
    """The words as a process's command line."""
    return [sys.executable, "-m", "kairos_train.cli", *map(str, words)]


def run_command(*words: object, quiet: bool = False) -> None:
    """Run `kairos-train WORDS` and show it.

    Raises:
        UserError: the command refused its input; its own error message has been printed.
        RunStopped: it ended with another exit code than 0.
    """
    print(f"\n$ kairos-train {shlex.join(map(str, words))}", flush=True)
    code = subprocess.run(argv(list(words)), stdout=subprocess.DEVNULL if quiet else None, check=False).returncode
    name = f"kairos-train {' '.join(map(str, words[:2]))}"
    if code == 2:
        raise UserError(f"the demo stopped at `{name}`, see the line above")
    if code:
        raise RunStopped(f"`{name}` ended with exit code {code}")
