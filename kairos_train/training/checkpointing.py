"""When a run's checkpoints are written, what becomes of failed ones, and what is told of them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from kairos_train.basics.errors import MachineFault
from kairos_train.checkpoint.canonical import checkpoint_path
from kairos_train.config.schema import TrainConfig
from kairos_train.operations.events import EventLog
from kairos_train.training import run_state
from kairos_train.training.run_state import RunState
from parallel.topology import Topology


class Checkpointing:
    """The checkpoints of one life of a run. To make one is collective.

    Args:
        folder: where they are.
        train: how often they may fail, how many are kept.
        topology: of the processes.
        events: where each is noted.
    """

    def __init__(self, folder: Path, train: TrainConfig, topology: Topology, events: EventLog) -> None:
        self.folder, self._train, self._events = folder, train, events
        self._saver = run_state.open_saver(folder, train, topology, self._published)
        self._failures = 0  # in a row
        self._begun: tuple[int, float] | None = None  # step, time
        self._in_flight = False
        self._stall = 0.0
        self._stall_known = threading.Event()

    @property
    def failed(self) -> bool:
        """Whether the checkpoint in flight has failed, as far as this rank knows."""
        return self._saver.failed

    @property
    def newest(self) -> int | None:
        """The step of the checkpoint that was begun last."""
        return None if self._begun is None else self._begun[0]

    def save(self, state: RunState, *, losses: str) -> str | None:
        """Begin the checkpoint of a step, after the one before. Collective.

        Args:
            losses: as for `run_state.save`.

        Returns:
            Why the one before could not be written; None when it was.

        Raises:
            MachineFault: more than `train.failed_checkpoints` in a row could not be written.
        """
        problem = self.settle()
        begin = time.perf_counter()
        self._begun, self._in_flight = (state.progress.steps, begin), True
        self._stall_known.clear()
        try:
            run_state.save(self._saver, state, losses=losses)
        finally:
            self._stall = time.perf_counter() - begin
            self._stall_known.set()
        return problem

    def settle(self) -> str | None:
        """Wait for the checkpoint in flight. Collective; returns and raises as `save`."""
        if not self._in_flight:
            return None
        problem = self._saver.settle()
        self._in_flight = False
        if problem is None:
            self._failures = 0
            return None
        self._failures += 1
        self._events.write("checkpoint_failed", step=self.newest, error=problem)
        if self._failures > self._train.failed_checkpoints:
            raise MachineFault(
                f"{problem}; {self._failures} checkpoints in a row failed "
                f"(train.failed_checkpoints={self._train.failed_checkpoints}): fix that and start the run again"
            )
        return problem

    def close(self, *, failed: bool) -> None:
        """Wait for the checkpoint in flight; as `Saver.close`."""
        self._saver.close(failed=failed)

    def _published(self) -> None:
        """A checkpoint has its name; called by the saver's thread on rank 0."""
        step, begin = self._begun
        written = time.perf_counter() - begin
        if self._train.async_checkpoint:
            self._stall_known.wait()
        folder = checkpoint_path(self.folder, step)
        self._events.write(
            "checkpoint",
            step=step,
            stall_seconds=self._stall if self._train.async_checkpoint else written,
            write_seconds=written,
            bytes=_bytes_of(folder),
        )


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
