"""Which checkpoint a path means."""

from __future__ import annotations

import os
from pathlib import Path

from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.canonical import (
    MANIFEST,
    CheckpointReader,
    checkpoint_path,
    find_latest,
    find_problem,
    list_checkpoints,
    step_of,
)


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint folder from itself, its parent, or a run folder: the newest there, never an older one instead.

    Raises:
        UserError: there is none, or the newest is damaged; an older one that is not is named with the remedy.
        MachineFault: the folder cannot be listed.
    """
    path = Path(path)
    if step_of(path) is not None or os.path.lexists(path / MANIFEST):
        return path
    for parent in (path / "checkpoints", path):
        if os.path.isdir(parent) and (there := list_checkpoints(parent)):
            if problem := find_problem(there[-1]):
                older, _ = find_latest(parent)
                remedy = "" if older is None else f", or name the older {older} to take that"
                raise UserError(f"{path}: its newest, {there[-1].name}, is damaged: {problem}; restore it{remedy}")
            return there[-1]
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
