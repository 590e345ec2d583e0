"""Which checkpoints of a run stay."""

import shutil
from collections.abc import Collection
from pathlib import Path

from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.canonical import TEMPORARY, find_problem, list_checkpoints, step_of


def prune(parent: Path, keep_last: int, keep_every: int, *, keep: Collection[int] = ()) -> list[Path]:
    """Remove old checkpoints. Called by one process, after a checkpoint was written.

    Damaged folders are neither counted nor removed: they must not push out a valid one, and they are evidence.

    Args:
        parent: the run's `checkpoints` folder.
        keep_last: number of newest valid checkpoints to keep, at least 1.
        keep_every: also keep the steps that are multiples of this; 0: no others.
        keep: steps that are kept too.

    Returns:
        The removed folders, oldest first.

    Raises:
        UserError: `keep_last` below 1 or `keep_every` below 0.
    """
    if keep_last < 1:
        raise UserError(f"train.keep_last={keep_last}: must be at least 1, or a run could not be resumed")
    if keep_every < 0:
        raise UserError(f"train.keep_every={keep_every}: must be 0 (none) or a number of steps")
    valid = [path for path in list_checkpoints(parent) if find_problem(path) is None]
    kept = set(keep)
    removed = [
        path
        for path in valid[:-keep_last]
        if step_of(path) not in kept and not (keep_every and step_of(path) % keep_every == 0)
    ]
    for path in removed:
        # Renamed first, so that a kill half-way leaves no half checkpoint under a checkpoint's name.
        doomed = path.with_name(f"{TEMPORARY}removed-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)
    return removed
