"""Which episodes of a dataset are packed: those that are named, or else those of its split `train`.

`meta/info.json` divides the episodes by their index: `"splits": {"train": "0:80", "test": "80:100"}`, first and end as
in Python.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataloaders.lerobot.layout import INFO_PATH
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import read_json
from kairos_train.basics.foreign_files import one_plain_line, shown

TRAIN = "train"
_LONGEST_NOTE = 200  # characters of what a note takes from the dataset
_RANGE = re.compile(r"\s*(\d{0,18})\s*:\s*(\d{0,18})\s*")


def parse_episodes(text: str) -> list[tuple[int, int]]:
    """Episodes as the command line names them, `0-89` or `0-9,12`: (first, end) of each range.

    Raises:
        UserError: says what is no range.
    """
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            fault = f"{part.strip()!r} is no episode or range of episodes; write them as 0-89 or 0-9,12"
            raise UserError(f"only_episodes={text!r}: {fault}")
        ranges.append((first, last + 1))
    return ranges


def choose_episodes(
    root: Path, indices: Sequence[int], only: Sequence[tuple[int, int]] | None
) -> tuple[list[int], list[str]]:
    """Positions in `indices` of the episodes to pack, and notes on what was left out and why.

    Args:
        root: of the dataset.
        indices: of all its episodes, ascending.
        only: (first, end) of those that are named; they go before the dataset's own splits.

    Raises:
        UserError: no episode is left, or a split that cannot be read.
    """
    if only is not None:
        chosen = [i for i, index in enumerate(indices) if any(a <= index < b for a, b in only)]
        absent = [f"{a}" if a + 1 == b else f"{a} to {b - 1}" for a, b in only if not _within(indices, a, b)]
        if not chosen:
            raise UserError(f"--only-episodes: {root} has none of these; its episodes are {_spelt(indices)}")
        notes = [f"--only-episodes: the dataset does not have all of episodes {', '.join(absent)}"] if absent else []
        return chosen, notes
    splits = read_json(root / INFO_PATH, remedy="restore it").get("splits")
    return _of_splits(root, indices, splits if isinstance(splits, dict) else {})


def _of_splits(root: Path, indices: Sequence[int], splits: Mapping[str, Any]) -> tuple[list[int], list[str]]:
    everything = list(range(len(indices)))
    told = ", ".join(f"{name} {text}" for name, text in splits.items())
    told = one_plain_line(told, _LONGEST_NOTE)
    if TRAIN not in splits:
        others = f"splits ({told}) and none is called {TRAIN}: all episodes are packed; --only-episodes names some"
        return everything, [f"{INFO_PATH} has {others}"] if splits else []
    first, end = _bounds(root, splits[TRAIN])
    beyond = indices[-1] + 1 if indices else 0
    notes = []
    if end is not None and end > beyond:
        notes.append(
            f"{INFO_PATH}: the split {TRAIN} is {splits[TRAIN]}, the last episode {beyond - 1}; it is cut there"
        )
    chosen = [i for i, index in enumerate(indices) if first <= index and (end is None or index < end)]
    if not chosen:
        raise UserError(
            f"{root / INFO_PATH}: the split {TRAIN} ({splits[TRAIN]}) holds no episode; --only-episodes names some"
        )
    if len(chosen) < len(indices):
        notes.append(
            f"{INFO_PATH} divides the episodes ({told}): {len(chosen):,} of {len(indices):,} are packed, those of "
            f"{TRAIN}; --only-episodes names others"
        )
    return chosen, notes


def _bounds(root: Path, text: Any) -> tuple[int, int | None]:
    match = _RANGE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise UserError(
            f"{root / INFO_PATH}: the split {TRAIN} is {shown(text)} and no range as 0:80; fix it, or name the "
            "episodes with --only-episodes"
        )
    return int(match[1] or 0), int(match[2]) if match[2] else None


def _within(indices: Sequence[int], first: int, end: int) -> bool:
    return set(range(first, end)) <= set(indices)


def _spelt(indices: Sequence[int]) -> str:
    return f"{indices[0]} to {indices[-1]}" if indices else "none"
