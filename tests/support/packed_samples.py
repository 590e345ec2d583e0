"""Samples of a shard folder as they lie there, read without the loader."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.files.video import decode_mp4
from dataloaders.shards import read_index, read_shard


@dataclass
class Packed:
    """One sample; `arrays` are its .npy members by name, as `action`, `latents`, `context_text`."""

    key: str
    shard: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    mp4: bytes

    @property
    def frames(self) -> np.ndarray:
        return decode_mp4(self.mp4)


def packed_samples(folder: Path) -> list[Packed]:
    index, out = read_index(folder), []
    for shard in index.shards:
        for raw in read_shard(folder, shard):
            arrays = {k[:-4]: np.load(io.BytesIO(v)) for k, v in raw.items() if k.endswith(".npy")}
            out.append(Packed(raw["__key__"], shard.name, json.loads(raw["json"]), arrays, raw["mp4"]))
    return out


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Content of every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)))
