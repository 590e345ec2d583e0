"""numpy arrays in msgpack, as openpi's clients and servers write them. Nothing is ever unpickled or evaluated.

    array    {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [...]}
    scalar   {b"__npgeneric__": True, b"data": number or text, b"dtype": "<f4"}

Elements of kinds V (records), O (Python objects) and c (complex) are refused in both directions.

Read data come from strangers: how many containers a message has, how long and how deep they are is limited, so that a
short message cannot become a large object, and an array is only made when its bytes are there.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgpack
import numpy as np

from kairos_train.basics.errors import UserError, one_line

MAX_CONTAINERS = 256  # maps and lists of one message; an array counts as two
MAX_DEPTH = 8  # of containers within each other
MAX_ENTRIES = 1024  # of one map or list
MAX_TEXT_BYTES = 65536
MAX_AXES = 8

REFUSED_KINDS = "VOc"
_DTYPE = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f(?:2|4|8|16)|[SU][1-9]\d{0,4}|[mM]8\[(?:\d{1,3})?[A-Za-z]{1,2}\])")
_TOO_DEEP = f"message: is nested more than {MAX_DEPTH} deep; send a flat map"
_ARRAY = {b"__ndarray__", b"data", b"dtype", b"shape"}
_SCALAR = {b"__npgeneric__", b"data", b"dtype"}


def encode(value: Any) -> bytes:
    """msgpack of maps, lists, texts, bytes, numbers, None, numpy arrays and numpy scalars.

    Raises:
        UserError: an array or scalar of a refused kind, or a value that is none of these.
    """
    try:
        return msgpack.packb(value, default=_plain)
    except UserError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"message: cannot be written as msgpack ({error}); send maps, lists, numbers and arrays"
        ) from error


def decode(data: bytes) -> Any:
    """The inverse of `encode`. Arrays are read-only views of the message's bytes.

    Raises:
        UserError: not msgpack, cut short, past a limit of this module, or an array whose dtype or size is wrong.
    """
    try:
        value = msgpack.unpackb(
            data,
            strict_map_key=True,  # texts and bytes only: other keys may be unhashable, or made to collide
            max_array_len=MAX_ENTRIES,
            max_map_len=MAX_ENTRIES,
            max_str_len=MAX_TEXT_BYTES,
            max_ext_len=0,
            **_Containers().hooks,
        )
    except UserError:
        raise
    except msgpack.StackError as error:
        raise UserError(_TOO_DEEP) from error
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        reason = one_line(error)
        raise UserError(f"message: is not readable msgpack ({reason}); send one map, packed as openpi does") from error
    _check_depth(value, MAX_DEPTH)
    return value


class _Containers:
    """Counts the containers of one message while they are made, innermost first, and makes arrays of maps."""

    def __init__(self) -> None:
        self._left = MAX_CONTAINERS

    @property
    def hooks(self) -> dict[str, Any]:
        return {"object_pairs_hook": self._map, "list_hook": self._list}

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise UserError(f"message: has more than {MAX_CONTAINERS} maps and lists; send arrays instead of lists")

    def _list(self, values: list[Any]) -> list[Any]:
        self._count()
        return values

    def _map(self, pairs: list[tuple[Any, Any]]) -> Any:
        self._count()
        values = dict(pairs)
        if len(values) != len(pairs):
            raise UserError("message: a map has a key twice; send each once")
        if b"__ndarray__" in values:
            return _array(values)
        return _scalar(values) if b"__npgeneric__" in values else values


def _plain(value: Any) -> dict[bytes, Any]:
    """What msgpack writes in place of a numpy value."""
    if not isinstance(value, np.ndarray | np.generic):
        raise UserError(f"message: cannot hold a {type(value).__name__}; send maps, lists, numbers and arrays")
    if value.dtype.kind in REFUSED_KINDS:
        raise UserError(f"message: cannot hold numpy's dtype {value.dtype}; send numbers, bools or texts")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": list(value.shape)}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def _array(values: dict[Any, Any]) -> np.ndarray:
    """Read-only array of a map that says it is one; its size is compared with its bytes before anything is made."""
    dtype, data, shape = _dtype(values, _ARRAY), values[b"data"], values[b"shape"]
    if not isinstance(data, bytes):
        raise UserError(f"array: data is {type(data).__name__}, must be bytes")
    axes = isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
    if not axes or len(shape) > MAX_AXES or any(not 0 <= n < 2**31 for n in shape):
        raise UserError(f"array: shape must be a list of at most {MAX_AXES} sizes from 0 to 2^31 - 1")
    if (size := math.prod(shape) * dtype.itemsize) != len(data):
        raise UserError(f"array: shape {shape} of {dtype.str} takes {size} bytes, data has {len(data)}")
    try:
        return np.frombuffer(data, dtype).reshape(shape) if data else np.empty(shape, dtype)
    except ValueError as error:  # sizes beside a 0 that overflow numpy's own count
        raise UserError(f"array: shape {shape} cannot be made ({error})") from error


def _scalar(values: dict[Any, Any]) -> np.generic:
    dtype, data = _dtype(values, _SCALAR), values[b"data"]
    if not isinstance(data, bool | int | float | str | bytes):
        raise UserError(f"scalar: data is {type(data).__name__}, must be a number or a text")
    try:
        return dtype.type(data)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"scalar: data does not fit dtype {dtype.str} ({error})") from error


def _dtype(values: dict[Any, Any], fields: set[bytes]) -> np.dtype:
    """dtype of an array or scalar whose map has these fields and no others."""
    what = "array" if b"shape" in fields else "scalar"
    if values.keys() != fields:
        raise UserError(f"{what}: its map must have {', '.join(sorted(f.decode() for f in fields))} and nothing else")
    text = values[b"dtype"]
    # Matched before numpy reads it: numpy's own language of dtypes knows records and objects.
    if not isinstance(text, str) or not _DTYPE.fullmatch(text):
        shown = repr(text[:40]) if isinstance(text, str) else type(text).__name__
        raise UserError(
            f"{what}: dtype {shown} is not accepted; send bool, int, uint, float, text or time in numpy's form"
        )
    try:
        return np.dtype(text)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: dtype {text!r} is not one of numpy's") from error


def _check_depth(value: Any, left: int) -> None:
    """Recursion is bounded by the number of containers."""
    if not isinstance(value, dict | list):
        return
    if left == 0:
        raise UserError(_TOO_DEEP)
    for inner in value.values() if isinstance(value, dict) else value:
        _check_depth(inner, left - 1)
