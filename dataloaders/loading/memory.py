"""Memory that is used again. Fresh memory is handed out page by page as it is written to, which costs about as much as
reading a sample into it.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import get_worker_info

KEPT = 6
"""Blocks that a `Blocks` keeps: a few batches in use, each with frames or latents."""


class Buffers:
    """Scratch memory for the raw bytes of a batch."""

    def __init__(self) -> None:
        self._buffers: dict[int, np.ndarray] = {}

    def take(self, number: int, size: int) -> np.ndarray:
        """uint8 (size,), valid until the same number is taken again."""
        if number not in self._buffers or len(self._buffers[number]) < size:
            self._buffers[number] = np.empty(size, dtype=np.uint8)
        return self._buffers[number][:size]


class Blocks:
    """Memory of finished batches that nobody holds any more, for later ones.

    A block is handed out as an array over a lease. Every array and tensor made of that array keeps the lease alive,
    however indirectly; when it is gone, nobody can see the memory.
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[np.ndarray, weakref.ref]] = []

    def take(self, size: int) -> np.ndarray:
        """uint8 (size,). It is free again when the last array and tensor over it is gone."""
        free = next((i for i, (b, lease) in enumerate(self._blocks) if len(b) == size and lease() is None), None)
        if free is not None:
            block, _ = self._blocks.pop(free)
        else:
            block = np.empty(size, dtype=np.uint8)
        lease = (ctypes.c_uint8 * size).from_buffer(block)
        self._blocks = [*self._blocks[-(KEPT - 1) :], (block, weakref.ref(lease))]
        return np.frombuffer(lease, np.uint8)


class Rows:
    """Memory for one member of a batch, into which it is read or decoded; in a loader process, shared memory.

    Args:
        shape: (B, …) of the whole.
        dtype: of its numbers.
        blocks: where it comes from outside of a loader process.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, blocks: Blocks) -> None:
        size = math.prod(shape) * dtype.itemsize
        if get_worker_info() is None:
            memory = torch.from_numpy(blocks.take(size))
        else:
            shared = torch.UntypedStorage._new_shared(size, device="cpu")  # as torch's own collate does
            memory = torch.empty(0, dtype=torch.uint8).set_(shared)
        self.whole = memory.view(torch.from_numpy(np.empty(0, dtype)).dtype).view(shape)
        self.rows = self.whole.numpy()

    def bytes_of(self, number: int) -> memoryview:
        """The memory of one row."""
        return memoryview(self.rows[number].reshape(-1).view(np.uint8))

    def hold(self, values: Sequence[np.ndarray | None]) -> bool:
        """Whether these are the rows, in order."""
        return all(
            value is not None
            and (value.ctypes.data, value.shape, value.dtype) == (row.ctypes.data, row.shape, row.dtype)
            and value.flags.c_contiguous
            for row, value in zip(self.rows, values)
        )
