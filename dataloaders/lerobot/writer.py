"""Writing LeRobot v3.0 datasets, file for file and column for column as the lerobot package does (0.4.4).

Differences are all within the format: quantiles are exact, each video file is one encoding with a key frame at the
start of every episode, and episodes may carry values of the caller's (`extra`, for instance the seed) as further
columns of the table of episodes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataloaders.files.video_encoder import CODECS, Mp4Encoder
from dataloaders.lerobot.layout import (
    DATA_PATH,
    EPISODE_COLUMNS,
    EPISODES_PATH,
    FRAME_FEATURES,
    INFO_PATH,
    STATS_PATH,
    TASKS_PATH,
    VIDEO_PATH,
)
from dataloaders.lerobot.stats import STATISTICS, number_statistics, picture_histogram, picture_statistics
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import new_folder

CHUNK_FILES = 1000  # most files of a chunk folder
DATA_FILE_MB = 100
VIDEO_FILE_MB = 200
_EPISODES_PER_FILE = 5000  # about 30 MB of statistics, well below DATA_FILE_MB
_MB = 1024 * 1024


class LeRobotWriter:
    """Context manager that collects episodes; the dataset folder appears when the block ends without an exception.

    Args:
        root: folder to create; it must not exist.
        fps: frames per second.
        robot_type: free text.
        cameras: height and width in pixels (even numbers) by camera key.
        state_names, action_names: one name per dimension.
        codec: "h264" or "av1" (LeRobot's default, larger here).

    Raises:
        UserError: the folder exists, the codec is unknown, or (on leaving) no episode was added.
    """

    def __init__(
        self,
        root: Path,
        *,
        fps: float,
        robot_type: str,
        cameras: dict[str, tuple[int, int]],
        state_names: list[str],
        action_names: list[str],
        codec: str = "h264",
    ) -> None:
        self.root = Path(root)
        if self.root.exists():
            raise UserError(f"{self.root} exists; datasets are not overwritten: remove it or name another folder")
        if codec not in CODECS:
            raise UserError(f"codec is {codec!r}; it must be one of {', '.join(CODECS)}")
        self.fps, self.robot_type, self.codec = fps, robot_type, codec
        self._vectors = {"observation.state": list(state_names), "action": list(action_names)}
        self._cameras = dict(cameras)
        self._rows: list[dict[str, Any]] = []
        self._tasks: dict[str, int] = {}
        self._frames = 0
        self._numbers: dict[str, list[np.ndarray]] = {}
        self._histograms = {key: np.zeros((3, 256), np.int64) for key in cameras}
        self._extra_keys: tuple[str, ...] | None = None
        self._folder = new_folder(self.root)

    def __enter__(self) -> LeRobotWriter:
        self._partial = self._folder.__enter__()
        self._schema = self._data_schema()
        self._data = _DataFiles(self._partial, self._schema)
        self._videos = {key: _VideoFiles(self._partial, key, self.fps, self.codec) for key in self._cameras}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for files in (self._data, *self._videos.values()):
                files.close()
            if kind is None:
                self._finish()
        except BaseException:
            self._folder.__exit__(*sys.exc_info())
            raise
        self._folder.__exit__(kind, error, trace)

    def add_episode(
        self,
        frames: dict[str, np.ndarray],
        state: np.ndarray,
        action: np.ndarray,
        task: str,
        extra: dict[str, bool | int | float | str] | None = None,
    ) -> None:
        """Append one episode of T > 0 frames.

        Args:
            frames: uint8 (T, H, W, 3) by camera key.
            state, action: (T, number of names), finite; stored as float32.
            task: its instruction.
            extra: further values of the episode; every episode must bring the same names.

        Raises:
            UserError: something above does not hold.
        """
        index = len(self._rows)
        length = len(action)
        columns = {"observation.state": np.asarray(state, np.float32), "action": np.asarray(action, np.float32)}
        self._check(frames, columns, length, task, extra or {})
        rows = np.arange(length, dtype=np.int64)
        columns |= {
            "timestamp": (rows / self.fps).astype(np.float32),
            "frame_index": rows,
            "episode_index": np.full(length, index, np.int64),
            "index": self._frames + rows,
            "task_index": np.full(length, self._tasks.setdefault(task, len(self._tasks)), np.int64),
        }
        data_place = self._data.add(columns)
        row: dict[str, Any] = {"episode_index": index, "tasks": [task], "length": length}
        row |= {"data/chunk_index": data_place[0], "data/file_index": data_place[1]}
        row |= {"dataset_from_index": self._frames, "dataset_to_index": self._frames + length}
        for key, files in self._videos.items():
            row |= files.add(frames[key])
        row |= self._statistics(frames, columns, length)
        self._rows.append(row | (extra or {}))
        self._frames += length

    def _check(self, frames: dict, columns: dict[str, np.ndarray], length: int, task: str, extra: dict) -> None:
        where = f"{self.root}: episode {len(self._rows)}"
        if length < 1:
            raise UserError(f"{where}: has no frames; leave it out")
        if not isinstance(task, str) or not task.strip():
            raise UserError(f"{where}: task is {task!r}; every episode needs an instruction")
        for key, names in self._vectors.items():
            if columns[key].shape != (length, len(names)):
                raise UserError(
                    f"{where}: {key} is {columns[key].shape}; {length} frames and names need {(length, len(names))}"
                )
            if not np.isfinite(columns[key]).all():
                raise UserError(f"{where}: {key} holds values that are not finite; fix or drop the episode")
        if set(frames) != set(self._cameras):
            raise UserError(
                f"{where}: has pictures of {sorted(frames)}; the dataset has cameras {sorted(self._cameras)}"
            )
        for key, size in self._cameras.items():
            if frames[key].shape != (length, *size, 3) or frames[key].dtype != np.uint8:
                raise UserError(
                    f"{where}: {key} is {frames[key].dtype} {frames[key].shape}; it must be uint8 {(length, *size, 3)}"
                )
        if self._extra_keys is None:
            self._extra_keys = tuple(extra)
        if set(extra) != set(self._extra_keys) or any("/" in key or key in EPISODE_COLUMNS for key in extra):
            raise UserError(
                f"{where}: extra has {sorted(extra)}; every episode needs the first one's names "
                f"{sorted(self._extra_keys)}, without '/' and other than LeRobot's own"
            )

    def _statistics(self, frames: dict, columns: dict[str, np.ndarray], length: int) -> dict[str, Any]:
        row = {}
        for key in self._cameras:
            histogram = picture_histogram(frames[key])
            self._histograms[key] += histogram
            row |= {f"stats/{key}/{name}": v for name, v in picture_statistics(histogram, length).items()}
        for key, values in columns.items():
            rows = values.reshape(length, -1)
            self._numbers.setdefault(key, []).append(rows)
            row |= {f"stats/{key}/{name}": v for name, v in number_statistics(rows).items()}
        return row

    def _finish(self) -> None:
        if not self._rows:
            raise UserError(f"{self.root}: no episode was added; there is nothing to write")
        self._write_episodes()
        self._write_tasks()
        stats = {key: picture_statistics(h, self._frames) for key, h in self._histograms.items()}
        stats |= {key: number_statistics(np.concatenate(parts)) for key, parts in self._numbers.items()}
        (self._partial / STATS_PATH).write_text(json.dumps(stats, indent=4))
        (self._partial / INFO_PATH).write_text(json.dumps(self._info(), indent=4))
        if self.root.exists():
            raise UserError(f"{self.root} appeared while it was being written; remove it or name another folder")

    def _info(self) -> dict[str, Any]:
        fps = int(self.fps) if float(self.fps).is_integer() else self.fps
        features: dict[str, Any] = {key: self._video_feature(key, fps) for key in self._cameras}
        for key, names in self._vectors.items():
            features[key] = {"dtype": "float32", "shape": [len(names)], "names": names}
        features |= {key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in FRAME_FEATURES.items()}
        return {
            "codebase_version": "v3.0",
            "robot_type": self.robot_type,
            "total_episodes": len(self._rows),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": DATA_FILE_MB,
            "video_files_size_in_mb": VIDEO_FILE_MB,
            "fps": fps,
            "splits": {"train": f"0:{len(self._rows)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self._cameras else None,
            "features": features,
        }

    def _video_feature(self, key: str, fps: float) -> dict[str, Any]:
        height, width = self._cameras[key]
        return {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": height,
                "video.width": width,
                "video.codec": self.codec,
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": fps,
                "video.channels": 3,
                "has_audio": False,
            },
        }

    def _data_schema(self) -> pa.Schema:
        """Columns of the data files, with the note by which the `datasets` package recognises their types."""
        fields, features = [], {}
        for key, names in self._vectors.items():
            fields.append(pa.field(key, pa.list_(pa.float32(), len(names))))
            features[key] = {"feature": {"dtype": "float32", "_type": "Value"}, "length": len(names), "_type": "List"}
        for key, dtype in FRAME_FEATURES.items():
            fields.append(pa.field(key, pa.type_for_alias(dtype)))
            features[key] = {"dtype": dtype, "_type": "Value"}
        note = {"info": {"features": features}}
        note["fingerprint"] = hashlib.sha256(json.dumps(note).encode()).hexdigest()[:16]
        return pa.schema(fields, metadata={"huggingface": json.dumps(note)})

    def _write_episodes(self) -> None:
        for number, first in enumerate(range(0, len(self._rows), _EPISODES_PER_FILE)):
            chunk, file = divmod(number, CHUNK_FILES)
            path = self._partial / EPISODES_PATH.format(chunk_index=chunk, file_index=file)
            place = {"meta/episodes/chunk_index": chunk, "meta/episodes/file_index": file}
            rows = [row | place for row in self._rows[first : first + _EPISODES_PER_FILE]]
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows, schema=self._episode_schema()), path)

    def _episode_schema(self) -> pa.Schema:
        picture, whole, real = pa.list_(pa.list_(pa.list_(pa.float64()))), pa.list_(pa.int64()), pa.list_(pa.float64())
        types: dict[str, pa.DataType] = {
            "episode_index": pa.int64(),
            "tasks": pa.list_(pa.string()),
            "length": pa.int64(),
        }
        for name in ("data/chunk_index", "data/file_index", "dataset_from_index", "dataset_to_index"):
            types[name] = pa.int64()
        for key in self._cameras:
            types |= {f"videos/{key}/{name}": pa.int64() for name in ("chunk_index", "file_index")}
            types |= {f"videos/{key}/{name}": pa.float64() for name in ("from_timestamp", "to_timestamp")}
        for key in (*self._cameras, *self._vectors, *FRAME_FEATURES):
            of_key = picture if key in self._cameras else real
            types |= {f"stats/{key}/{name}": whole if name == "count" else of_key for name in STATISTICS}
            if FRAME_FEATURES.get(key) == "int64":
                types |= {f"stats/{key}/{name}": whole for name in ("min", "max")}
        for name in self._extra_keys or ():
            types[name] = pa.array([row[name] for row in self._rows]).type
        for name in ("meta/episodes/chunk_index", "meta/episodes/file_index"):
            types[name] = pa.int64()
        return pa.schema(types.items())

    def _write_tasks(self) -> None:
        """A table as pandas stores a frame of task indices whose row labels are the task strings."""
        columns = [
            {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
            {"name": None, "field_name": "__index_level_0__", "pandas_type": "object", "numpy_type": "str"},
        ]
        labels = {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "str"}
        note = {
            "index_columns": ["__index_level_0__"],
            "column_indexes": [labels | {"metadata": {"encoding": "UTF-8"}}],
            "columns": [column | {"metadata": None} for column in columns],
            "attributes": {},
            "creator": {"library": "pyarrow", "version": pa.__version__},
            "pandas_version": "3.0.0",  # whose conventions these are
        }
        fields = [("task_index", pa.int64()), ("__index_level_0__", pa.large_string())]
        schema = pa.schema(fields, metadata={"pandas": json.dumps(note)})
        arrays = [list(self._tasks.values()), list(self._tasks)]
        table = pa.table([pa.array(a, f[1]) for a, f in zip(arrays, fields)], schema=schema)
        pq.write_table(table, self._partial / TASKS_PATH)


class _DataFiles:
    """Parquet files of frames, a row group per episode; a new file once one has reached its size."""

    def __init__(self, root: Path, schema: pa.Schema) -> None:
        self._root, self._schema = root, schema
        self._number = -1
        self._writer: pq.ParquetWriter | None = None
        self._path = root

    def add(self, columns: dict[str, np.ndarray]) -> tuple[int, int]:
        """Append an episode's columns; (chunk, file) that they went to."""
        if self._writer is None or self._path.stat().st_size >= DATA_FILE_MB * _MB:
            self.close()
            self._number += 1
            chunk, file = divmod(self._number, CHUNK_FILES)
            self._path = self._root / DATA_PATH.format(chunk_index=chunk, file_index=file)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._path, self._schema)
        arrays = [_arrow(columns[field.name], field.type) for field in self._schema]
        self._writer.write_table(pa.table(arrays, schema=self._schema))
        return divmod(self._number, CHUNK_FILES)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _VideoFiles:
    """MP4 files of one camera, many episodes in each; a new file once one has reached its size."""

    def __init__(self, root: Path, key: str, fps: float, codec: str) -> None:
        self._root, self._key, self._fps, self._codec = root, key, fps, codec
        self._number = -1
        self._encoder: Mp4Encoder | None = None

    def add(self, frames: np.ndarray) -> dict[str, Any]:
        """Append an episode's pictures, uint8 (T, H, W, 3); its columns of the table of episodes."""
        if self._encoder is None or self._encoder.bytes >= VIDEO_FILE_MB * _MB:
            self.close()
            self._number += 1
            chunk, file = divmod(self._number, CHUNK_FILES)
            path = self._root / VIDEO_PATH.format(video_key=self._key, chunk_index=chunk, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._encoder = Mp4Encoder(path, self._fps, codec=self._codec)
        first = self._encoder.frames
        self._encoder.add(frames)
        chunk, file = divmod(self._number, CHUNK_FILES)
        return {
            f"videos/{self._key}/chunk_index": chunk,
            f"videos/{self._key}/file_index": file,
            f"videos/{self._key}/from_timestamp": first / self._fps,
            f"videos/{self._key}/to_timestamp": self._encoder.frames / self._fps,
        }

    def close(self) -> None:
        if self._encoder is not None:
            self._encoder.close()
            self._encoder = None


def _arrow(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind.value_type), type=kind)
    return pa.array(values, kind)
