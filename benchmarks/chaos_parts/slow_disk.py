"""A disk that is slow for a while: calls of a process, and of those it forks, that wait before they are made."""

from __future__ import annotations

import builtins
import functools
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = (
    *((builtins, "open"), (io, "open"), (os, "open"), (os, "pread"), (os, "preadv")),
    *((os, "fsync"), (os, "rename"), (os, "replace")),
)
"""What opens, reads, syncs and renames: Python's own names for it, by which packages call it."""


def slow_while(flag: Path, seconds: float, *, sleep: Callable[[float], Any] = time.sleep) -> None:
    """From now on, calls of this process to the disk take so much longer as long as `flag` exists."""
    for owner, name in CALLS:
        setattr(owner, name, _slow(getattr(owner, name), flag, seconds, sleep))


def _slow(call: Callable[..., Any], flag: Path, seconds: float, sleep: Callable[[float], Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def slow(*args: Any, **named: Any) -> Any:
        if flag.exists():
            sleep(seconds)
        return call(*args, **named)

    return slow
