"""Which checkpoints of a run stay."""

from collections.abc import Collection
from pathlib import Path

from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.canonical import find_problem, list_checkpoints, step_of
from kairos_train.checkpoint.writing import discard


def prune(parent: Path, keep_last: int, keep_every: int, *, keep: Collection[int] = ()) -> tuple[list[Path], list[str]]:
    """Remove old checkpoints. Called by one process, after a checkpoint was written.

    Damaged folders are neither counted nor removed: they must not push out a valid one, and they are evidence.

    Args:
        parent: the run's `checkpoints` folder.
        keep_last: number of newest valid checkpoints to keep, at least 1.
        keep_every: also keep the steps that are multiples of this; 0: no others.
        keep: steps that are kept too.

    Returns:
        The removed folders, oldest first, and one warning for each that is damaged or cannot be removed.

    Raises:
        UserError: `keep_last` below 1 or `keep_every` below 0.
        MachineFault: the folder cannot be listed.
    """
    if keep_last < 1:
        raise UserError(f"train.keep_last={keep_last}: must be at least 1, or a run could not be resumed")
    if keep_every < 0:
        raise UserError(f"train.keep_every={keep_every}: must be 0 (none) or a number of steps")
    problems = {path: find_problem(path) for path in list_checkpoints(parent)}
    valid = [path for path, problem in problems.items() if problem is None]
    left = [f"checkpoint {path} is left as it is: {problem}" for path, problem in problems.items() if problem]
    kept, removed = set(keep), []
    for path in valid[:-keep_last]:
        if step_of(path) in kept or (keep_every and step_of(path) % keep_every == 0):
            continue
        try:
            discard(path, "removed")
            removed.append(path)
        except OSError as error:
            left.append(f"checkpoint {path} is left as it is: cannot be removed ({error.strerror})")
    return removed, left
