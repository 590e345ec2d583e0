"""Files that appear whole or not at all; JSON, SHA-256 and locks.

What is written here is written beside its place and renamed: a process that is killed leaves the old file or the new
one. One rule for `fsync`: what is never computed again (checkpoints, exported weights) is on the disk before it has its
name, so that it outlives a power cut; its writers say `durable=True`. Nothing else waits for the disk: a report must
not hold up training while a checkpoint is being written.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kairos_train.basics.errors import UserError, one_line
from kairos_train.basics.foreign_files import (
    JSON_BYTES,
    check_regular,
    is_lfs_pointer,
    parse_json,
    pointer_fault,
    read_bytes,
    unmarked,
)

_LONGEST_STEM = 200  # characters of a temporary name that come from the file's: systems allow 255 bytes
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextmanager
def replacing(path: str | Path, *, durable: bool = False, ending: str = ".tmp") -> Iterator[Path]:
    """A temporary path beside `path`: renamed to it when the block ends well, removed when not.

    Args:
        path: of a file; its folder is there.
        durable: be on the disk first, as the rule above says.
        ending: of the temporary name, for libraries that go by it.

    Raises:
        OSError: it cannot be written; `path` is what it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:_LONGEST_STEM]}.{os.getpid()}{ending}")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path`: renamed to it when the block ends well, removed when not.

    What a process of this machine that was killed has left of the same folder is removed first.

    Args:
        path: not there yet; folders above it are made.
        durable: wait for its new name; what is in it is the block's.

    Raises:
        OSError: it cannot be made, or something is there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = beside(path, f"{_prefix(path)}{os.getpid()}.")
    try:
        yield temporary
        os.rename(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already when it has its name


def _prefix(path: Path) -> str:
    """Of this machine's temporary folders of `path`; the process and a random word follow."""
    return f".{path.name[: _LONGEST_STEM // 2]}.{platform.node().split('.')[0]}."


def _remove_leftovers(path: Path) -> None:
    """Temporary folders of `path` whose process, of this machine, is no more."""
    for leftover in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
        process = leftover.name.removeprefix(_prefix(path)).split(".")[0]
        if process.isdigit() and not Path("/proc", process).exists():
            shutil.rmtree(leftover, ignore_errors=True)


def beside(path: str | Path, prefix: str) -> Path:
    """A new empty folder beside `path`, with its name to take; its mode is the umask's, as that of any other folder.

    Args:
        prefix: of its name, which nothing else has.
    """
    folder = Path(path).with_name(prefix + secrets.token_hex(6))  # `tempfile` makes folders for their owner alone
    folder.mkdir()
    return folder


def write_whole(path: str | Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a file, text as UTF-8, as `replacing` does."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, value: Any, *, sort_keys: bool = True, durable: bool = False) -> None:
    """Write a value as JSON in lines, as `write_whole` does.

    Raises:
        TypeError, ValueError: something that JSON cannot hold, NaN among it; nothing is written.
    """
    write_whole(path, json.dumps(value, indent=1, sort_keys=sort_keys, allow_nan=False) + "\n", durable=durable)


def is_plain_name(name: Any) -> bool:
    """Whether this is the name of a file in whatever folder it is read in, and of nothing elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\0"} & set(name)


def read_json(path: str | Path, *, remedy: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: no such file, not JSON within the limits of `parse_json`, or not an object, with `remedy`; or a Git
            LFS pointer.
    """
    try:
        check_regular(path)
        data = read_bytes(path, most_bytes=JSON_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); {remedy}") from error
    if is_lfs_pointer(data):
        raise UserError(pointer_fault(path))
    data = unmarked(data, path)
    try:
        value = parse_json(data.decode())
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({one_line(error)}); {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, must be an object; {remedy}")
    return value


def describe_file(path: str | Path) -> dict[str, Any]:
    """{"bytes": a file's size, "sha256": its digest}, as manifests list it."""
    return {"bytes": os.stat(path).st_size, "sha256": sha256_of(path)}


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: str | Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk.

    Raises:
        OSError: it cannot be written.
    """
    handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: str | Path, *, wait: bool = True) -> Iterator[bool]:
    """Run the block alone among all processes that lock this file; the lock of one that dies is free.

    Args:
        path: of the lock file, which stays.
        wait: until it is free; without, the block runs anyway and is given False where another has it.

    Raises:
        UserError: the file system keeps no locks.
    """
    with open(path, "w") as file:
        mine = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in _HELD:
                raise UserError(f"{path}: cannot be locked ({error.strerror}); use a disk with file locks") from None
            mine = False
        yield mine
