"""Small LeRobot datasets as others write them, whose frames tell their number, and what is read of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataloaders.config import WindowConfig
from dataloaders.files.video import decode_mp4
from dataloaders.files.video_encoder import encode_mp4
from dataloaders.shards import read_index, read_shard

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
FPS = 10
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
WINDOW = WindowConfig(frames=5, action_video_freq_ratio=1, stride=1, height=32, width=32)
COLUMNS = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


def numbered(numbers: Sequence[int], camera: int = 0) -> np.ndarray:
    """Pictures of 8 light and dark blocks: 6 bits of the number, 2 of the camera; uint8 (T, 32, 32, 3)."""
    codes = np.asarray(numbers, np.int64) + 64 * camera
    grid = (codes[:, None] >> np.arange(8) & 1).reshape(-1, 2, 4).astype(np.uint8) * 219 + 16
    return np.repeat(np.kron(grid, np.ones((1, 16, 8), np.uint8))[..., None], 3, axis=3)


def codes_in(frames: np.ndarray) -> list[int]:
    """What `numbered` pictures (T, 32, 32, 3) tell: number + 64 * camera."""
    blocks = frames.astype(float).mean(-1).reshape(-1, 2, 16, 4, 8)[:, :, 4:12, :, 2:6].mean((2, 4)).reshape(-1, 8)
    return ((blocks > 128) @ (1 << np.arange(8))).tolist()


def numbers_in(frames: np.ndarray) -> list[int]:
    """The numbers of the first camera's pictures."""
    return [code % 64 for code in codes_in(frames[:, :, :32])]


def samples_of(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """(episode, start) -> its JSON with `shows`, the numbers of its frames, and its `action` and `state`."""
    out = {}
    index = read_index(folder)
    for shard in index.shards:
        for raw in read_shard(folder, shard):
            meta = json.loads(raw["json"]) | {"shows": numbers_in(decode_mp4(raw["mp4"]))}
            meta |= {name: np.load(io.BytesIO(raw[f"{name}.npy"])) for name in ("action", "state")}
            out[meta["episode"], meta["start"]] = meta
    return out


def rows(length: int, episode: int = 0, first: int = 0, **columns: Any) -> pa.Table:
    """Rows of an episode: state of row i is [i, i + 1], its action half more; `columns` replace or, None, remove."""
    i = np.arange(length)
    table: dict[str, Any] = {
        "observation.state": pa.array([[float(k), k + 1.0] for k in i], pa.list_(pa.float32())),
        "action": pa.array([[k + 0.5, k + 1.5] for k in i], pa.list_(pa.float32())),
        "timestamp": pa.array((i / FPS).astype(np.float32)),
        "frame_index": pa.array(i),
        "episode_index": pa.array(np.full(length, episode)),
        "index": pa.array(first + i),
        "task_index": pa.array(np.zeros(length, np.int64)),
    }
    return pa.table({name: value for name, value in (table | columns).items() if value is not None})


def write_v21(
    root: Path,
    tables: Sequence[pa.Table] | None = None,
    *,
    shown: Sequence[int] | None = None,
    video_fps: float = FPS,
    cameras: Sequence[str] = (FRONT,),
    inline: bool = False,
    tasks: Sequence[dict] = ({"task_index": 0, "task": "pick"},),
    told: Sequence[str] = ("pick",),
    **info: Any,
) -> Path:
    """A dataset of version 2.1.

    Args:
        tables: the rows of each episode.
        shown: the numbers of the frames of every video, or inline; by default one for each row.
        tasks: lines of the table of tasks.
        told: the tasks of each episode, by the table of episodes.
        info: entries of info.json that differ.
    """
    tables = [rows(20)] if tables is None else tables
    for episode, table in enumerate(tables):
        for number, camera in enumerate(cameras):
            pictures = numbered(range(table.num_rows) if shown is None else shown, number)
            if inline:
                cells = [{"bytes": _png(picture), "path": None} for picture in pictures]
                kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
                table = table.append_column(camera, pa.array(cells, kind))
            else:
                path = root / f"videos/chunk-000/{camera}/episode_{episode:06d}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                encode_mp4(path, pictures, video_fps)
        path = root / f"data/chunk-000/episode_{episode:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
    lengths = [table.num_rows for table in tables]
    about = _info("v2.1", lengths, cameras, "image" if inline else "video") | {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": None
        if inline
        else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta/info.json").write_text(json.dumps(about | info))
    write_lines(root / "meta/tasks.jsonl", tasks)
    episodes = [{"episode_index": e, "tasks": list(told), "length": n} for e, n in enumerate(lengths)]
    write_lines(root / "meta/episodes.jsonl", episodes)
    return root


def write_v30(
    root: Path,
    lengths: Sequence[int] = (8, 10, 7),
    *,
    file_of: Callable[[int], Sequence[int]] = lambda e: [0],
    told_file: Callable[[int], int] = lambda e: 0,
    change: Callable[[dict], dict] = lambda row: row,
    tables: Sequence[pa.Table] | None = None,
    **info: Any,
) -> Path:
    """A dataset of version 3.0: one video; frame numbers count through the whole of it.

    Args:
        file_of: the data files that the rows of an episode lie in, in equal parts.
        told_file: what the table of episodes says of that.
        change: of an episode's row of the table.
    """
    table_of, files, first = [], {}, 0
    for e, length in enumerate(lengths):
        table = rows(length, e, first) if tables is None else tables[e]
        parts = file_of(e)
        bounds = [k * table.num_rows // len(parts) for k in range(len(parts) + 1)]
        for file, start, end in zip(parts, bounds, bounds[1:]):
            files.setdefault(file, []).append(table.slice(start, end - start))
        place = {
            "chunk_index": 0,
            "file_index": 0,
            "from_timestamp": first / FPS,
            "to_timestamp": (first + length) / FPS,
        }
        row = {"episode_index": e, "tasks": ["pick"], "length": length, "data/chunk_index": 0}
        row |= {"data/file_index": told_file(e), "dataset_from_index": first, "dataset_to_index": first + length}
        table_of.append(change(row | {f"videos/{FRONT}/{name}": value for name, value in place.items()}))
        first += length
    for file, parts in files.items():
        path = root / f"data/chunk-000/file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(parts), path)
    video = root / f"videos/{FRONT}/chunk-000/file-000.mp4"
    video.parent.mkdir(parents=True)
    encode_mp4(video, numbered(range(first)), FPS)
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(table_of), root / "meta/episodes/chunk-000/file-000.parquet")
    pq.write_table(pa.table({"task_index": [0], "task": ["pick"]}), root / "meta/tasks.parquet")
    about = _info("v3.0", lengths, (FRONT,), "video") | {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    (root / "meta/info.json").write_text(json.dumps(about | info))
    return root


def write_lines(path: Path, values: Sequence[dict], *, encoding: str = "utf-8") -> None:
    """JSON lines whose texts are written as they are."""
    path.write_bytes("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values).encode(encoding))


def _info(version: str, lengths: Sequence[int], cameras: Sequence[str], kind: str) -> dict[str, Any]:
    features = {name: {"dtype": "float32", "shape": [2], "names": None} for name in ("observation.state", "action")}
    features |= {camera: {"dtype": kind, "shape": [32, 32, 3], "names": None} for camera in cameras}
    features |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in COLUMNS.items()}
    return {
        "codebase_version": version,
        "robot_type": "arm",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": 1,
        "chunks_size": 1000,
        "fps": FPS,
        "splits": {"train": f"0:{len(lengths)}"},
        "features": features,
    }


def _png(picture: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()
