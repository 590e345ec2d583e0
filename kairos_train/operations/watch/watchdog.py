"""How far this process's training loop is, and whether that takes too long."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kairos_train.operations.watch.findings import Heartbeat

LONGEST_GAP = 2.0  # seconds of one tick that count, or two ticks where that is more


class AwakeClock:
    """Seconds in which this process could run.

    A job that is suspended and continued finds hours gone, during which nobody can have heard of anybody. So a gap
    between two ticks counts as two ticks at most. Only one thread may tick.

    Attributes:
        now: seconds since the clock was made.
    """

    def __init__(self, tick: float) -> None:
        self.now, self._longest, self._last = 0.0, max(2 * tick, LONGEST_GAP), time.monotonic()

    def tick(self) -> float:
        """Read the clock."""
        last, self._last = self._last, time.monotonic()
        self.now += min(self._last - last, self._longest)
        return self.now


@dataclass(frozen=True, eq=False)
class _StepPosition:
    step: int
    phase: str
    number: int  # of places told within the step
    limit: float | None  # seconds
    patient: bool = False  # the limit is not the common one


class Watchdog:
    """Where the main thread says it is, and since when.

    Args:
        stuck: seconds without a word after which it counts as stuck.
        clock: ticked by the thread that asks `overdue` and `beat`, and by no other.
    """

    def __init__(self, stuck: float, clock: AwakeClock) -> None:
        self._stuck, self._clock, self._main = stuck, clock, threading.main_thread().ident
        self._place = self._seen = _StepPosition(0, "start", 0, stuck)
        self._since = clock.now

    def at(self, step: int, phase: str) -> None:
        """The loop has come here. Called by the main thread; costs less than a microsecond or two."""
        number = self._place.number + 1 if step == self._place.step else 0
        self._place = _StepPosition(step, phase, number, self._stuck)

    @contextmanager
    def paused(self, phase: str, *, times: float | None = 4.0) -> Iterator[None]:
        """A phase that may take longer; other ranks that wait for this one meanwhile are not stuck.

        Args:
            phase: its name.
            times: the usual limit; None: any time at all.
        """
        before = self._place
        limit = None if times is None else times * self._stuck
        self._place = _StepPosition(before.step, phase, before.number + 1, limit, patient=True)
        try:
            yield
        finally:
            self._place = _StepPosition(before.step, before.phase, before.number + 2, before.limit, before.patient)

    def overdue(self) -> float | None:
        """Seconds in this place when those are too many, else None."""
        seconds, limit = self._seconds(), self._seen.limit
        return seconds if limit is not None and seconds > limit else None

    def beat(self, number: int) -> Heartbeat:
        """What to tell of this rank."""
        seconds = self._seconds()
        place = self._seen
        patient = place.patient and (place.limit is None or seconds <= place.limit)
        line = innermost(self._main)
        return Heartbeat(number, place.step, place.phase, place.number, round(seconds, 1), line, patient)

    def _seconds(self) -> float:
        if self._place is not self._seen:
            self._seen, self._since = self._place, self._clock.now
        return self._clock.now - self._since


def innermost(thread: int | None) -> str:
    """What another thread executes, as `function (file:line)`; "" when it has ended."""
    frame = sys._current_frames().get(thread) if thread != threading.get_ident() else None
    return "" if frame is None else f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
