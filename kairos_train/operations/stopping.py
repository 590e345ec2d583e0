"""Requests to a running process: stop with a checkpoint (SIGUSR1, SIGTERM, Ctrl-C, a deadline), profile (SIGUSR2).

Handlers only note what came; the training loop asks between two steps, and all ranks agree on the answer there. A
second SIGTERM changes nothing: a caller that cannot wait sends SIGKILL, which costs the steps since the last
checkpoint. A second Ctrl-C ends the process at once, as a user at a terminal expects.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import datetime
from types import FrameType, TracebackType
from typing import Any

CTRL_C = "Ctrl-C"
STOPPING = {signal.SIGUSR1: "SIGUSR1", signal.SIGTERM: "SIGTERM", signal.SIGINT: CTRL_C}


class Requests:
    """What this process has been asked for. A context manager that installs the handlers and puts the old ones back.

    Outside of the main thread, where Python has no signals, only the deadline counts.

    Args:
        deadline: local time in ISO format, after which the run may be killed; None: none.
        margin: seconds before it at which to stop.
        profile: called on SIGUSR2, within the handler.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        *,
        deadline: str | None = None,
        margin: float = 0.0,
        profile: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._latest = None if deadline is None else datetime.fromisoformat(deadline).timestamp() - margin
        self._deadline, self._profile, self._clock = deadline, profile, clock
        self._signal: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Requests:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                self._before[number] = signal.signal(number, self._note)
            self._before[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def why(self) -> str | None:
        """Why to stop, None while nobody asks."""
        if self._signal is not None:
            return self._signal
        if self._latest is not None and self._clock() >= self._latest:
            return f"train.deadline={self._deadline} is near"
        return None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR2:
            self._profile()
            return
        self._signal = self._signal or STOPPING[signal.Signals(number)]
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            # Past the locks of standard error, which the interrupted thread may hold.
            os.write(2, b"Ctrl-C: the checkpoint of this step is written first; once more ends the run at once\n")
