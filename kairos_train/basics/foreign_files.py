"""Files as others leave them: the one place where bytes of strangers become text, JSON, numbers and names.

Text in its encoding, Git LFS pointers in the place of content, and values that are what they are taken for: whatever
the bytes, there is a value within bounds or a `ValueError` (`UserError` is one) that says what is wrong, in one line.
Media, tables and tars have readers of their own, with limits from `dataloaders.config.LimitsConfig`.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import math
import os
import reprlib
import stat
from collections.abc import Iterator
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

from kairos_train.basics.errors import UserError

JSON_BYTES = 16_000_000
"""Most of one JSON value: its objects take up to thirty times as much."""
JSON_DEPTH = 32
"""How deep objects and lists of JSON may lie in each other."""
_LARGEST = 2**63 - 1
_DIGITS = 64  # of a whole number; longer ones become float64, as in other readers of JSON

_POINTER = b"version https://git-lfs.github.com/spec/"
_MARKS = {  # byte order marks; those of UTF-32 begin like those of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def is_lfs_pointer(data: bytes | memoryview) -> bool:
    """Whether the first bytes of a file are those of a Git LFS pointer: a clone without git-lfs has such small texts
    in the place of its large files."""
    return bytes(data[: len(_POINTER)]) == _POINTER


def refuse_lfs_pointer(path: Path | str) -> None:
    """Return unless a local file, or one directly in a local folder, is a Git LFS pointer; what cannot be read is left
    to its reader.

    Raises:
        UserError: it is one.
    """
    path, inside = Path(path), []
    with contextlib.suppress(OSError):
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in inside:
        if holds_lfs_pointer(file):
            raise UserError(pointer_fault(file))


def holds_lfs_pointer(path: Path | str) -> bool:
    """Whether a local file can be read and is a Git LFS pointer."""
    if not os.path.isfile(path):  # opening a pipe would wait for a writer
        return False
    try:
        with open(path, "rb") as file:
            return is_lfs_pointer(file.read(len(_POINTER)))
    except OSError:
        return False


def pointer_fault(name: Path | str) -> str:
    """What an error says of a pointer that is called `name`."""
    return f"{name}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"


def read_text(path: Path, *, most_bytes: int = JSON_BYTES) -> str:
    """The text of a file: UTF-8, or what its byte order mark says.

    Raises:
        UserError: it cannot be read, is too large, a Git LFS pointer or in another encoding.
    """
    try:
        data = read_bytes(path, most_bytes=most_bytes)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); restore it") from error
    return decode_text(data, path)


def read_bytes(path: Path | str, *, most_bytes: int) -> bytes:
    """The content of a file, of which no more is read than it may have.

    Raises:
        OSError: it cannot be read.
        UserError: it is larger.
    """
    with open(path, "rb") as file:
        large = os.fstat(file.fileno()).st_size > most_bytes
        data = b"" if large else file.read(most_bytes + 1)
    if large or len(data) > most_bytes:
        raise UserError(f"{path}: has more than {most_bytes:,} bytes; restore it")
    return data


def check_regular(path: Path | str) -> None:
    """Return if there is a regular file: opening a pipe would wait for a writer that never comes.

    Raises:
        OSError: there is none, or it cannot be looked at.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))


def decode_text(data: bytes, name: Path | str) -> str:
    """As `read_text`, of bytes; `name` is what errors call them."""
    if is_lfs_pointer(data):
        raise UserError(pointer_fault(name))
    data = unmarked(data, name)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        byte, line = data[error.start], data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}: is not UTF-8 (byte 0x{byte:02x} in line {line}; Latin-1 or Windows-1252?); convert it to UTF-8"
        ) from error
    if "\0" in text:
        raise UserError(f"{name}: is not UTF-8 (it holds null bytes; UTF-16?); convert it to UTF-8")
    return text


def unmarked(data: bytes, name: Path | str) -> bytes:
    """A text in UTF-8 that may have a byte order mark, or in what its mark says -> in UTF-8, without it.

    Raises:
        UserError: it is not in the encoding of its mark; `name` is what errors call it.
    """
    encoding = next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), None)
    if encoding is None:
        return data
    try:
        return data.removeprefix(codecs.BOM_UTF8) if encoding == "utf-8-sig" else data.decode(encoding).encode()
    except UnicodeDecodeError as error:
        said = f"begins as {encoding.upper()} and is not ({error.reason})"
        raise UserError(f"{name}: {said}; convert it to UTF-8") from error


