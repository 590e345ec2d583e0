"""Where the time of a run goes: seconds in each phase of a step, and of what comes between steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseClock:
    """Adds up seconds by phase.

        with clock.phase("data"):
            ...
        clock.take(steps=10)          # {"time/data": seconds per step since the last call, …}

    A phase inside of another interrupts it, so that no second counts twice. On CUDA the seconds are the device's,
    between events on the current stream, its idle time included: nobody waits for it here, and what it has not reached
    yet when `take` is called belongs to the next call.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[str] = []
        self._since: float | torch.cuda.Event | None = None
        self._spans: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is done within under `name`."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def take(self, *, steps: int) -> dict[str, float]:
        """Seconds per step of each phase that is over, since the last call, as "time/NAME".

        Args:
            steps: done since the last call, at least 1. What a phase took that is not in every step is spread over all.
        """
        totals: dict[str, float] = {}
        unfinished = []
        for name, begin, end in self._spans:
            if isinstance(end, float):
                seconds = end - begin
            elif end.query():
                seconds = begin.elapsed_time(end) / 1000
            else:
                unfinished.append((name, begin, end))
                continue
            totals[name] = totals.get(name, 0.0) + seconds
        self._spans = unfinished
        return {f"time/{name}": seconds / max(steps, 1) for name, seconds in totals.items()}

    def _switch(self) -> None:
        """The innermost phase ends or is interrupted here, or goes on from here."""
        now = self._now()
        if self._open:
            self._spans.append((self._open[-1], self._since, now))
        self._since = now

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
