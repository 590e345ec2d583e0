"""Checkpoints whose every byte is as it was written, found by all ranks together."""

from __future__ import annotations

from pathlib import Path

from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.canonical import checkpoint_path, find_problem, list_checkpoints, step_of
from parallel.consensus import first_does, from_all, from_first
from parallel.topology import Topology


def find_intact(parent: Path, topology: Topology, *, before: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint below `parent`; each rank reads its share of the files. Collective.

    Sizes alone, as `find_latest` compares them, do not show a flipped bit.

    Args:
        before: only checkpoints of earlier steps; None: all.

    Returns:
        The folder (None when there is none) and one warning for each newer one that was skipped, the same on all
        ranks.

    Raises:
        MachineFault: the folder cannot be listed; on all ranks.
    """
    # As rank 0 sees the folder: views of a shared file system may differ for a moment.
    listed = first_does(
        lambda: [step_of(path) for path in list_checkpoints(parent)], rank=topology.rank, size=topology.size
    )
    warnings: list[str] = []
    for step in reversed(from_first(listed, topology.size)):
        if before is not None and step >= before:
            continue
        path = checkpoint_path(parent, step)
        problem = _found_by_any(path, topology)
        if problem is None:
            return path, warnings
        warnings.append(f"checkpoint {path} is skipped: {problem}")
    return None, warnings


def check_intact(path: Path, topology: Topology) -> None:
    """Return if a checkpoint is intact; each rank reads its share of the files. Collective.

    Raises:
        UserError: it is not; on all ranks.
    """
    if problem := _found_by_any(path, topology):
        raise UserError(f"checkpoint {path}: {problem}; use another checkpoint")


def _found_by_any(path: Path, topology: Topology) -> str | None:
    """What is wrong with a checkpoint, as the first rank says that finds something."""
    problem = find_problem(path, deep=True, share=(topology.rank, topology.size))
    return next((found for found in from_all(problem, topology.size) if found is not None), None)
