"""Files by path or URL: local ones, and through fsspec `https://`, `s3://` and what else it has a package for.

A remote file is one stream from the wanted byte on. When the connection breaks or stays silent, it is opened again at
the byte where it broke; only attempts in a row that bring no byte count against `Patience.attempts`. A file that
changes in between is an error.
"""

from __future__ import annotations

import http.client
import io
import os
import re
import shutil
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dataloaders.files.http_files import BUFFER, ChangedFile, http_system
from kairos_train.basics.errors import UserError, one_line
from kairos_train.basics.files import replacing
from kairos_train.basics.foreign_files import shown
from kairos_train.basics.secrets import redacted

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
"""Package by scheme, for the remedy of an error."""
REMOTE = ("https", "http", *PACKAGES)
"""Schemes of files that lie on other machines."""
LOCAL = ("file", "local")
"""Schemes of files of this machine."""

_LONGEST_PAUSE_S = 8.0
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError)  # waiting does not help


@dataclass(frozen=True)
class Patience:
    """How long a silent or failing server is borne with."""

    timeout_s: float = 30.0  # without a byte
    attempts: int = 5  # in a row without a byte
    pause_s: float = 0.5  # before the second attempt; doubles each time, up to 8 s


PATIENT = Patience()


class TooLarge(UserError):
    """A file has more bytes than it may."""


def is_url(path: str | Path) -> bool:
    """Whether `path` has a scheme, like https:// or s3://."""
    return "://" in str(path)


def scheme_of(url: str | Path) -> str:
    """What stands before ://, in small letters."""
    return str(url).partition("://")[0].lower()


def on_this_machine(location: str | Path) -> str | Path:
    """A location, as a path where it is the URL of a local one."""
    local = is_url(location) and scheme_of(location) in LOCAL
    return Path(str(location).partition("://")[2]) if local else location


def refuse_malformed(url: str) -> None:
    """Return unless an http(s) URL is none; names in object stores may be any.

    Raises:
        UserError: it has no host or an impossible one, or characters that are to be written as %20 and the like.
    """
    if scheme_of(url) not in ("http", "https"):
        return
    try:
        split = urllib.parse.urlsplit(url)
        fault = "" if split.netloc else "has no host"
        _ = split.port  # which is looked at here
    except ValueError as error:
        fault = one_line(error)
    if re.search(r"[\x00-\x20\x7f]", url):
        fault = "has a blank or control character, which is written as %20 or the like"
    if fault:
        raise UserError(f"{shown(redacted(url.split(maxsplit=1)[0]))}: is no URL ({fault}); fix it")


def join(base: str | Path, name: str) -> str | Path:
    """The file `name` below the folder `base` (a path or URL; the query of a URL, as in signed ones, stays).

    Raises:
        UserError: `name` is absolute or leads out of the folder.
    """
    parts = name.replace("\\", "/").split("/")
    if (
        not name
        or name.startswith(("/", "\\", "~"))
        or ".." in parts
        or "\0" in name
        or is_url(name)
        or ":" in parts[0]
    ):
        raise UserError(f"{base}: the file name {name!r} leads out of the folder; names must be relative, without '..'")
    if not is_url(base):
        return Path(base) / name
    split = urllib.parse.urlsplit(str(base))
    if split.scheme in ("http", "https"):
        name = urllib.parse.quote(name)
    return urllib.parse.urlunsplit(split._replace(path=f"{split.path.rstrip('/')}/{name}"))


def parent(path: str | Path) -> str | Path:
    """The folder of a file, as `join` takes it."""
    if not is_url(path):
        return Path(path).parent
    split = urllib.parse.urlsplit(str(path))
    return urllib.parse.urlunsplit(split._replace(path=split.path.rpartition("/")[0]))


def base_name(path: str | Path) -> str:
    """The last part of a path or URL; "" for a URL without a path."""
    if not is_url(path):
        return Path(path).name
    place = re.split("[?#]", str(path).partition("://")[2])[0]
    return Path(urllib.parse.unquote(place.partition("/")[2])).name


def reason_of(error: OSError) -> str:
    """Why a file cannot be read, without its name where the system's message holds it."""
    text = error.strerror or str(error)
    return text.partition(": ")[2] if is_url(text.partition(": ")[0]) else text


def open_url(path: str | Path, patience: Patience = PATIENT) -> BinaryIO:
    """A seekable binary reader of a file by path or URL.

    Raises (here and while reading):
        UserError: no package for the scheme.
        FileNotFoundError, PermissionError: the file is not there, or not for us.
        OSError: it cannot be reached or read to its end; one line, naming the URL.
    """
    if not is_url(path):
        return open(path, "rb")
    return io.BufferedReader(_Reader(str(path), patience), BUFFER)


def read_url(path: str | Path, patience: Patience = PATIENT, *, most_bytes: int | None = None) -> bytes:
    """The whole file.

    Raises (beside what `open_url` raises):
        TooLarge: it has more than `most_bytes`.
    """
    with open_url(path, patience) as file:
        return file.read(_checked_size(path, file, most_bytes))


