"""Which checkpoint a path means."""

from __future__ import annotations

from pathlib import Path

from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.canonical import (
    MANIFEST,
    CheckpointReader,
    checkpoint_path,
    find_latest,
    find_problem,
)


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint folder from itself, its parent, or a run folder (newest valid one).

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    for parent in (path / "checkpoints", path):
        if parent.is_dir():
            latest, problems = find_latest(parent)
            if latest is not None:
                return latest
            if problems:
                raise UserError(f"{path}: no valid checkpoint; {problems[0]}")
    raise UserError(f"{path}: no checkpoint there; give a run folder or one of its checkpoints/step-… folders")


def resolve_best(run: Path) -> Path:
    """The checkpoint of a run with the lowest validation loss.

    Raises:
        UserError: the run has none, or was not validated.
    """
    newest = CheckpointReader(resolve_checkpoint(run))
    best = newest.state.get("best")
    if best is None:
        raise UserError(f"{run}: was not validated, so no checkpoint is the best; train with data.validation_shards")
    path = checkpoint_path(newest.path.parent, best["step"])
    if problem := find_problem(path):
        raise UserError(f"{run}: its best checkpoint is of step {best['step']}: {problem}")
    return path
