"""Reading LeRobot datasets: the numbers of an episode at once, its pictures when asked for.

What one table says is compared with what another one says (`dataloaders.consistency`); an episode is given out when
they agree, or `data.believe` says which is right.

Shapes: T frames of an episode. Nothing of the lerobot package is needed.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataloaders.config import BelieveConfig, LimitsConfig
from dataloaders.consistency import rows as row_checks
from dataloaders.consistency import tables as table_checks
from dataloaders.consistency.pictures import Pairing, check_parts, pair_rows
from dataloaders.consistency.report import Contradiction, refuse
from dataloaders.consistency.rows import Clock
from dataloaders.files.tables import column_names, read_table
from dataloaders.files.video import TOLERANCE_S, frame_times
from dataloaders.files.video_file import check_frames
from dataloaders.lerobot.columns import numbers, read_clock, whole_numbers
from dataloaders.lerobot.episode import DatasetEpisode
from dataloaders.lerobot.layout import (
    EpisodeEntry,
    VideoPlace,
    read_episodes,
    read_info,
    read_tasks,
)
from kairos_train.basics.errors import UserError


class LeRobotDataset:
    """A LeRobot dataset folder of version 2.0, 2.1 or 3.0.

    Args:
        believe: which side is right where two sources in the dataset contradict each other.
        tolerance: seconds a row's timestamp may lie from its frame.
        limits: of what its files may hold and name; the schema's defaults when None.

    Attributes: `version`; `fps` (float); `robot_type`; `features` (as in info.json); `tasks` (strings by task index);
    `camera_keys` (cameras with files or inline images, sorted: declared ones without are left out); `depth_keys` (those
    of them whose pictures are declared to be depth); `num_episodes`; `contradictions` of its tables.

    Raises:
        UserError: the folder is not such a dataset, or a table of it is missing or malformed.
    """

    def __init__(
        self,
        root: Path,
        *,
        believe: BelieveConfig | None = None,
        tolerance: float = TOLERANCE_S,
        limits: LimitsConfig | None = None,
    ) -> None:
        self.root = Path(root)
        self._believe, self._tolerance, self._limits = believe or BelieveConfig(), tolerance, limits or LimitsConfig()
        info = read_info(self.root, self._limits)
        self.version, self.fps, self.robot_type, self.features = info.version, info.fps, info.robot_type, info.features
        self.tasks = read_tasks(info)
        self._entries = read_episodes(info)
        self._tables: dict[Path, pa.Table] = {}  # v3.0: neighbouring episodes share a file
        self._numbers: dict[Path, np.ndarray] = {}  # the episode_index of its rows
        self._videos: dict[str, tuple[Path, np.ndarray]] = {}
        self._rows_in: dict[int, list[Path]] | None = None
        self._image_keys = self._inline_images()
        self.camera_keys = sorted([*self._image_keys, *self._video_keys()])
        self.depth_keys = [key for key in self.camera_keys if is_depth(self.features[key])]
        if self._believe.fps == "timestamps":
            self.fps = self._measured_fps()
        if tolerance >= 0.5 / self.fps:
            raise UserError(
                f"data.timestamp_tolerance={tolerance:g}: frames at {self.fps:g} fps are {1 / self.fps:g} s apart; "
                "give less than half of that"
            )
        self.contradictions = self._check_tables(info.raw)

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

    def content(self) -> dict[str, Any]:
        """All that its tables say about texts, rows and frames, as JSON values: what is packed depends on it."""
        episodes = [
            [e.index, e.length, e.tasks, self._name(e.data), e.extra, e.dataset_range]
            + [
                [key, self._name(place.path), place.span.start, place.span.to]
                for key, place in sorted(e.videos.items())
            ]
            for e in self._entries
        ]
        return {"episodes": episodes, "tasks": sorted(self.tasks.items())}

    def files(self, cameras: Sequence[str]) -> list[Path]:
        """The files that hold its rows and the pictures of some cameras."""
        videos = {e.videos[camera].path for e in self._entries for camera in cameras if camera in e.videos}
        return sorted({e.data for e in self._entries} | videos)

    def places(self, camera: str) -> set[Path]:
        """The video files of a camera."""
        return {e.videos[camera].path for e in self._entries if camera in e.videos}

    def episode(self, i: int) -> DatasetEpisode:
        """The i-th episode in the order of episode indices.

        Raises:
            UserError: its data file is missing or damaged, does not hold what the tables promise, or there is a
                contradiction that nothing resolves.
            IndexError: there is no such episode.
        """
        episode = self.examine(i)
        refuse([*self.contradictions, *episode.contradictions], self.root)
        return episode

    def examine(self, i: int) -> DatasetEpisode:
        """As `episode`, with contradictions that nothing resolves among the others; the order of such rows is open."""
        if not 0 <= i < self.num_episodes:
            raise IndexError(f"episode {i} asked of {self.num_episodes}")
        entry = self._entries[i]
        where = f"episode {entry.index}"
        rows, files, found = self._rows(entry)
        clock, frame_index = self._clock(rows, entry)
        given = row_checks.check_rows(
            where,
            clock=clock,
            frame_index=frame_index,
            fps=self.fps,
            believe=self._believe,
            tolerance=self._tolerance,
        )
        found += given.contradictions
        clock = clock.take(given.order)
        if not np.array_equal(given.order, np.arange(len(given.order))):
            rows = rows.take(given.order)
        columns = self._columns(rows, entry)
        stored = {name: (str(v.dtype), v.shape[1]) for name, v in columns.items()}
        found += table_checks.check_features(self.features, stored)
        index = whole_numbers(rows, "index", str(entry.data))
        task_index = self._task_index(rows, entry)
        found += row_checks.check_index(where, index, entry.dataset_range)
        found += row_checks.check_tasks(where, task_index, self.tasks, entry.tasks, self._believe)
        row_tasks = None
        if task_index is not None and self._believe.task != "episodes":
            row_tasks = [self.tasks[number] for number in task_index.tolist()]

        def pair(camera: str, place: VideoPlace) -> Pairing:
            return pair_rows(
                f"{where}, {camera}",
                clock=clock,
                frame_index=given.frame_index,
                video=self._video(camera, place.path),
                span=place.span,
                fps=self.fps,
                believe=self._believe,
                tolerance=self._tolerance,
            )

        return DatasetEpisode(
            index=entry.index,
            length=entry.length,
            tasks=[*row_tasks[:1], *(t for t in entry.tasks if t != row_tasks[0])] if row_tasks else list(entry.tasks),
            columns=columns,
            timestamps=clock.seconds,
            extra=dict(entry.extra),
            runs=given.runs,
            contradictions=found,
            data_files=files,
            _videos={key: place for key, place in entry.videos.items() if key in self.camera_keys},
            _images={key: rows[key] for key in self._image_keys},
            _root=self.root,
            _limits=self._limits,
            _row_tasks=row_tasks,
            _pair=pair,
        )

    # --- rows ---

    def _rows(self, entry: EpisodeEntry) -> tuple[pa.Table, tuple[Path, ...], list[Contradiction]]:
        """(the rows of an episode as they lie, the files that hold them, what was found)."""
        where, found = f"episode {entry.index}", []
        files = (entry.data,)
        if self.version != "v3.0":
            table = self._table(entry.data)
            column = whole_numbers(table, "episode_index", str(entry.data))
            found += row_checks.check_episode_index(where, entry.index, column, self._believe)
        else:
            there = os.path.isfile(entry.data)
            mine = self._mine(entry.data, entry.index) if there else np.empty(0, np.int64)
            if len(mine) != entry.length and (files := self._elsewhere(entry)) != (entry.data,):
                parts = [self._table(path).take(self._mine(path, entry.index)) for path in files]
                table, mine = pa.concat_tables(parts, promote_options="default"), np.arange(sum(map(len, parts)))
                said = {
                    "the table of episodes": f"says {self._name(entry.data)}",
                    "the rows": f"are in {' and '.join(map(self._name, files))}",
                }
                found.append(Contradiction("data_file", where, said, "the rows, by their episode_index"))
            else:
                table = self._table(entry.data)
            together = len(mine) and np.diff(mine).max(initial=1) == 1
            table = table.slice(mine[0], len(mine)) if together else table.take(mine)
        check_frames(entry.length, f"{entry.data}: episode {entry.index}", self._limits)
        if table.num_rows != entry.length or entry.length < 1:
            raise UserError(
                f"{entry.data}: holds {table.num_rows} rows of episode {entry.index}, whose length is {entry.length} "
                "in the table of episodes; one of the two is damaged or from another version of the dataset"
            )
        return table, files, found

    def _table(self, path: Path) -> pa.Table:
        if path not in self._tables:
            self._tables = {path: read_table(path, self._limits)}
        return self._tables[path]

    def _mine(self, path: Path, episode: int) -> np.ndarray:
        """The rows of an episode in a file of several."""
        if path not in self._numbers:
            column = whole_numbers(self._table(path), "episode_index", str(path))
            if column is None:
                raise UserError(f"{path}: has no episode_index column; restore the file")
            self._numbers = {path: column}
        return np.flatnonzero(self._numbers[path] == episode)

    def _elsewhere(self, entry: EpisodeEntry) -> tuple[Path, ...]:
        """The files that hold rows of an episode, by their own word: converters have named a neighbour."""
        if self._rows_in is None:
            self._rows_in = defaultdict(list)
            for path in sorted({e.data for e in self._entries} | self._data_files()):
                for number in self._episodes_in(path).tolist() if os.path.isfile(path) else ():
                    self._rows_in[number].append(path)
        return tuple(self._rows_in.get(entry.index, [entry.data]))

    def _clock(self, rows: pa.Table, entry: EpisodeEntry) -> tuple[Clock, np.ndarray | None]:
        if "timestamp" not in rows.column_names:
            raise UserError(f"{entry.data}: has no timestamp column; every LeRobot dataset has one: restore the file")
        clock = read_clock(rows["timestamp"], f"{entry.data}: column 'timestamp'")
        return clock, whole_numbers(rows, "frame_index", str(entry.data))

    def _columns(self, rows: pa.Table, entry: EpisodeEntry) -> dict[str, np.ndarray]:
        columns = {}
        for name in rows.column_names:
            if (values := numbers(rows[name], f"{entry.data}: column {name!r}")) is not None:
                columns[name] = values
        columns.setdefault("frame_index", np.arange(entry.length, dtype=np.int64)[:, None])
        for name, value in entry.extra.items():
            if not isinstance(value, str) and name not in columns:
                columns[name] = np.full((entry.length, 1), value)
        return columns

    def _task_index(self, rows: pa.Table, entry: EpisodeEntry) -> np.ndarray | None:
        column = whole_numbers(rows, "task_index", str(entry.data))
        if column is not None and (unknown := np.setdiff1d(column, list(self.tasks))).size:
            raise UserError(
                f"{entry.data}: task_index {unknown[0]} is not in the table of tasks of {self.root}; restore it"
            )
        return column

    def _measured_fps(self) -> float:
        """The rate of the first episode whose rows tell one."""
        for entry in self._entries:
            try:
                clock, frame_index = self._clock(self._rows(entry)[0], entry)
            except UserError:
                continue  # told when that episode is read
            order = np.argsort(clock.since if frame_index is None else frame_index, kind="stable")
            fps = row_checks.measured_fps(clock.take(order), None if frame_index is None else frame_index[order])
            if fps is not None:
                return fps
        raise UserError(f"data.believe.fps=timestamps: {self.root}: no episode's timestamps tell a rate; use info")

    # --- tables and pictures ---

    def _check_tables(self, info: dict[str, Any]) -> list[Contradiction]:
        found = table_checks.check_totals(info, self._entries, len(self.tasks), self._believe)
        if abs(self.fps / info["fps"] - 1) > row_checks.RATE:
            said = {"meta/info.json": f"says {info['fps']:g} fps", "timestamp": f"says {self.fps:g} fps"}
            found.append(Contradiction("fps", "meta", said, "timestamps"))
        declared = [key for key, feature in self.features.items() if feature["dtype"] in ("video", "image")]
        found += table_checks.check_cameras(declared, self.camera_keys)
        if strange := self._unlisted():
            said = {"data": f"holds {self._name(strange[0])}", "the table of episodes": "names it for no episode"}
            more = f", and {len(strange) - 1} more" if len(strange) > 1 else ""
            found.append(Contradiction("unlisted", f"data{more}", said, "the table of episodes: left out"))
        for camera in self._video_keys():
            parts: dict[Path, list] = defaultdict(list)
            for entry in self._entries if self.version == "v3.0" else ():
                if camera in entry.videos:
                    parts[entry.videos[camera].path].append((entry.index, entry.videos[camera].span))
            for path in sorted(parts):
                found += check_parts(camera, parts[path], 1 / self.fps, self._believe)
        return found

    def _video(self, camera: str, path: Path) -> np.ndarray:
        """Seconds of a video's frames; neighbouring episodes share a file."""
        if camera not in self._videos or self._videos[camera][0] != path:
            self._videos[camera] = (path, frame_times(path, limits=self._limits))
        return self._videos[camera][1]

    def _video_keys(self) -> list[str]:
        keys = sorted({key for entry in self._entries for key in entry.videos})
        return [k for k in keys if any(os.path.isfile(e.videos[k].path) for e in self._entries if k in e.videos)]

    def _inline_images(self) -> list[str]:
        declared = [key for key, feature in self.features.items() if feature["dtype"] == "image"]
        if not declared or not self._entries:
            return []
        names = column_names(self._entries[0].data)
        return [key for key in declared if key in names]

    def _unlisted(self) -> list[Path]:
        """Data files with rows of no episode of the table."""
        strange = sorted(self._data_files() - {entry.data for entry in self._entries})
        if self.version != "v3.0":
            return strange
        known = [entry.index for entry in self._entries]
        return [path for path in strange if not np.isin(self._episodes_in(path), known).all()]

    def _episodes_in(self, path: Path) -> np.ndarray:
        """The numbers of the episodes that a file of several has rows of."""
        if "episode_index" not in column_names(path):
            return np.empty(0, np.int64)
        return np.unique(
            whole_numbers(read_table(path, self._limits, columns=["episode_index"]), "episode_index", str(path))
        )

    def _data_files(self) -> set[Path]:
        """The parquet files that are there, wherever the table of episodes says that they are."""
        return set(self.root.glob("data/*/*.parquet"))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def is_depth(feature: dict[str, Any]) -> bool:
    """Whether a camera's pictures are declared to be depth, in the words of any version of LeRobot."""
    notes = [feature, *(feature[name] for name in ("info", "video_info") if isinstance(feature.get(name), dict))]
    return any(note.get(name) is True for note in notes for name in ("is_depth_map", "video.is_depth_map"))
