"""Faults made on purpose (`faults.inject`), for tests of what a run survives. None unless asked for.

kind    what happens in its step, on its rank
kill    SIGKILL of the process
raise   an exception
hang    the process never comes to the step's collectives
slow    `seconds` more for the step
stall   the data come `seconds` late
nan     the targets of a data rank's samples are not a number
spike   the targets of a data rank's samples are 1000 times too large
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Sequence

from kairos_train.config.operation_schema import FaultConfig
from kairos_train.objective.flow_matching import ConditionedBatch

SPIKE = 1000.0


class Faults:
    """The faults that are due on this process, in this life of the run.

    Args:
        faults: as configured.
        rank, data_rank: of this process.
        life: of the run, from 1 on.
    """

    def __init__(self, faults: Sequence[FaultConfig], *, rank: int, data_rank: int, life: int) -> None:
        spoiling = ("nan", "spike")
        self._due = [
            fault
            for fault in faults
            if fault.life in (None, life) and fault.rank == (data_rank if fault.kind in spoiling else rank)
        ]
        self._done: set[tuple[int, int]] = set()  # fault, step

    def before_data(self, step: int) -> None:
        """What comes before the batches of `step` (counted from 1) are taken."""
        for fault in self._at(step, "stall"):
            time.sleep(fault.seconds)

    def before_step(self, step: int) -> None:
        """What comes between the batches and the forward pass."""
        for fault in self._at(step, "slow"):
            time.sleep(fault.seconds)
        for _ in self._at(step, "raise"):
            raise RuntimeError(f"faults.inject: raise at step {step}")
        for _ in self._at(step, "kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in self._at(step, "hang"):
            threading.Event().wait()

    def spoil(self, step: int, batches: Sequence[ConditionedBatch]) -> None:
        """Make the targets of `step` bad, in place."""
        for kind, factor in (("nan", math.nan), ("spike", SPIKE)):
            for _ in self._at(step, kind):
                for batch in batches:
                    batch.video_target = batch.video_target * factor

    def _at(self, step: int, kind: str) -> list[FaultConfig]:
        """The faults of a kind in a step; once each, so that a run that goes back finds the step sound."""
        found = []
        for number, fault in enumerate(self._due):
            due = fault.kind == kind and fault.step <= step < fault.step + fault.steps
            if due and (number, step) not in self._done:
                self._done.add((number, step))
                found.append(fault)
        return found
