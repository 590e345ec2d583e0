"""HTTP files on the standard library, as fsspec wants them: fsspec's own need aiohttp.

User and password of a URL become a header that no redirection takes along; a redirection leads to HTTP alone.
"""

from __future__ import annotations

import base64
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

BUFFER = 1 << 20
"""Bytes that are read at once."""
_ASCII = "".join(map(chr, range(0x21, 0x7F)))


class ChangedFile(OSError):
    """A remote file is not the one it was when reading began."""


def http_system(timeout_s: float, end: int | None) -> Any:
    """An fsspec file system of HTTP files.

    Args:
        timeout_s: without a byte.
        end: nothing behind this byte is asked for; None: all.
    """
    from fsspec import AbstractFileSystem

    class HttpFileSystem(AbstractFileSystem):
        protocol = ("http", "https")
        cachable = False

        def _open(self, path: str, mode: str = "rb", **ignored: Any) -> _HttpFile:
            return _HttpFile(path, timeout_s, end)

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return path

    return HttpFileSystem()


class _HttpFile:
    """One answer to a GET from a byte on, up to `end`; `size` and `tag` are the whole file's."""

    def __init__(self, url: str, timeout_s: float, end: int | None) -> None:
        self._url, self._login = _without_login(url)
        self._timeout_s, self._last = timeout_s, "" if end is None else end - 1
        self._response: Any = None

    def seek(self, position: int) -> None:
        """Ask for the file from `position` on."""
        headers = {
            "Range": f"bytes={position}-{self._last}",
            "Accept-Encoding": "identity",
            "User-Agent": "kairos-train",
        }
        request = urllib.request.Request(self._url, headers=headers)
        if self._login:
            request.add_unredirected_header("Authorization", self._login)
        try:
            self._response = _opener().open(request, timeout=self._timeout_s)
        except urllib.error.HTTPError as error:
            error.close()
            total = error.headers.get("Content-Range", "").rpartition("/")[2]
            if error.code == 416 and total == str(position):  # nothing behind the last byte
                self.size, self.tag = position, error.headers.get("ETag")
                return
            raise _http_error(error) from None
        whole = self._response.headers.get("Content-Range", "").rpartition("/")[2]
        if self._response.status != 206:  # a server without ranges sends everything
            whole = self._response.headers.get("Content-Length", "")
            self._skip(position)
        if not whole.isdigit():
            raise FileNotFoundError("the server does not say how long the file is")
        self.size, self.tag = int(whole), self._response.headers.get("ETag")

    def read(self, count: int) -> bytes:
        return self._response.read1(count) if self._response is not None else b""

    def close(self) -> None:
        if self._response is not None:
            self._response.close()

    def _skip(self, count: int) -> None:
        while count:
            data = self._response.read(min(count, BUFFER))
            if not data:
                raise EOFError("the connection ended early")
            count -= len(data)


def _http_error(error: urllib.error.HTTPError) -> OSError:
    text = f"the server answers {error.code} {error.reason}"
    if error.code in (404, 410):
        return FileNotFoundError(text)
    if error.code in (401, 403):
        return PermissionError(text)
    if 400 <= error.code < 500 and error.code not in (408, 425, 429):
        return ChangedFile(text) if error.code == 416 else FileNotFoundError(text)
    return OSError(text)


def _without_login(url: str) -> tuple[str, str]:
    """(a URL without its user and password, the header that tells them)."""
    split = urllib.parse.urlsplit(url)
    login, _, host = split.netloc.rpartition("@")
    header = f"Basic {base64.b64encode(urllib.parse.unquote(login).encode()).decode()}" if login else ""
    bare = urllib.parse.urlunsplit(split._replace(netloc=host))
    return urllib.parse.quote(bare, safe=_ASCII), header  # what is not ASCII, as browsers do


def _opener() -> urllib.request.OpenerDirector:
    """What opens HTTP alone: a redirection leads to no file of this machine and to no other protocol."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener
