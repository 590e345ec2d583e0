"""Tensors → one safetensors file, one tensor at a time, hashed on the way.

The format (github.com/huggingface/safetensors): eight bytes of header length, little-endian; the header, JSON from
tensor name to dtype, shape and place, padded with spaces; the tensors' bytes, row-major, one after the other. Written
here and not by the library, which wants all tensors in memory at once and leaves the hash to a second reading.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8  # of the first tensor; the largest element type comes first, so that all are aligned


class Stored(NamedTuple):
    """A tensor to be written: what it will be, and how to get it when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Stored:
        """A tensor that is there already."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None) -> dict:
    """Write a file and wait until it is on the disk.

    Args:
        path: the file.
        tensors: by name, of any device.
        metadata: text for the header.

    Returns:
        {"bytes": size of the file, "sha256": its digest}.

    Raises:
        OSError: it can not be written.
        ValueError: `load` gave something else than was announced.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for content in (_header(tensors, names, metadata), *(tensors[name] for name in names)):
            data = content if isinstance(content, bytes) else _bytes_of(content)
            file.write(data)
            digest.update(data)
            size += len(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _header(tensors: Mapping[str, Stored], names: list[str], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name in names:
        tensor = tensors[name]
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.nbytes],
        }
        place += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(stored: Stored) -> memoryview:
    tensor = stored.load().detach().cpu().contiguous()
    if tensor.dtype != stored.dtype or tuple(tensor.shape) != stored.shape:
        raise ValueError(f"{tensor.dtype} {tuple(tensor.shape)} came where {stored.dtype} {stored.shape} was announced")
    return tensor.reshape(-1).view(torch.uint8).numpy().data
