"""The newest checkpoint whose every byte is as it was written, found by all ranks together."""

from __future__ import annotations

from pathlib import Path

from kairos_train.checkpoint.canonical import checkpoint_path, find_problem, list_checkpoints, step_of
from parallel.consensus import from_all
from parallel.topology import Topology


def find_intact(parent: Path, topology: Topology, *, before: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint below `parent`; each rank reads its share of the files. Collective.

    Sizes alone, as `find_latest` compares them, do not show a flipped bit.

    Args:
        before: only checkpoints of earlier steps; None: all.

    Returns:
        The folder (None when there is none) and one warning for each newer one that was skipped, the same on all
        ranks.
    """
    warnings: list[str] = []
    while True:
        # As rank 0 sees the folder: views of a shared file system may differ for a moment.
        steps = [step_of(path) for path in list_checkpoints(parent)]
        steps = from_all(steps, topology.size)[0]
        steps = [step for step in steps if before is None or step < before]
        if not steps:
            return None, warnings
        path = checkpoint_path(parent, steps[-1])
        problem = find_problem(path, deep=True, share=(topology.rank, topology.size))
        problems = [found for found in from_all(problem, topology.size) if found is not None]
        if not problems:
            return path, warnings
        warnings.append(f"checkpoint {path} is skipped: {problems[0]}")
        before = steps[-1]
