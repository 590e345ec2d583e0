"""Reading LeRobot datasets: the numbers of an episode at once, its pictures when asked for.

Shapes: T frames of the episode, n frames asked for, H height, W width. Nothing of the lerobot package is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataloaders.files.images import read_image
from dataloaders.files.urls import join
from dataloaders.files.video import TOLERANCE_S, decode_mp4
from dataloaders.lerobot.layout import (
    EpisodeEntry,
    VideoPlace,
    pq_names,
    read_episodes,
    read_info,
    read_table,
    read_tasks,
)
from kairos_train.basics.errors import UserError


@dataclass
class DatasetEpisode:
    """One episode.

    Attributes:
        index: its number in the dataset.
        length: T, in frames.
        tasks: its task strings; the one that its first frame carries comes first.
        columns: every numeric column, (T, dim) with dim 1 for scalars: float32, int64 or bool. Numeric entries of
            `extra` stand here too, the same in every row.
        timestamps: the `timestamp` column as stored, float64 (T,), seconds.
        extra: values that the table of episodes holds beside LeRobot's own (for instance the seed).
    """

    index: int
    length: int
    tasks: list[str]
    columns: dict[str, np.ndarray]
    timestamps: np.ndarray
    extra: dict[str, Any] = field(default_factory=dict)
    _videos: dict[str, VideoPlace] = field(default_factory=dict, repr=False)
    _images: dict[str, pa.ChunkedArray] = field(default_factory=dict, repr=False)
    _root: Path = field(default_factory=Path, repr=False)
    _data: Path = field(default_factory=Path, repr=False)
    _task_texts: dict[int, str] = field(default_factory=dict, repr=False)

    @property
    def data_file(self) -> Path:
        """What its numbers are read from."""
        return self._data

    @property
    def video_files(self) -> dict[str, Path]:
        """What the pictures are read from, by camera; inline images are in the data file."""
        return {key: place.path for key, place in self._videos.items()}

    def tasks_at(self, row: int) -> list[str]:
        """The task strings, that of the frame `row` first: in some sets the frames of an episode carry several."""
        if "task_index" not in self.columns:
            return list(self.tasks)
        mine = self._task_texts.get(int(self.columns["task_index"][row, 0]), "")
        return [mine, *(task for task in self.tasks if task != mine)]

    def frames(self, camera: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Pictures of one camera at the rows `indices` (in any order, repeats allowed), uint8 (n, H, W, 3).

        Raises:
            UserError: no such camera, a missing or damaged file, or no picture within 1e-4 s of a row's timestamp.
            IndexError: a row outside of the episode.
        """
        rows = np.asarray(indices, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.length):
            raise IndexError(f"rows {rows.min()}..{rows.max()} asked of an episode of {self.length}")
        if camera in self._images:
            column = self._images[camera]
            return np.stack([_picture(column[int(row)].as_py(), self._root, camera) for row in rows])
        if camera not in self._videos:
            known = ", ".join(sorted({*self._videos, *self._images})) or "none"
            raise UserError(f"episode {self.index}: camera {camera!r} has no pictures; cameras with pictures: {known}")
        place = self._videos[camera]
        # The first row shows the first picture even where the episode's timestamps do not start at 0.
        since_start = self.timestamps - self.timestamps[0]
        # Timestamps are float32 in most datasets: in a long episode their own rounding exceeds the tolerance.
        rounding = float(np.spacing(np.float32(np.abs(self.timestamps).max())))
        return decode_mp4(
            place.path, timestamps=place.from_timestamp + since_start[rows], tolerance_s=TOLERANCE_S + rounding
        )


