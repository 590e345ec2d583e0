"""How much room a file system has, and how fast it writes and reads."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

CHUNK = 2**22  # bytes


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes per second."""

    write: float  # until the data are on the disk
    read: float  # with this machine's page cache dropped; a file server may still answer out of its memory


def existing_folder(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = Path(folder).absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def free_bytes(folder: Path) -> int:
    """Free bytes, for users without privileges, of the file system of a folder that may still have to be made.

    Raises:
        OSError: it cannot be asked.
    """
    stats = os.statvfs(existing_folder(folder))
    return stats.f_bavail * stats.f_frsize


def measure_speed(folder: Path, nbytes: int) -> DiskSpeed:
    """Write and read a file of `nbytes` in a folder that is there.

    The file has no name from the beginning, so that nothing stays, whatever becomes of this process.

    Raises:
        OSError: it can not be written or read, or was read otherwise than it was written.
    """
    block = os.urandom(CHUNK)  # not compressible; what is read is compared
    blocks = max(1, nbytes // CHUNK)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        begin = time.perf_counter()
        for _ in range(blocks):
            _write_all(file.fileno(), block)
        os.fsync(file.fileno())
        written = time.perf_counter() - begin
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        read = 0.0
        for number in range(blocks):
            begin = time.perf_counter()
            found = _read_all(file.fileno(), number * CHUNK)
            read += time.perf_counter() - begin
            if found != block:
                raise OSError(None, "a file was read otherwise than it was written", str(folder))
    return DiskSpeed(write=blocks * CHUNK / written, read=blocks * CHUNK / max(read, 1e-9))


def _write_all(handle: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]


def _read_all(handle: int, offset: int) -> bytes:
    found = b""
    while len(found) < CHUNK and (part := os.pread(handle, CHUNK - len(found), offset + len(found))):
        found += part
    return found
