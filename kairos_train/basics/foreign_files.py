"""Files as others leave them: text in its encoding, and Git LFS pointers in the place of content."""

from __future__ import annotations

import codecs
from pathlib import Path

from kairos_train.basics.errors import UserError

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
    path = Path(path)
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if holds_lfs_pointer(file):
            raise UserError(pointer_fault(file))


def holds_lfs_pointer(path: Path | str) -> bool:
    """Whether a local file can be read and is a Git LFS pointer."""
    try:
        with open(path, "rb") as file:
            return is_lfs_pointer(file.read(len(_POINTER)))
    except OSError:
        return False


def pointer_fault(name: Path | str) -> str:
    """What an error says of a pointer that is called `name`."""
    return f"{name}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"


def read_text(path: Path) -> str:
    """The text of a file: UTF-8, or what its byte order mark says.

    Raises:
        UserError: it cannot be read, is a Git LFS pointer or in another encoding.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); restore it") from error
    return decode_text(data, path)


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
