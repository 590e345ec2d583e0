"""Where a LeRobot dataset keeps what: `meta/info.json`, the path templates and the table of episodes of each version.

v2.0 and v2.1 have one parquet and one video file per episode (and camera), named by templates in info.json; v3.0 packs
many episodes into one file and says in `meta/episodes/` which rows and seconds of it belong to which episode.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataloaders.config import LimitsConfig
from dataloaders.consistency.pictures import VideoSpan
from dataloaders.consistency.tables import EpisodeRow
from dataloaders.files.places import refuse_linked_folders
from dataloaders.files.tables import column_names, python_rows, read_table, refuse_many
from dataloaders.files.urls import join
from dataloaders.lerobot.columns import text_of
from kairos_train.basics.errors import UserError, one_line
from kairos_train.basics.files import read_json
from kairos_train.basics.foreign_files import (
    finite,
    is_lfs_pointer,
    json_lines,
    one_plain_line,
    pointer_fault,
    read_bytes,
    shown,
    whole,
)

VERSIONS = ("v2.0", "v2.1", "v3.0")
INFO_PATH = "meta/info.json"
STATS_PATH = "meta/stats.json"
TASKS_PATH = "meta/tasks.parquet"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

FRAME_FEATURES = {  # the columns that every row has beside its own features
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
_FASTEST = 1e9  # frames per second that there could be
_LONGEST_TYPE = 100  # characters of the robot's type that are shown
_FORM = re.compile(r"0?\d{0,2}d?")  # of a number in a template
EPISODE_COLUMNS = ("episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index")


@dataclass(frozen=True)
class Info:
    """What `meta/info.json` says, checked. `fps` in frames per second, `features` as they stand in the file, `raw` all
    of it."""

    root: Path
    version: str
    fps: float
    robot_type: str | None
    features: dict[str, dict[str, Any]]
    data_path: str
    video_path: str | None
    chunks_size: int
    raw: dict[str, Any] = field(default_factory=dict)
    limits: LimitsConfig = field(default_factory=LimitsConfig)


@dataclass(frozen=True)
class VideoPlace:
    """Where an episode's pictures of one camera are: the file, and which part of it."""

    path: Path
    span: VideoSpan = field(default_factory=lambda: VideoSpan(0.0))


@dataclass(frozen=True)
class EpisodeEntry(EpisodeRow):
    """One row of the table of episodes. `extra` holds the per-episode values that LeRobot itself does not know."""

    tasks: list[str] = field(default_factory=list)
    data: Path = Path()
    videos: dict[str, VideoPlace] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def read_info(root: Path, limits: LimitsConfig | None = None) -> Info:
    """Read and check `meta/info.json`.

    Raises:
        UserError: not a dataset folder, broken JSON, a version this reader does not know, missing or impossible fields.
    """
    path = root / INFO_PATH
    if not path.is_file():
        raise UserError(
            f"{root}: {INFO_PATH} is missing; give the folder that holds meta/ and data/ of a LeRobot dataset"
        )
    raw = read_json(path, remedy="restore it")
    version = raw.get("codebase_version")
    if version not in VERSIONS:
        raise UserError(
            f"{path}: codebase_version is {shown(version)}; it must be one of {', '.join(VERSIONS)}: convert the "
            "dataset with the lerobot package"
        )
    fps, features, chunks_size = raw.get("fps"), raw.get("features"), raw.get("chunks_size", 1000)
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < _FASTEST:
        raise UserError(f"{path}: fps is {shown(fps)}; it must be a positive number")
    if not isinstance(features, dict) or not all(isinstance(f, dict) and "dtype" in f for f in features.values()):
        raise UserError(f"{path}: features must map every column to its dtype and shape; restore the file")
    if not isinstance(raw.get("data_path"), str):
        raise UserError(
            f"{path}: data_path is {shown(raw.get('data_path'))}; it must be the template of the data files"
        )
    if not isinstance(chunks_size, int) or not 0 < chunks_size < 2**63:
        raise UserError(f"{path}: chunks_size is {shown(chunks_size)}; it must be a positive whole number")
    return Info(
        root=root,
        version=version,
        fps=float(fps),
        robot_type=_robot_type(raw.get("robot_type")),
        features=features,
        data_path=raw["data_path"],
        video_path=raw.get("video_path"),
        chunks_size=chunks_size,
        raw=raw,
        limits=limits or LimitsConfig(),
    )


