"""Columns of the tables as numpy arrays, in their own precision. Shapes: T rows, dim numbers in each."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataloaders.consistency.rows import Clock
from kairos_train.basics.errors import UserError

_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def numbers(column: pa.ChunkedArray, where: str) -> np.ndarray | None:
    """(T, dim): float16, float32, float64, int64 or bool; None for text, images and other things that are no numbers.

    Raises:
        UserError: rows without a value, or vectors of different lengths.
    """
    if not _of_numbers(column.type):
        return None
    array = _plain(column)
    length, kind = len(array), array.type
    while _is_list(kind):
        if array.null_count:
            raise UserError(f"{where} has rows without a value; every frame needs one")
        if not pa.types.is_fixed_size_list(kind) and len(pc.unique(array.value_lengths())) > 1:
            raise UserError(f"{where} has vectors of different lengths; every frame needs the same")
        array = array.flatten()
        kind = array.type
    if pa.types.is_decimal(kind):
        array, kind = array.cast(pa.float64()), pa.float64()
    if array.null_count:
        raise UserError(f"{where} has missing values; every frame needs one")
    values = array.to_numpy(zero_copy_only=False)
    values = values.reshape(length, len(values) // max(length, 1))
    return values.astype(np.int64) if np.issubdtype(values.dtype, np.integer) else values


def whole_numbers(table: pa.Table, name: str, where: str) -> np.ndarray | None:
    """A column of counts, int64 (T,); None where the table has none. Tables that pandas has merged have them as floats.

    Raises:
        UserError: it holds something else.
    """
    if name not in table.column_names:
        return None
    values = numbers(table[name], f"{where}: column {name!r}")
    fits = values is not None and values.shape[1:] == (1,)
    if not fits or not (np.isfinite(values) & (np.abs(values) < 2.0**63) & (values == np.floor(values))).all():
        raise UserError(f"{where}: column {name!r} is {table[name].type}; every row needs one whole number: restore it")
    return values[:, 0].astype(np.int64)


def read_clock(column: pa.ChunkedArray, where: str) -> Clock:
    """The timestamps of rows: seconds as numbers, or times of any unit.

    Raises:
        UserError: they are neither, or rows lack one.
    """
    array, unit = _plain(column), 1.0
    if pa.types.is_timestamp(array.type) or pa.types.is_duration(array.type):
        unit = _UNITS[array.type.unit]
        array = array.cast(pa.int64())
    values = numbers(pa.chunked_array([array]), where)
    if values is None or values.shape[1:] != (1,):
        raise UserError(f"{where} is {column.type}; every row needs one number of seconds: restore the file")
    values = values[:, 0]
    with np.errstate(invalid="ignore", over="ignore"):
        exact = not np.issubdtype(values.dtype, np.floating)
        wide = values if exact else values.astype(np.float64)
        since = (wide - wide[0]).astype(np.float64) * unit  # of whole numbers exactly, whatever their size
        resolution = 0.0 if exact else float(np.spacing(np.abs(values).max()))
    return Clock(float(values[0]) * unit, since, resolution, str(values.dtype))


def text_of(value: object) -> str | None:
    """A cell as text: bytes are UTF-8; None for a missing one.

    Raises:
        ValueError: bytes in another encoding.
    """
    if value is None or value != value:  # pandas' missing text is a NaN
        return None
    return value.decode() if isinstance(value, bytes) else str(value)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _of_numbers(kind: pa.DataType) -> bool:
    """Whether a column holds numbers, or lists of them."""
    while _is_list(kind):
        kind = kind.value_type
    number = pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)
    return number or pa.types.is_boolean(kind)


def _plain(column: pa.ChunkedArray) -> pa.Array:
    """One array."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
