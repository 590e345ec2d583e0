"""Arrays out of .npy files without a copy: as many bytes as the header says, or none. Pickled content is refused."""

from __future__ import annotations

import io
import math
from functools import lru_cache

import numpy as np

from kairos_train.basics.errors import one_line

NPY_HEADER = 128
"""Bytes before the data in every .npy file of few dimensions."""
_LONGEST = 100  # characters of what numpy says


def read_npy(file: bytes | memoryview, rest: bytes | memoryview | None = None) -> np.ndarray:
    """The array of a .npy file of version 1.0.

    Args:
        file: all of it, or its header alone.
        rest: its data, in the second case.

    Raises:
        ValueError: another version, pickled objects, or more or fewer bytes than the header says.
    """
    dtype, shape, fortran, offset = _header(bytes(file[:NPY_HEADER]))
    data = file
    if rest is not None:
        data, offset = rest, offset - len(file)
        if offset:
            raise ValueError(f"has a header of another length than {NPY_HEADER} bytes")
    count = math.prod(shape)
    if len(data) - offset != count * dtype.itemsize:
        raise ValueError(f"holds {len(data) - offset} bytes of data, its header says {count * dtype.itemsize}")
    return np.frombuffer(data, dtype, count, offset).reshape(shape, order="F" if fortran else "C")


@lru_cache(maxsize=1024)
def _header(head: bytes) -> tuple[np.dtype, tuple[int, ...], bool, int]:
    """Type, shape, order and offset of the data, from a file's first bytes: they repeat from sample to sample."""
    file = io.BytesIO(head)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("is a .npy file of a version other than 1.0")
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # numpy raises whatever its parsers do
        raise ValueError(f"has a header that cannot be read ({one_line(error)[:_LONGEST]})") from error
    if dtype.hasobject:
        raise ValueError("holds pickled objects")
    return dtype, shape, fortran, file.tell()
