"""Where a LeRobot dataset keeps what: `meta/info.json`, the path templates and the table of episodes of each version.

v2.0 and v2.1 have one parquet and one video file per episode (and camera), named by templates in info.json; v3.0 packs
many episodes into one file and says in `meta/episodes/` which rows and seconds of it belong to which episode.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataloaders.consistency.pictures import VideoSpan
from dataloaders.consistency.tables import EpisodeRow
from dataloaders.files.urls import join
from dataloaders.lerobot.columns import text_of
from kairos_train.basics.errors import UserError, one_line
from kairos_train.basics.files import read_json
from kairos_train.basics.foreign_files import read_text, refuse_lfs_pointer

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


def read_info(root: Path) -> Info:
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
            f"{path}: codebase_version is {version!r}; it must be one of {', '.join(VERSIONS)}: convert the "
            "dataset with the lerobot package"
        )
    fps, features, chunks_size = raw.get("fps"), raw.get("features"), raw.get("chunks_size", 1000)
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < math.inf:
        raise UserError(f"{path}: fps is {fps!r}; it must be a positive number")
    if not isinstance(features, dict) or not all(isinstance(f, dict) and "dtype" in f for f in features.values()):
        raise UserError(f"{path}: features must map every column to its dtype and shape; restore the file")
    if not isinstance(raw.get("data_path"), str):
        raise UserError(f"{path}: data_path is {raw.get('data_path')!r}; it must be the template of the data files")
    if not isinstance(chunks_size, int) or chunks_size < 1:
        raise UserError(f"{path}: chunks_size is {chunks_size!r}; it must be a positive whole number")
    return Info(
        root=root,
        version=version,
        fps=float(fps),
        robot_type=raw.get("robot_type"),
        features=features,
        data_path=raw["data_path"],
        video_path=raw.get("video_path"),
        chunks_size=chunks_size,
        raw=raw,
    )


def read_tasks(info: Info) -> dict[int, str]:
    """Task strings by task index.

    Raises:
        UserError: the table is missing or unreadable, or has two tasks of one index.
    """
    if info.version != "v3.0":
        path = info.root / "meta/tasks.jsonl"
        rows = _read_jsonl(path, ("task_index", "task"))
    else:
        path = info.root / TASKS_PATH
        table = read_table(path)
        # The writer stores a pandas frame indexed by the task; only in some of its versions has that column a name.
        column = next((c for c in ("task", "__index_level_0__") if c in table.column_names), None)
        if column is None or "task_index" not in table.column_names:
            raise UserError(
                f"{path}: has columns {table.column_names}; it needs task_index and task (or __index_level_0__)"
            )
        rows = table.select(["task_index", column]).rename_columns(["task_index", "task"]).to_pylist()
    tasks: dict[int, str] = {}
    for row in rows:
        index, text = _whole(row, "task_index", path), _text(row["task"], path) or ""
        if tasks.setdefault(index, text) != text:
            raise UserError(
                f"{path}: task_index {index} is there twice, as {tasks[index]!r} and {text!r}; give each task its own"
            )
    return tasks


def read_episodes(info: Info) -> list[EpisodeEntry]:
    """The table of episodes in the order of their index.

    Raises:
        UserError: the table is missing or unreadable, lacks a column, or names an episode twice.
    """
    video_keys = [key for key, feature in info.features.items() if feature["dtype"] == "video"]
    entries = (_entries_v3 if info.version == "v3.0" else _entries_v2)(info, video_keys)
    entries = sorted(entries, key=lambda entry: entry.index)
    for before, entry in itertools.pairwise(entries):
        if before.index == entry.index:
            raise UserError(f"{info.root}: the table of episodes holds episode {entry.index} twice; restore it")
    return entries


def read_table(path: Path, **kwargs: Any) -> pa.Table:
    """A whole parquet file.

    Raises:
        UserError: the file is missing or not readable.
    """
    if not path.is_file():
        raise UserError(f"{path}: the file is missing; the dataset is incomplete: fetch or write it again")
    refuse_lfs_pointer(path)
    try:
        # The file alone: a folder like `chunk-000` beside it must not be taken for a partition column.
        return pq.ParquetFile(path).read(**kwargs)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: is not a readable parquet file ({one_line(error)[:200]}); restore it") from error


def _entries_v2(info: Info, video_keys: list[str]) -> list[EpisodeEntry]:
    path = info.root / "meta/episodes.jsonl"
    entries = []
    for row in _read_jsonl(path, ("episode_index", "length")):
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
        names = pq_names(path)
        needed = ("episode_index", "tasks", "length", "data/chunk_index", "data/file_index")
        if missing := [name for name in needed if name not in names]:
            raise UserError(f"{path}: lacks the column {missing[0]!r}; restore it")
        table = read_table(path, columns=[name for name in names if not name.startswith("stats/")])
        cameras = [key for key in video_keys if info.video_path and f"videos/{key}/from_timestamp" in names]
        for row in table.to_pylist():
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
    """The values that are not LeRobot's own; pandas' NaN stands for none."""
    own = {name: value for name, value in row.items() if "/" not in name and name not in EPISODE_COLUMNS}
    return {name: v for name, v in own.items() if isinstance(v, bool | int | float | str) and v == v}


def _whole(row: dict[str, Any], name: str, where: Path | str) -> int:
    value = row[name]
    real = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or value != int(value) or value < 0:
        raise UserError(f"{where}: {name} is {value!r}; it must be a whole number of 0 or more: restore the file")
    return int(value)


def _seconds(row: dict[str, Any], name: str, where: str) -> float | None:
    value = row.get(name)
    if value is not None and not (isinstance(value, int | float | Decimal) and math.isfinite(value)):
        raise UserError(f"{where}: {name} is {value!r}; it must be a number of seconds: restore the file")
    return None if value is None else float(value)


def _texts(value: Any, where: Path | str) -> list[str]:
    """The tasks of an episode: a list, or in some sets one string."""
    cells = [value] if isinstance(value, str | bytes) else value or []
    return [text for text in (_text(cell, where) for cell in cells) if text is not None]


def _text(value: Any, where: Path | str) -> str | None:
    try:
        return text_of(value)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: the task {value!r} is not UTF-8; convert the table") from error


def pq_names(path: Path) -> list[str]:
    """Column names of a parquet file.

    Raises:
        UserError: the file is missing or not readable.
    """
    refuse_lfs_pointer(path)
    try:
        return pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: is not a readable parquet file ({one_line(error)[:200]}); restore it") from error


def _fill(info: Info, template: str, **values: Any) -> Path:
    text = getattr(info, template)
    try:
        return Path(join(info.root, text.format(**values)))
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{info.root / INFO_PATH}: {template} {text!r} cannot be filled in ({error!r}); {info.version} knows "
            f"{', '.join(values)}"
        ) from error


def _read_jsonl(path: Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: the file is missing; the dataset is incomplete: fetch or write it again")
    rows = []
    # Not splitlines: a text may hold what that takes for the end of a line, as U+2028.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error}); restore it") from error
        if not isinstance(row, dict) or (missing := [name for name in needed if name not in row]):
            raise UserError(
                f"{path}: line {number} lacks {missing[0] if isinstance(row, dict) else needed[0]!r}; restore it"
            )
        rows.append(row)
    return rows
