"""LeRobot datasets of two episodes, one of which wants memory or what lies elsewhere. Used by attack.py and the tests.

A `Damage` changes a good dataset in its folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from attack_parts.clips import hollow, image, video

CAMERA = "observation.images.top"
FRAMES = 9
Damage = Callable[[Path], Any]


def dataset(root: Path, damage: Damage) -> Path:
    """A dataset of version 2.1, a file per episode, that is then damaged."""
    steps = np.arange(FRAMES)
    for episode in range(2):
        (root / "videos" / CAMERA).mkdir(parents=True, exist_ok=True)
        (root / "videos" / CAMERA / f"{episode}.mp4").write_bytes(video(FRAMES))
        columns = {
            "observation.state": pa.array([[float(k), k + 1.0] for k in steps], pa.list_(pa.float32())),
            "action": pa.array([[k + 0.5, k + 1.5] for k in steps], pa.list_(pa.float32())),
            "timestamp": pa.array((steps / 10).astype(np.float32)),
        }
        whole = {"frame_index": steps, "episode_index": np.full(FRAMES, episode), "task_index": 0 * steps}
        (root / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns | {name: pa.array(v) for name, v in whole.items()}), data_file(root, episode))
    (root / "meta").mkdir()
    vector = {"dtype": "float32", "shape": [2]}
    features = {"observation.state": vector, "action": vector, CAMERA: {"dtype": "video", "shape": [64, 96, 3]}}
    places = {"data_path": "data/{episode_index}.parquet", "video_path": "videos/{video_key}/{episode_index}.mp4"}
    about = {"codebase_version": "v2.1", "fps": 10, "features": features, "total_episodes": 2, **places}
    (root / "meta/info.json").write_text(json.dumps(about))
    (root / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "push"}\n')
    told = [{"episode_index": episode, "length": FRAMES, "tasks": ["push"]} for episode in range(2)]
    (root / "meta/episodes.jsonl").write_text("".join(f"{json.dumps(values)}\n" for values in told))
    damage(root)
    return root


def data_file(root: Path, episode: int) -> Path:
    """The rows of an episode."""
    return root / f"data/{episode}.parquet"


def column(name: str, make: Callable[[], pa.Array], **options: Any) -> Damage:
    """A further column of the second episode, or another one in the place of its own; options of the writer."""

    def damage(root: Path) -> None:
        table = pq.read_table(data_file(root, 1))
        table = table.drop_columns([name]) if name in table.column_names else table
        pq.write_table(table.append_column(name, make()), data_file(root, 1), **options)

    return damage


def rows(make: Callable[[], pa.Table], **options: Any) -> Damage:
    """Another table in the place of the second episode's."""
    return lambda root: pq.write_table(make(), data_file(root, 1), **options)


def info(**changes: Any) -> Damage:
    """Entries of info.json; a value that is a text `JSON:…` is written as it is."""

    def damage(root: Path) -> None:
        text = json.dumps(json.loads((root / "meta/info.json").read_text()) | changes)
        for value in changes.values():
            if isinstance(value, str) and value.startswith("JSON:"):
                text = text.replace(json.dumps(value), value.removeprefix("JSON:"))
        (root / "meta/info.json").write_text(text)

    return damage


def episode(**changes: Any) -> Damage:
    """Entries of the second episode in the table of episodes; values as for `info`."""

    def damage(root: Path) -> None:
        first, second = (root / "meta/episodes.jsonl").read_text().splitlines()
        text = json.dumps(json.loads(second) | changes)
        for value in changes.values():
            if isinstance(value, str) and value.startswith("JSON:"):
                text = text.replace(json.dumps(value), value.removeprefix("JSON:"))
        (root / "meta/episodes.jsonl").write_text(f"{first}\n{text}\n")

    return damage


def many_episodes(count: int) -> Damage:
    """A table of episodes that are not there but for the first two."""

    def damage(root: Path) -> None:
        row = '{"episode_index": %d, "length": 9, "tasks": ["push"]}\n'
        (root / "meta/episodes.jsonl").write_text("".join(row % number for number in range(count)))

    return damage


def hole(name: str, size: int) -> Damage:
    """A file that is one hole."""
    return lambda root: hollow(name, size)(root)


# --- large from little ---


def zeros(count: int) -> pa.Table:
    """Numbers that are all the same, in runs: a few bytes as a file."""
    return pa.table({"timestamp": pa.array(np.zeros(count))})


def many_zeros(count: int) -> Damage:
    """As `zeros`, of more rows than should be in memory here."""

    def damage(root: Path) -> None:
        part = zeros(10_000_000)
        with pq.ParquetWriter(data_file(root, 1), part.schema, compression="zstd") as writer:
            for _ in range(count // part.num_rows):
                writer.write_table(part)

    return damage


def vector_of_zeros(count: int) -> pa.Array:
    """One row of many numbers, and others of one."""
    offsets = pa.array([0, count, *range(count + 1, count + FRAMES)], pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(np.zeros(count + FRAMES - 1)))


def one_text(count: int, length: int) -> pa.Table:
    """Rows of one text, which the file has once."""
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), ["x" * length])
    return pa.table({"timestamp": pa.array(np.zeros(count)), "note": texts})


def other_texts(length: int) -> pa.Array:
    """A text of its own in each row; each is one letter."""
    return pa.array([chr(97 + row) * length for row in range(FRAMES)])


def list_of_one_text(count: int, length: int) -> pa.Array:
    """Rows of lists of one text, which the file has once; the first list is long."""
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count + FRAMES - 1, np.int32)), ["x" * length])
    offsets = pa.array([0, count, *range(count + 1, count + FRAMES)], pa.int32())
    return pa.ListArray.from_arrays(offsets, texts)


def late_nan() -> pa.Array:
    """Timestamps whose last is no number."""
    return pa.array(np.where(np.arange(FRAMES) == FRAMES - 1, np.nan, np.arange(FRAMES) / 10))


# --- elsewhere ---


def linked_videos(root: Path) -> None:
    """The folder of the videos is a link out of the dataset."""
    outside = root.with_name(f"{root.name}-outside")
    os.rename(root / "videos", outside)
    (root / "videos").symlink_to(outside, target_is_directory=True)


def linked_picture(root: Path) -> None:
    """An inline picture names a file behind a link out of the dataset."""
    outside = root.with_name(f"{root.name}-outside")
    outside.mkdir()
    (outside / "private.png").write_bytes(image("PNG", 64))
    (root / "link").symlink_to(outside, target_is_directory=True)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    info(features=features | {CAMERA: {"dtype": "image", "shape": [64, 96, 3]}})(root)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for number, cell in enumerate(({"bytes": image("PNG"), "path": None}, {"bytes": None, "path": "link/private.png"})):
        table = pq.read_table(data_file(root, number))
        pq.write_table(table.append_column(CAMERA, pa.array([cell] * FRAMES, kind)), data_file(root, number))
