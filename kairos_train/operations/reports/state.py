"""State of a run as its record shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

GOING = ("running", "starting")


@dataclass(frozen=True)
class State:
    """What a run is doing.

    Attributes:
        name: running; starting: no step of this life yet; silent: no sign for longer than its pace explains; killed:
            its process is gone from this machine, or it was silent when another life began; finished, interrupted,
            stopped, fault, error: as it said itself; unknown: it recorded neither start nor end.
        since: seconds since the last sign of life.
        text: what it said when it ended.
    """

    name: str
    since: float | None
    text: str

    @property
    def going(self) -> bool:
        return self.name in GOING


@dataclass(frozen=True)
class RunProgress:
    """How far a run is.

    Attributes:
        share: of the budget, as of the last report; None before the first.
        budget: in words.
        seconds_per_step: at the present pace, pauses left out.
        left: seconds to the end at the present pace, pauses included; None when it has ended or no pace is known.
    """

    step: int
    share: float | None
    budget: str
    seconds_per_step: float | None
    left: float | None


@dataclass(frozen=True)
class Checkpoints:
    """Attributes:
    newest: the newest valid one.
    step: of it.
    age: in seconds.
    size: in bytes.
    count: of folders, valid or not.
    problems: newer ones that are not valid, and why.
    """

    newest: Path | None
    step: int | None
    age: float | None
    size: int | None
    count: int
    problems: list[str]
