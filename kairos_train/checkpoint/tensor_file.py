"""One safetensors file, one tensor at a time: written and hashed on the way, or read.

The format (github.com/huggingface/safetensors): eight bytes of header length, little-endian; the header, JSON from
tensor name to dtype, shape and place, padded with spaces; the tensors' bytes, row-major, one after the other. Done
here and not by the library: to write, it wants all tensors in memory at once and leaves the hash to a second reading;
to read, it maps the file, and what was looked at counts as resident memory until the file is closed. What a sound file
is, the library alone says.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kairos_train.basics.errors import MachineFault, UserError, one_line
from kairos_train.basics.foreign_files import check_regular, parse_json, refuse_lfs_pointer

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}
ALIGNMENT = 8  # of the first tensor; the largest element type comes first, so that all are aligned
CHUNK = 2**24  # bytes written at once: each call takes the interpreter's lock from the training loop for a moment
AHEAD = 2**26  # bytes that are kept in memory for hashing when they are written


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


class TensorFile:
    """A safetensors file for reading. What is read is a copy; nothing else of the file stays in memory or open, so that
    a checkpoint may have any number of files.

    Attributes:
        shapes, dtypes: by tensor name.
        metadata: the text in the header.

    Raises:
        UserError: there is no such file, or it is cut off, damaged or of another format: all that the library refuses,
            and a name that stands in the header twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        refuse_lfs_pointer(self.path)
        try:
            check_regular(self.path)
            with safe_open(self.path, "pt"):  # checks types and sizes, and that the tensors fill the file without gaps
                pass
            header, self._start = self._read_header()
            self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
            self.dtypes = {name: DTYPES[info["dtype"]] for name, info in header.items()}
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from None
        except KeyError as error:
            raise UserError(f"{path}: a tensor is of type {error}, must be one of {', '.join(DTYPES)}") from None
        except (SafetensorError, ValueError) as error:
            raise UserError(f"{path}: is no safetensors file ({one_line(error)}); get the file again") from None
        self.shapes = {name: tuple(info["shape"]) for name, info in header.items()}
        self._places = {name: tuple(info["data_offsets"]) for name, info in header.items()}

    def read(self, name: str, slices: Sequence[slice] = ()) -> Tensor:
        """A tensor, or the box `slices` of it (steps of 1, missing dimensions whole), on the CPU.

        Raises:
            UserError: the file ends before it does.
            MachineFault: the disk fails.
        """
        shape = self.shapes[name]
        if not shape:
            return self._read_rows(name, (1,), 0).reshape(())
        first, *rest = (*slices, *[slice(None)] * (len(shape) - len(slices)))
        start, stop, _ = first.indices(shape[0])
        rows = self._read_rows(name, (max(0, stop - start), *shape[1:]), start)
        return rows[(slice(None), *rest)]

    def _read_rows(self, name: str, shape: tuple[int, ...], start: int) -> Tensor:
        """Consecutive rows of a tensor from row `start` on."""
        out = torch.empty(shape, dtype=self.dtypes[name])
        if out.numel() == 0:
            return out
        left = memoryview(out.reshape(-1).view(torch.uint8).numpy())
        at = self._start + self._places[name][0] + start * prod(shape[1:]) * out.element_size()
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(at)
                while left:
                    count = file.readinto(left)
                    if not count:
                        raise UserError(f"{self.path}: ends within tensor {name!r}; get the file again")
                    left = left[count:]
        except OSError as error:
            raise MachineFault(
                f"{self.path}: cannot be read ({error.strerror}); see to the disk, start it again"
            ) from None
        return out

    def _read_header(self) -> tuple[dict[str, Any], int]:
        """The header, and where the tensors begin."""
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return parse_json(file.read(length), most_bytes=length, unique=True), 8 + length


def split_by_size(tensors: Mapping[str, Stored], file_bytes: int) -> Iterator[dict[str, Stored]]:
    """Groups of tensors in their order, each at most `file_bytes` large or of one tensor."""
    group: dict[str, Stored] = {}
    size = 0
    for name, tensor in tensors.items():
        if group and size + tensor.nbytes > file_bytes:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    if group:
        yield group


def counted(tensors: Mapping[str, Stored], report: Callable[[float], None]) -> dict[str, Stored]:
    """The same tensors; each time one is loaded, `report` is called with all megabytes loaded so far."""
    done = 0.0

    def load(stored: Stored) -> Tensor:
        nonlocal done
        tensor = stored.load()
        done += stored.nbytes / 1e6
        report(done)
        return tensor

    return {name: stored._replace(load=partial(load, stored)) for name, stored in tensors.items()}


def write_tensors(
    path: Path,
    tensors: Mapping[str, Stored],
    metadata: Mapping[str, str] | None = None,
    *,
    two_threads: bool = True,
    wait: bool = True,
) -> dict:
    """Write a file and wait until it is on the disk.

    Args:
        path: the file.
        tensors: by name, of any device.
        metadata: text for the header.
        two_threads: hash beside the writing, which is faster; without, one core is enough for both.
        wait: without, `kairos_train.basics.files.sync` is to be called when all of several files are written.

    Returns:
        {"bytes": size of the file, "sha256": its digest}.

    Raises:
        OSError: it can not be written.
        ValueError: `load` gave something else than was announced.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    digest, size, hashed = hashlib.sha256(), 0, deque[tuple[Future, int]]()
    with ThreadPoolExecutor(1) as hasher, open(path, "wb", buffering=0) as file:
        for content in (_header(tensors, names, metadata), *(tensors[name] for name in names)):
            data = memoryview(content) if isinstance(content, bytes) else _bytes_of(content)
            if two_threads:
                hashed.append((hasher.submit(digest.update, data), len(data)))  # one after the other, in this order
            else:
                digest.update(data)
            _write(file, size, data)
            size += len(data)
            while sum(nbytes for _, nbytes in hashed) > AHEAD:
                hashed.popleft()[0].result()
        if wait:
            os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _write(file: io.FileIO, offset: int, data: memoryview) -> None:
    """Append bytes to a file that is `offset` long."""
    for begin in range(0, len(data), CHUNK):
        left = data[begin : begin + CHUNK]
        count = len(left)
        while left:
            left = left[file.write(left) :]
        _start_flow(file.fileno(), offset + begin, count)


def _start_flow(handle: int, offset: int, nbytes: int) -> None:
    """Have the kernel begin to write these bytes to the disk, which so works while the next ones are hashed.

    Left alone it would collect gigabytes and begin at the fsync. What is on the disk already leaves the page cache,
    where the training data are of more use.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, offset, nbytes, os.POSIX_FADV_DONTNEED)


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