# --- values ---


def parse_json(
    data: bytes | memoryview | str, *, most_bytes: int = JSON_BYTES, depth: int = JSON_DEPTH, unique: bool = False
) -> Any:
    """The value that a JSON text holds. NaN and infinities pass, for the check of what is read from them.

    Args:
        data: UTF-8 where it is bytes.
        most_bytes: of the text.
        depth: of objects and lists in each other.
        unique: refuse an object that has a key twice; without, its last value counts.

    Raises:
        ValueError: no JSON, or beyond a limit; one line.
    """
    if len(data) > most_bytes:
        raise ValueError(f"has more than {most_bytes:,} bytes of JSON")
    data = bytes(data) if isinstance(data, memoryview) else data
    try:
        value = json.loads(data, parse_int=_parse_int, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError(f"is nested deeper than {depth}") from None
    opened = ("[", "{") if isinstance(data, str) else (b"[", b"{")
    if sum(map(data.count, opened)) > depth and _deeper(value, depth):
        raise ValueError(f"is nested deeper than {depth}")
    return value


def json_lines(
    data: bytes, name: Path | str, *, most_bytes: int = JSON_BYTES, depth: int = JSON_DEPTH
) -> Iterator[tuple[int, Any, str]]:
    """(line number, value, "" or what is wrong with it) of every line of JSON lines that is not blank.

    Args:
        data: UTF-8, or what its byte order mark says.
        name: what errors call it.
        most_bytes, depth: of one line, as for `parse_json`.

    Raises:
        UserError: it is not in the encoding of its mark.
    """
    for number, line in enumerate(_lines(unmarked(data, name), most_bytes), 1):
        value, fault = None, ""
        try:
            text = line if len(line) > most_bytes else line.decode()  # what has been cut has perhaps half a character
            if not text.strip():
                continue
            value = parse_json(text, most_bytes=most_bytes, depth=depth)
        except UnicodeDecodeError as error:
            byte = f"byte 0x{line[error.start]:02x} in line {number}; Latin-1 or Windows-1252?"
            fault = f"is not UTF-8 ({byte}); convert it to UTF-8"
        except ValueError as error:
            fault = f"is not JSON ({error})"
            if b"\0" in line:
                fault = "is not UTF-8 (it holds null bytes; UTF-16?); convert it to UTF-8"
        yield number, value, fault


def finite(value: Any, name: str) -> float:
    """A number, or a text that says one, as float64.

    Raises:
        ValueError: it is none, or not finite there; `name` is what errors call it.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} is {shown(value)}; it must be a number")
    return number


def whole(value: Any, name: str) -> int:
    """A count as an int from 0 to 2^63 - 1: a whole number of any type.

    Raises:
        ValueError: as `finite` does.
    """
    known = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    with suppress(ArithmeticError):  # of a Decimal that is no number
        if known and 0 <= value <= _LARGEST and int(value) == value:
            return int(value)
    raise ValueError(f"{name} is {shown(value)}; it must be a whole number of 0 or more")


def refuse_half_characters(text: str, name: str) -> None:
    """Return unless a text holds what no encoding of Unicode can, as JSON may escape it.

    Raises:
        ValueError: it does; `name` is what errors call it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a character ({shown(text[error.start])})") from None


def shown(value: Any) -> str:
    """A value as errors show it: its repr, cut short, in one line."""
    return _SHORT.repr(value)


def one_plain_line(text: str, most: int) -> str:
    """`text` as a line of a list or log: printable, without line breaks, of up to `most` characters, 16 at least;
    longer ones are shortened in the middle."""
    if len(text) > 4 * most:
        text = text[: 2 * most] + text[-2 * most :]
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    end = most // 4
    return line if len(line) <= most else " ".join(f"{line[: most - end - 3]} … {line[-end:]}".split())


def _lines(data: bytes, most: int) -> Iterator[bytes]:
    """One at a time, too long ones cut behind `most` bytes. Not splitlines: a text may hold what that takes for the end
    of a line."""
    start = 0
    while start <= len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        yield data[start : min(end, start + most + 1)]
        start = end + 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"has the key {shown(next(name for name in names if names.count(name) > 1))} twice")
    return value


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) <= _DIGITS else float(digits)


def _deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects lie deeper in each other than `depth`, without recursion."""
    level = [value]
    for _ in range(depth):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, list | dict)]
        level = [item for part in parts for item in part]
    return any(isinstance(part, list | dict) for part in level)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 3
