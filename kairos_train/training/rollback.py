"""Where a run goes back to after too many bad steps: the newest intact checkpoint of before the first of them."""

from __future__ import annotations

from pathlib import Path

from kairos_train.basics.errors import MachineFault, RunStopped
from kairos_train.checkpoint.canonical import CheckpointReader, list_checkpoints, step_of
from kairos_train.checkpoint.intact import find_intact
from kairos_train.checkpoint.writing import discard
from kairos_train.operations.guard import Guard
from parallel.consensus import first_does
from parallel.topology import Topology


def last_good(guard: Guard, checkpoints: Path, topology: Topology, *, where: str) -> CheckpointReader:
    """The checkpoint to go back to; later ones are removed, their weights are under suspicion. Collective.

    Args:
        guard: has counted the bad steps.
        checkpoints: folder of the run's checkpoints.
        where: the last bad step and its samples, for the message.

    Raises:
        RunStopped: `guard` does not allow it (again), or there is no such checkpoint.
        MachineFault: the later ones cannot be removed.
    """
    inspect = f"{guard.describe()}, the last: {where}; inspect them"
    if not guard.tolerant:
        raise RunStopped(f"{inspect}, or continue with train.on_nonfinite=skip")
    if not guard.may_go_back:
        raise RunStopped(f"{inspect}: went back {guard.rollbacks} times already (guard.rollbacks), it does not help")
    path, _ = find_intact(checkpoints, topology, before=guard.first_bad)
    if path is None:
        raise RunStopped(f"{inspect}: there is no checkpoint of before step {guard.first_bad} to go back to")
    reader = CheckpointReader(path)
    _drop_later(checkpoints, reader.step, topology)
    return reader


def _drop_later(checkpoints: Path, step: int, topology: Topology) -> None:
    """Remove the checkpoints after a step; on all ranks they are gone when this returns."""

    def drop() -> None:
        for path in list_checkpoints(checkpoints):
            if step_of(path) > step:
                try:
                    discard(path, "rolled-back")
                except OSError as error:
                    raise MachineFault(
                        f"checkpoint {path}: cannot be removed ({error.strerror}), and the run would continue from it;"
                        " see to the disk, start the run again"
                    ) from error

    first_does(drop, rank=topology.rank, size=topology.size)
