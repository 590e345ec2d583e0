"""Samples of a WebDataset tar, one after the other, whatever its headers say.

A sample is told by its key, `dir/000123` in `dir/000123.mp4`; its members lie side by side. Nothing is unpacked to the
disk, a member's name is a name only, and no more is read than `data.limits` allows: a header of 512 bytes may promise
an exabyte, and stand behind thousands that describe it.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dataloaders.config import LimitsConfig
from dataloaders.files.urls import open_url
from kairos_train.basics.errors import one_line
from kairos_train.basics.foreign_files import is_lfs_pointer

_MEMBER = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]+)")
_LONGEST_NAME = 4096  # characters
_HEADER_BYTES, _HEADER_READS = 1 << 18, 100  # of what may stand before a member: its long name, its attributes


def tar_samples(
    path: Path | str, limits: LimitsConfig | None = None, *, unfinished: bool = False
) -> Iterator[tuple[str, dict[str, bytes] | str]]:
    """(key, members by extension, or why they cannot be used) of one tar; a damaged rest is the last of them.

    Args:
        unfinished: give the sample before a damaged header, too, which may lack members.
    """
    most = (limits or LimitsConfig()).member_bytes
    key, members, seen, size = None, {}, set(), 0
    try:
        with open_url(path) as file:
            end = file.seek(0, io.SEEK_END)
            file.seek(0)
            headers = _Headers(file)
            with tarfile.open(fileobj=headers, mode="r:") as tar:
                for member in tar:
                    headers.reads = 0
                    if member.size < 0:  # tarfile would go back to what it has read, for ever
                        raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                    if member.isdir():
                        continue
                    if (match := _plain(member)) is None:
                        yield member.name, "is no plain file with a plain relative name"
                        continue
                    if match[1] != key:
                        if key is not None:
                            yield key, members
                        key, members, size = match[1], {}, 0
                        if key in seen:
                            members = "is in its tar a second time"
                        seen.add(key)
                    if tar.offset > end:
                        raise tarfile.ReadError(f"{member.name} does not end in the file")
                    size += member.size
                    if isinstance(members, dict) and member.issparse():
                        members = f"has a sparse member {match[2]}, which says more bytes than there are"
                    if isinstance(members, dict) and match[2] in members:
                        members = f"has its member {match[2]} twice"
                    if isinstance(members, dict) and size > most:
                        members = f"has members of more than {most:,} bytes, which data.limits.member_mb allows"
                    if isinstance(members, dict):
                        file.seek(member.offset_data)
                        members[match[2]] = file.read(member.size)
                    tar.members.clear()  # else the headers of a large tar pile up
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE).strip(b"\0") or file.tell() != tar.offset + tarfile.BLOCKSIZE:
                    if unfinished and key is not None:
                        yield key, members
                        key = "behind it"
                    raise tarfile.ReadError("it ends without a tar's end mark")  # tarfile itself stops there in silence
        if key is not None:
            yield key, members
    except (MemoryError, ImportError):
        raise  # the machine's fault, not the tar's
    except Exception as error:  # tarfile raises whatever it likes on damaged headers
        if key is None and _is_pointer(path):
            yield "its start", "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
        else:
            yield key or "its start", f"this and what follows cannot be read ({one_line(error)}): restore the tar"


class _Headers:
    """A file of which tarfile reads the headers alone, and only such as there may be."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell
        self.reads = 0  # since the last member

    def read(self, size: int) -> bytes:
        self.reads += 1
        if size > _HEADER_BYTES or self.reads > _HEADER_READS:
            raise tarfile.ReadError("the headers of a member are too long or too many")
        return self._file.read(size)


def _plain(member: tarfile.TarInfo) -> re.Match[str] | None:
    """(key, extension) of a plain file's name."""
    path = member.name
    usual = member.isfile() and len(path) <= _LONGEST_NAME
    return _MEMBER.fullmatch(path) if usual and ".." not in path.split("/") and not path.startswith("/") else None


def _is_pointer(path: Path | str) -> bool:
    try:
        with open_url(path) as file:
            return is_lfs_pointer(file.read(128))
    except OSError:
        return False
