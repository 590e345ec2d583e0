"""Going back to the last good checkpoint, and over the data up to where it went wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from kairos_train.basics.errors import RunStopped
from kairos_train.checkpoint.canonical import TEMPORARY, CheckpointReader, list_checkpoints, step_of
from kairos_train.checkpoint.intact import find_intact
from kairos_train.training import run_state
from parallel.consensus import from_all

if TYPE_CHECKING:
    from kairos_train.training.run import Run


def roll_back(run: Run, *, where: str) -> None:
    """Continue from the newest intact checkpoint of before the first bad step, with the data that come next now.

    The steps are counted from that checkpoint on again; the samples of the steps in between are not seen a second time.
    Later checkpoints are removed: their weights are under suspicion, and their steps will be written anew. Collective.

    Args:
        where: the last bad step and its samples, in words.

    Raises:
        RunStopped: `guard` does not allow it (again), or there is no such checkpoint.
    """
    guard, config, bad = run.guard, run.config, run.guard.describe()
    inspect = f"{bad}, the last: {where}; inspect them"
    if not guard.tolerant:
        raise RunStopped(f"{inspect}, or continue with train.on_nonfinite=skip")
    if not guard.may_go_back:
        raise RunStopped(f"{inspect}: went back {guard.rollbacks} times already (guard.rollbacks), it does not help")
    run.checkpointing.settle()
    parent, first, here = run_state.checkpoints(config), guard.first_bad, run.step
    path, _ = find_intact(parent, run.topology, before=first)
    if path is None:
        raise RunStopped(f"{inspect}: there is no checkpoint of before step {first} to go back to")
    reader = CheckpointReader(path)
    _drop_later(parent, reader.step, run)
    run_state.restore(run.state, reader)
    steps = here - reader.step
    for _ in range(steps * config.train.accumulation):
        next(run.loader)
    guard.rollbacks += 1
    run.reports.close()
    run.reports = run.open_reports(reader.step)
    run.telemetry.say(f"{bad}: back to step {reader.step}, and on with the data behind step {here}")
    run.events.write("rollback", step=here, to=reader.step, rollbacks=guard.rollbacks)


def _drop_later(parent: Path, step: int, run: Run) -> None:
    """Remove the checkpoints behind a step; on all ranks they are gone when this returns."""
    if run.topology.rank == 0:
        for path in list_checkpoints(parent):
            if step_of(path) > step:
                doomed = path.with_name(f"{TEMPORARY}rolled-back-{path.name}")
                path.rename(doomed)
                shutil.rmtree(doomed)
    from_all(None, run.topology)
