"""Which checkpoint a path means."""

from __future__ import annotations

from pathlib import Path

from kairos_train.checkpoint.canonical import MANIFEST, find_latest
from kairos_train.errors import UserError


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
