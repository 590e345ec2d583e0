"""The tables of a LeRobot dataset against each other: what info.json promises, the tables of episodes and tasks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dataloaders.config import BelieveConfig
from dataloaders.consistency.report import Contradiction, decide

INFO, EPISODES, TASKS = "meta/info.json", "the table of episodes", "the table of tasks"
_KINDS = {"float": "f", "int": "i", "uint": "i", "bool": "b", "string": "s"}


@dataclass(frozen=True)
class EpisodeRow:
    """What the table of episodes says of one: its number, its frames, and which `index` its rows have."""

    index: int
    length: int
    dataset_range: tuple[int, int] | None = None


def check_totals(
    info: Mapping[str, Any], episodes: Sequence[EpisodeRow], tasks: int, believe: BelieveConfig
) -> list[Contradiction]:
    """The totals and splits of info.json against the tables.

    Args:
        info: the file's content.
        episodes: in the order of their index.
        tasks: strings in the table of tasks.
    """
    frames, found = sum(row.length for row in episodes), []
    promised, frames_promised = _whole(info.get("total_episodes")), _whole(info.get("total_frames"))
    said = {
        INFO: f"promises {promised} episodes and {frames_promised} frames",
        EPISODES: f"has {len(episodes)} and {frames}",
    }
    if promised is not None and promised != len(episodes):
        believed, remedy = decide(believe, "episodes", "fetch what is missing")
        found.append(Contradiction("episodes", "meta", said, believed, remedy))
    elif frames_promised is not None and frames_promised != frames:
        found.append(Contradiction("total_frames", "meta", said, "the table of episodes, compared with all rows"))
    if (total := _whole(info.get("total_tasks"))) is not None and total != tasks:
        said = {INFO: f"says {total} tasks", TASKS: f"has {tasks}"}
        found.append(Contradiction("total_tasks", "meta", said, "the table of tasks"))
    missing = sorted(set(range(len(episodes))) - {row.index for row in episodes})
    if missing:
        said = {EPISODES: f"has {len(episodes)} rows", "their numbers": f"go up to {episodes[-1].index}"}
        said["their numbers"] += f" without {missing[0]}"
        found.append(Contradiction("numbering", "meta", said, "the rows that are there"))
    return found + _splits(info.get("splits"), len(episodes)) + _ranges(episodes)


def check_features(declared: Mapping[str, Any], columns: Mapping[str, tuple[str, int]]) -> list[Contradiction]:
    """Types and sizes of numeric columns.

    Args:
        declared: the features of info.json.
        columns: (type, numbers in a row) of those that the rows have, by name.
    """
    found = []
    for name, (kind, size) in columns.items():
        feature = declared.get(name)
        if feature is None or feature["dtype"] in ("video", "image"):
            continue
        wanted = _size(feature.get("shape"))
        if (wanted is not None and wanted != size) or _kind(feature["dtype"]) not in (_kind(kind), None):
            said = {INFO: f"says {feature['dtype']} of shape {feature.get('shape')}", "the rows": f"have {size} {kind}"}
            found.append(Contradiction("shape", f"column {name}", said, "the rows"))
    return found


def check_cameras(declared: Iterable[str], with_files: Iterable[str]) -> list[Contradiction]:
    """Cameras of info.json that have no pictures."""
    missing = sorted(set(declared) - set(with_files))
    if not missing:
        return []
    said = {INFO: f"names {', '.join(missing)}", "the folder": "has no pictures of it"}
    return [Contradiction("cameras", "meta", said, "the folder: left out")]


def check_picture_size(camera: str, feature: Mapping[str, Any], size: tuple[int, int]) -> list[Contradiction]:
    """The (height, width) of a camera's pictures, upright; some info.json have the channels first."""
    shape = feature.get("shape")
    if not isinstance(shape, list) or len(shape) != 3 or size in (tuple(shape[:2]), tuple(shape[1:])):
        return []
    said = {INFO: f"says {'×'.join(map(str, shape))}", "the pictures": f"are {size[0]}×{size[1]}"}
    return [Contradiction("picture_size", camera, said, "the pictures")]


def _splits(splits: Any, episodes: int) -> list[Contradiction]:
    for name, text in splits.items() if isinstance(splits, dict) else ():
        match = re.fullmatch(r"(\d{1,18}):(\d{1,18})", text if isinstance(text, str) else "")
        if match and int(match[2]) > episodes:
            said = {INFO: f"gives split {name} the episodes {text}", EPISODES: f"has {episodes}"}
            return [Contradiction("splits", "meta", said, "the table of episodes")]
    return []


def _ranges(episodes: Sequence[EpisodeRow]) -> list[Contradiction]:
    at = None
    for row in episodes:
        if row.dataset_range is None:
            continue
        first, end = row.dataset_range
        if end - first != row.length or (at is not None and first != at):
            said = {
                "dataset_from_index and dataset_to_index": f"say {first} to {end}",
                "the lengths before and of it": f"say {first if at is None else at} to "
                f"{(first if at is None else at) + row.length}",
            }
            return [Contradiction("dataset_range", f"episode {row.index}", said, "the rows, by their episode_index")]
        at = end
    return []


def _whole(value: Any) -> int | None:
    """A count; None where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return int(value)


def _size(shape: Any) -> int | None:
    if not isinstance(shape, list | tuple) or not all(isinstance(side, int) for side in shape):
        return None
    return math.prod(shape)


def _kind(dtype: str) -> str | None:
    return _KINDS.get(re.sub(r"\d+$", "", str(dtype)))
