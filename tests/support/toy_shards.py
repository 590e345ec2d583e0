"""Shard folders for tests of the loader: small, numbered samples, without a dataset behind them."""

import io
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataloaders.config import DataConfig, SourceConfig, WindowConfig
from dataloaders.files.video_encoder import encode_mp4
from dataloaders.loading.cursor import LoaderShard
from dataloaders.loading.loader import ShardLoader
from dataloaders.shards import INDEX, ShardIndex, sample_block, write_shard
from kairos_train.basics.files import write_json

WINDOW = WindowConfig(frames=5, action_video_freq_ratio=1, height=32, width=32)


def npy(value) -> bytes:
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


def toy_members(number: int, *, encoded: bool = True, clip: bytes = b"no video") -> dict[str, bytes]:
    """Members of a sample whose every value is its number."""
    meta = {"text": f"do {number}", "task": f"{number}", "episode": number, "start": 0, "dataset": "toy", "fps": 10.0}
    meta |= {"valid_actions": 4 - number % 3, "valid_frames": 5}
    members = {
        "json": json.dumps(meta).encode(),
        "action.npy": npy(np.full((4, 3), number, np.float32)),
        "state.npy": npy(np.full((1, 2), number, np.float32)),
        "mp4": clip,
    }
    if encoded:
        members["latents.npy"] = npy(np.full((16, 2, 4, 4), number, np.float16))
        members["context.npy"] = npy(np.full((3 + number % 4, 6), number, np.float16))
    return members


def toy_key(number: int, name: str = "toy") -> str:
    return f"{name}-{number:06d}-000000"


def write_folder(folder: Path, counts: list[int], members=toy_members, *, name: str = "toy", **index) -> Path:
    """Shards of the given sample counts, samples numbered through. `index`: entries that are not the toy's."""
    return _write(folder, [[None] * n for n in counts], lambda number, _: members(number), name, index)


def write_clips(
    folder: Path, runs: list[list[tuple[int, int, int, int]]], *, name: str = "clip", frames: bool = False
) -> Path:
    """Shards of encoded clips without actions; per shard the runs (frames, height, width, samples).

    With `frames` there is a video too, each sample of a brightness of its own.
    """
    rows = [[run[:3] for run in shard for _ in range(run[3])] for shard in runs]
    members = _video_members if frames else _clip_members
    return _write(folder, rows, members, name, {"action_dim": 0, "state_dim": 0}, runs)


def _video_members(number: int, shape: tuple[int, int, int]) -> dict[str, bytes]:
    clip = io.BytesIO()
    encode_mp4(clip, np.full((*shape, 3), 10 * (number % 20), np.uint8), 10.0)
    return _clip_members(number, shape) | {"mp4": clip.getvalue()}


def _clip_members(number: int, shape: tuple[int, int, int]) -> dict[str, bytes]:
    frames, height, width = shape
    latents = np.full((16, (frames - 1) // 4 + 1, height // 8, width // 8), number % 100, np.float16)
    meta = {"text": f"clip {number}", "frames": frames, "height": height, "width": width}
    context = np.full((2 + number % 3, 6), number % 100, np.float16)
    return {"json": json.dumps(meta).encode(), "latents.npy": npy(latents), "context.npy": npy(context)}


def _write(folder: Path, rows: list[list], members, name: str, changes: dict, runs: list | None = None) -> Path:
    folder.mkdir(parents=True)
    shards, number = [], 0
    for i, row in enumerate(rows):
        blocks = [sample_block(toy_key(number + j, name), members(number + j, what)) for j, what in enumerate(row)]
        info = write_shard(folder / f"shard-{i:06d}.tar", blocks)
        shards.append(replace(info, shapes=[list(run) for run in runs[i]]) if runs else info)
        number += len(row)
    index = ShardIndex(
        folder=folder,
        samples=number,
        window=WINDOW,
        prompt_template="{task}",
        action_dim=3,
        state_dim=2,
        fps=10.0,
        encoders=None,
        tasks=[],
        source={},
        shards=tuple(shards),
    )
    write_json(folder / INDEX, replace(index, **changes).to_dict())
    return folder


def toy_loader(
    source: Path | str | Sequence[SourceConfig],
    *,
    batch_size: int = 4,
    accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    **changes: Any,
) -> ShardLoader:
    """A loader of a folder or of several sources. `changes`: of `DataConfig`, and further arguments of the loader."""
    where = {"sources": list(source)} if isinstance(source, Sequence) and not isinstance(source, str) else {}
    settings = {"shards": str(source), "workers": 0, "shuffle_buffer": 5, "max_corrupt": 1.0, **where, **changes}
    names = {field.name for field in fields(DataConfig)}
    data = DataConfig(**{name: value for name, value in settings.items() if name in names})
    others = {name: value for name, value in settings.items() if name not in names}
    share = LoaderShard(batch_size, accumulation, rank, world_size)
    return ShardLoader(data, share, **{"seed": 1, "with_frames": False} | others)


def take(loader, count: int) -> list:
    return [next(loader) for _ in range(count)]


def assert_same(got: list, wanted: list) -> None:
    """Batches are equal in every key, value, type and tensor."""
    assert [b.keys for b in got] == [b.keys for b in wanted]
    for g, w in zip(got, wanted, strict=True):
        for name, value in vars(w).items():
            found = getattr(g, name)
            if isinstance(value, torch.Tensor):
                assert found.dtype == value.dtype, name
                assert torch.equal(found, value), name
            else:
                assert found == value, name


def keys_of(batches) -> list[str]:
    return [key for batch in batches for key in batch.keys]