class LeRobotDataset:
    """A LeRobot dataset folder of version 2.0, 2.1 or 3.0.

    Attributes: `version`; `fps` (float); `robot_type`; `features` (as in info.json); `tasks` (strings by task index);
    `camera_keys` (cameras with files or inline images, sorted: declared ones without are left out); `depth_keys` (those
    of them whose pictures are declared to be depth); `num_episodes`.

    Raises:
        UserError: the folder is not such a dataset, or a table of it is missing or malformed.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        info = read_info(self.root)
        self.version, self.fps, self.robot_type, self.features = info.version, info.fps, info.robot_type, info.features
        self.tasks = read_tasks(info)
        self._entries = read_episodes(info)
        self._image_keys = self._inline_images()
        self.camera_keys = sorted([*self._image_keys, *self._video_keys()])
        self.depth_keys = [key for key in self.camera_keys if is_depth(self.features[key])]
        self._table: tuple[Path, pa.Table] | None = None  # v3.0: neighbouring episodes share a file

    @property
    def num_episodes(self) -> int:
        return len(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[DatasetEpisode]:
        return (self.episode(i) for i in range(self.num_episodes))

    def outline(self) -> list[list[Any]]:
        """[index, length, tasks, extra] of every episode: what the table of episodes says, without reading data."""
        return [[e.index, e.length, e.tasks, e.extra] for e in self._entries]

    def episode(self, i: int) -> DatasetEpisode:
        """The i-th episode in the order of episode indices.

        Raises:
            UserError: its data file is missing or damaged, or does not hold what the tables promise.
            IndexError: there is no such episode.
        """
        if not 0 <= i < self.num_episodes:
            raise IndexError(f"episode {i} asked of {self.num_episodes}")
        entry = self._entries[i]
        rows = self._rows(entry)
        columns = {}
        for name in rows.column_names:
            if (values := _numeric(rows[name], f"{entry.data}: column {name!r}")) is not None:
                columns[name] = values
        columns.setdefault("frame_index", np.arange(entry.length, dtype=np.int64)[:, None])
        for name, value in entry.extra.items():
            if not isinstance(value, str) and name not in columns:
                dtype = np.float32 if isinstance(value, float) else np.asarray(value).dtype
                columns[name] = np.full((entry.length, 1), value, dtype)
        if "timestamp" not in columns:
            raise UserError(f"{entry.data}: has no timestamp column; every LeRobot dataset has one: restore the file")
        return DatasetEpisode(
            index=entry.index,
            length=entry.length,
            tasks=self._ordered_tasks(entry, columns.get("task_index")),
            columns=columns,
            timestamps=rows["timestamp"].to_numpy().astype(np.float64).reshape(-1),
            extra=dict(entry.extra),
            _videos={key: place for key, place in entry.videos.items() if key in self.camera_keys},
            _images={key: rows[key] for key in self._image_keys},
            _root=self.root,
            _data=entry.data,
            _task_texts=self.tasks,
        )

    def _rows(self, entry: EpisodeEntry) -> pa.Table:
        if self._table is None or self._table[0] != entry.data:
            self._table = (entry.data, read_table(entry.data))
        table = self._table[1]
        if self.version == "v3.0":
            if "episode_index" not in table.column_names:
                raise UserError(f"{entry.data}: has no episode_index column; restore the file")
            mine = np.flatnonzero(table["episode_index"].to_numpy() == entry.index)
            table = (
                table.take(mine)
                if len(mine) and np.diff(mine).max(initial=1) > 1
                else table.slice(mine[0] if len(mine) else 0, len(mine))
            )
        if table.num_rows != entry.length or entry.length < 1:
            raise UserError(
                f"{entry.data}: holds {table.num_rows} rows of episode {entry.index}, whose length is {entry.length} "
                "in the table of episodes; one of the two is damaged or from another version of the dataset"
            )
        return table

    def _ordered_tasks(self, entry: EpisodeEntry, task_index: np.ndarray | None) -> list[str]:
        if task_index is None:
            return list(entry.tasks)
        first = int(task_index[0, 0])
        if unknown := set(np.unique(task_index).tolist()) - set(self.tasks):
            raise UserError(
                f"{entry.data}: task_index {min(unknown)} is not in the table of tasks of {self.root}; restore it"
            )
        return [self.tasks[first], *(task for task in entry.tasks if task != self.tasks[first])]

    def _video_keys(self) -> list[str]:
        keys = sorted({key for entry in self._entries for key in entry.videos})
        return [k for k in keys if any(e.videos[k].path.is_file() for e in self._entries if k in e.videos)]

    def _inline_images(self) -> list[str]:
        declared = [key for key, feature in self.features.items() if feature["dtype"] == "image"]
        if not declared or not self._entries:
            return []
        names = pq_names(self._entries[0].data)
        return [key for key in declared if key in names]


def is_depth(feature: dict[str, Any]) -> bool:
    """Whether a camera's pictures are declared to be depth, in the words of any version of LeRobot."""
    notes = [feature, *(feature[name] for name in ("info", "video_info") if isinstance(feature.get(name), dict))]
    return any(note.get(name) is True for note in notes for name in ("is_depth_map", "video.is_depth_map"))


def _numeric(column: pa.ChunkedArray, where: str) -> np.ndarray | None:
    """(T, dim) float32, int64 or bool; None for text, images and other things that are not numbers."""
    array = column.combine_chunks()
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    length = len(array)
    kind = array.type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        if array.null_count:
            raise UserError(f"{where} has rows without a value; every frame needs one")
        if not pa.types.is_fixed_size_list(kind) and len(set(array.value_lengths().to_pylist())) > 1:
            raise UserError(f"{where} has vectors of different lengths; every frame needs the same")
        array = array.flatten()
        kind = array.type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        return None
    if array.null_count:
        raise UserError(f"{where} has missing values; every frame needs one")
    values = array.to_numpy(zero_copy_only=False).reshape(length, -1)
    if values.dtype == bool:
        return values
    return values.astype(np.float32 if np.issubdtype(values.dtype, np.floating) else np.int64)


def _picture(value: Any, root: Path, camera: str) -> np.ndarray:
    """uint8 (H, W, 3) of an inline image: its encoded bytes, or else the path of its file."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, None)
    if data is None and not (path and Path(join(root, path)).is_file()):
        raise UserError(f"{root}: a picture of {camera!r} has neither bytes nor a file (path {path!r}); restore it")
    source = data if data is not None else Path(join(root, path))
    return read_image(source, name=f"{root}: a picture of {camera!r}", scale_16_bits=False)