def _robot_type(value: Any) -> str | None:
    return one_plain_line(value, _LONGEST_TYPE) if isinstance(value, str) else None


def read_tasks(info: Info) -> dict[int, str]:
    """Task strings by task index.

    Raises:
        UserError: the table is missing or unreadable, or has two tasks of one index.
    """
    if info.version != "v3.0":
        path = info.root / "meta/tasks.jsonl"
        rows = _read_jsonl(path, ("task_index", "task"), info.limits)
    else:
        path = info.root / TASKS_PATH
        table = read_table(path, info.limits)
        # The writer stores a pandas frame indexed by the task; only in some of its versions has that column a name.
        column = next((c for c in ("task", "__index_level_0__") if c in table.column_names), None)
        if column is None or "task_index" not in table.column_names:
            raise UserError(
                f"{path}: has columns {table.column_names}; it needs task_index and task (or __index_level_0__)"
            )
        renamed = table.select(["task_index", column]).rename_columns(["task_index", "task"])
        rows = python_rows(renamed, path, info.limits)
    tasks: dict[int, str] = {}
    for row in rows:
        index, text = _whole(row, "task_index", path), _text(row["task"], path) or ""
        if tasks.setdefault(index, text) != text:
            both = f"{shown(tasks[index])} and {shown(text)}"
            raise UserError(f"{path}: task_index {index} is there twice, as {both}; give each task its own")
    return tasks


def read_episodes(info: Info) -> list[EpisodeEntry]:
    """The table of episodes in the order of their index.

    Raises:
        UserError: the table is missing or unreadable, lacks a column, names an episode twice, or files that lie
            behind a linked folder.
    """
    video_keys = [key for key, feature in info.features.items() if feature["dtype"] == "video"]
    entries = (_entries_v3 if info.version == "v3.0" else _entries_v2)(info, video_keys)
    entries = sorted(entries, key=lambda entry: entry.index)
    for before, entry in itertools.pairwise(entries):
        if before.index == entry.index:
            raise UserError(f"{info.root}: the table of episodes holds episode {entry.index} twice; restore it")
    files = [file for e in entries for file in (e.data, *(place.path for place in e.videos.values()))]
    refuse_linked_folders(info.root, [*files, *info.root.glob("data/*/*.parquet")], info.limits)
    return entries