def _checked_size(path: str | Path, file: BinaryIO, most_bytes: int | None) -> int:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if most_bytes is not None and size > most_bytes:
        raise TooLarge(f"{path}: has {size} bytes, more than the {most_bytes} that are taken")
    return size


def read_range(path: str | Path, start: int, end: int, patience: Patience = PATIENT) -> bytes:
    """Bytes [start, end) of a file, fewer where it ends before; of a remote one no more are asked for.

    Raises as `open_url` does.
    """
    if not is_url(path):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(end - start)
    with _Reader(str(path), patience, end) as reader:
        reader.seek(start)
        out = bytearray()
        while data := reader.read(min(end - start - len(out), BUFFER)):
            out += data
        return bytes(out)


def size_of(path: str | Path, patience: Patience = PATIENT) -> int:
    """Bytes of a file. Raises as `open_url` does."""
    if not is_url(path):
        return os.stat(path).st_size
    reader = _Reader(str(path), patience)
    try:
        return reader.size
    finally:
        reader.close()


def download(path: str | Path, target: Path, patience: Patience = PATIENT, *, most_bytes: int | None = None) -> None:
    """Copy a file to `target`, which appears when it is complete. Raises as `read_url` does."""
    with replacing(target) as part, open_url(path, patience) as source, part.open("wb") as file:
        _checked_size(path, source, most_bytes)
        shutil.copyfileobj(source, file, BUFFER)


class _Reader(io.RawIOBase):
    """A remote file that survives broken connections. Opened at the first use; `end`: nothing behind is asked for."""

    def __init__(self, url: str, patience: Patience, end: int | None = None) -> None:
        super().__init__()
        self._url, self._patience, self._end = url, patience, end
        self._system, self._path = _file_system(url, patience, end)
        self._file: Any = None
        self._identity: tuple[Any, ...] | None = None  # size, and the tag of a version where there is one
        self._position = 0  # of the reader
        self._at = 0  # of the open file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size if whence == io.SEEK_END else 0}
        self._position = max(base[whence] + offset, 0)
        return self._position

    @property
    def size(self) -> int:
        if self._identity is None:
            self._tried(self._open)
        return self._identity[0]

    def readinto(self, buffer: Any) -> int:
        return self._tried(lambda: self._read(memoryview(buffer)))

    def close(self) -> None:
        self._drop()
        super().close()

    def _tried(self, action: Callable[[], int | None]) -> int | None:
        """`action()`, again after a pause while it fails in a way that may pass."""
        pause, failed, last = self._patience.pause_s, 0, ""
        while failed < self._patience.attempts:
            if failed:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            try:
                return action()
            except (*_FINAL, ChangedFile) as error:
                self._drop()
                raise type(error)(f"{redacted(self._url)}: {one_line(error)}") from None
            except (OSError, http.client.HTTPException, EOFError) as error:
                self._drop()
                failed, last = failed + 1, one_line(error)
        place = f"{redacted(self._url)}: cannot be read at byte {self._position}"
        raise OSError(f"{place} after {failed} attempts ({last})")

    def _read(self, buffer: memoryview) -> int:
        if self._identity is not None and self._position >= self._limit():
            return 0
        while self._file is not None and self._at < self._position <= self._at + BUFFER:  # nearer than a new connection
            skipped = len(self._file.read(self._position - self._at))
            self._at += skipped
            if not skipped:
                break
        if self._file is None or self._at != self._position:
            self._open()
        left = max(self._limit() - self._position, 0)
        data = self._file.read(min(len(buffer), left))
        if left and not data:
            raise EOFError(f"the connection ended {left} bytes early")
        buffer[: len(data)] = data
        self._position += len(data)
        self._at = self._position
        return len(data)

    def _limit(self) -> int:
        return self._identity[0] if self._end is None else min(self._identity[0], self._end)

    def _open(self) -> None:
        self._drop()
        file = self._system.open(self._path, "rb", block_size=BUFFER)
        try:
            file.seek(self._position)
            identity = (file.size, getattr(file, "tag", None))
        except BaseException:
            file.close()
            raise
        if self._identity not in (None, identity):
            file.close()
            raise ChangedFile("changed while it was being read")
        self._identity, self._file, self._at = identity, file, self._position

    def _drop(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _file_system(url: str, patience: Patience, end: int | None) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the file's name in it."""
    scheme = scheme_of(url)
    refuse_malformed(url)
    if scheme in ("http", "https"):
        return http_system(patience.timeout_s, end), url
    if "::" in url:  # fsspec would open one through the other
        raise UserError(f"{url}: is an address made of several; give that of the file itself")
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    if scheme in ("s3", "s3a"):
        timeouts = dict.fromkeys(("connect_timeout", "read_timeout"), patience.timeout_s)
        options = {"config_kwargs": timeouts}
    try:
        return url_to_fs(url, **options)
    except ImportError as error:
        package = PACKAGES.get(scheme)
        remedy = f"pip install {package}" if package else "install the package that fsspec names"
        raise UserError(f"{url}: {scheme}:// needs a package that is not installed ({error}); {remedy}") from error
    except ValueError as error:
        raise UserError(f"{url}: cannot be opened ({error}); use a path, https:// or s3://") from error