def _entries_v2(info: Info, video_keys: list[str]) -> list[EpisodeEntry]:
    path = info.root / "meta/episodes.jsonl"
    entries = []
    for row in _read_jsonl(path, ("episode_index", "length"), info.limits):
        index, length = _whole(row, "episode_index", path), _whole(row, "length", path)
        place = {"episode_chunk": index // info.chunks_size, "episode_index": index}
        videos = {
            key: VideoPlace(_fill(info, "video_path", video_key=key, **place)) for key in video_keys if info.video_path
        }
        data = _fill(info, "data_path", **place)
        entries.append(EpisodeEntry(index, length, None, _texts(row.get("tasks"), path), data, videos, _extra(row)))
    return entries


def _entries_v3(info: Info, video_keys: list[str]) -> list[EpisodeEntry]:
    folder = info.root / "meta/episodes"
    paths = sorted(folder.glob("*/*.parquet"))
    if not paths:
        raise UserError(f"{folder}: holds no parquet file; the dataset is incomplete: fetch or write it again")
    entries = []
    for path in paths:
        names = column_names(path)
        needed = ("episode_index", "tasks", "length", "data/chunk_index", "data/file_index")
        if missing := [name for name in needed if name not in names]:
            raise UserError(f"{path}: lacks the column {missing[0]!r}; restore it")
        table = read_table(path, info.limits, columns=[name for name in names if not name.startswith("stats/")])
        cameras = [key for key in video_keys if info.video_path and f"videos/{key}/from_timestamp" in names]
        for row in python_rows(table, path, info.limits, before=len(entries)):
            entries.append(_entry_v3(info, row, cameras, path))
    return entries


def _entry_v3(info: Info, row: dict[str, Any], cameras: list[str], path: Path) -> EpisodeEntry:
    index, length = (_whole(row, name, path) for name in ("episode_index", "length"))
    where = f"{path}: episode {index}"
    videos = {}
    for key in cameras:
        names = [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
        if all(row.get(name) is not None for name in names[:3]):
            chunk, file = (_whole(row, name, where) for name in names[:2])
            start, to = (_seconds(row, name, where) for name in names[2:])
            place = _fill(info, "video_path", video_key=key, chunk_index=chunk, file_index=file)
            videos[key] = VideoPlace(place, VideoSpan(start, to))
    chunk, file = (_whole(row, f"data/{name}_index", where) for name in ("chunk", "file"))
    bounds = [f"dataset_{name}_index" for name in ("from", "to")]
    known = all(row.get(name) is not None for name in bounds)
    return EpisodeEntry(
        index,
        length,
        tuple(_whole(row, name, where) for name in bounds) if known else None,
        _texts(row["tasks"], where),
        _fill(info, "data_path", chunk_index=chunk, file_index=file),
        videos,
        _extra(row),
    )


def _extra(row: dict[str, Any]) -> dict[str, Any]:
    """The values that are not LeRobot's own; pandas' NaN stands for none. Numbers are such as columns can hold."""
    own = {name: value for name, value in row.items() if "/" not in name and name not in EPISODE_COLUMNS}
    kept = {name: v for name, v in own.items() if isinstance(v, bool | int | float | str) and v == v}
    return {name: float(v) if isinstance(v, int) and abs(v) >= 2**63 else v for name, v in kept.items()}


def _whole(row: dict[str, Any], name: str, where: Path | str) -> int:
    try:
        return whole(row[name], name)
    except ValueError as error:
        raise UserError(f"{where}: {error}: restore the file") from error


def _seconds(row: dict[str, Any], name: str, where: str) -> float | None:
    value = row.get(name)
    try:
        return None if value is None else finite(None if isinstance(value, str) else value, name)
    except ValueError as error:
        raise UserError(
            f"{where}: {name} is {shown(value)}; it must be a number of seconds: restore the file"
        ) from error


def _texts(value: Any, where: Path | str) -> list[str]:
    """The tasks of an episode: a list, or in some sets one string."""
    cells = [value] if isinstance(value, str | bytes) else value or []
    if not isinstance(cells, list):
        raise UserError(f"{where}: tasks is {shown(value)}; it must be a list of texts: restore the file")
    return [text for text in (_text(cell, where) for cell in cells) if text is not None]


def _text(value: Any, where: Path | str) -> str | None:
    try:
        return text_of(value)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: the task {shown(value)} is not UTF-8; convert the table") from error


def _fill(info: Info, template: str, **values: Any) -> Path:
    text = getattr(info, template)
    try:
        for _, name, form, conversion in string.Formatter().parse(text):
            if name is not None and (name not in values or conversion or not _FORM.fullmatch(form)):
                raise ValueError(f"{{{name}}}")
        return Path(join(info.root, text.format(**values)))
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{info.root / INFO_PATH}: {template} {shown(text)} cannot be filled in ({one_line(error)}); "
            f"{info.version} knows {', '.join(values)}"
        ) from error


def _read_jsonl(path: Path, needed: tuple[str, ...], limits: LimitsConfig) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: the file is missing; the dataset is incomplete: fetch or write it again")
    data = read_bytes(path, most_bytes=limits.table_bytes)
    if is_lfs_pointer(data):
        raise UserError(pointer_fault(path))
    for count, (number, row, fault) in enumerate(json_lines(data, path, **limits.json), 1):
        if fault:
            line = "" if "UTF-8" in fault else f"line {number} "
            raise UserError(f"{path}: {line}{fault}; restore it")
        if not isinstance(row, dict) or (missing := [name for name in needed if name not in row]):
            raise UserError(
                f"{path}: line {number} lacks {missing[0] if isinstance(row, dict) else needed[0]!r}; restore it"
            )
        refuse_many(count, path, limits)
        yield row
