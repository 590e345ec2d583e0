"""A local HTTP server with bad habits, for tests of reading by URL."""

from __future__ import annotations

import re
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


@dataclass
class Habits:
    """What the server does wrong, and what it was asked.

    Attributes:
        drop_after: bytes of a body after which the connection is closed; None: never.
        drops: this many answers are broken off so.
        refuse: this many answers are 503 before the first good one.
        silent: this many answers take `silence_s` before their first byte.
        ranges: whether ranges are honoured.
        redirect: every answer leads there.
        secret: what nobody is answered without: `user` has it as a password, and it is in the query.
        requests: (path, first byte asked for).
        logins: what each request said of its user.
        sent: bytes of all bodies that were begun.
    """

    drop_after: int | None = None
    drops: int = 1_000_000
    refuse: int = 0
    silent: int = 0
    silence_s: float = 0.0
    ranges: bool = True
    tag: str = '"1"'
    redirect: str | None = None
    secret: str | None = None
    requests: list[tuple[str, int]] = field(default_factory=list)
    sent: int = 0
    logins: list[str | None] = field(default_factory=list)


@contextmanager
def serving(folder: Path, habits: Habits | None = None) -> Iterator[tuple[str, Habits]]:
    """(address without a slash at its end, habits) of a server of the folder's files."""
    habits = habits or Habits()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if habits.ranges else None
            first = int(asked[1]) if asked else 0
            name = unquote(self.path.partition("?")[0]).lstrip("/")
            habits.requests.append((name, first))
            habits.logins.append(self.headers.get("Authorization"))
            if habits.redirect is not None:
                self.send_response(302)
                self.send_header("Location", habits.redirect)
                self.end_headers()
                return
            if habits.silent > 0:
                habits.silent -= 1
                time.sleep(habits.silence_s)
            if habits.refuse > 0:
                habits.refuse -= 1
                self.send_error(503)
                return
            if habits.secret is not None:
                login = f"Basic {b64encode(f'user:{habits.secret}'.encode()).decode()}"
                if self.headers.get("Authorization") != login or habits.secret not in unquote(
                    self.path.partition("?")[2]
                ):
                    self.send_error(403)
                    return
            if not (folder / name).is_file():
                self.send_error(404)
                return
            data = (folder / name).read_bytes()
            end = min(int(asked[2]) + 1, len(data)) if asked and asked[2] else len(data)
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(end - first))
            self.send_header("ETag", habits.tag)
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(data)}")
            self.end_headers()
            habits.sent += end - first
            if habits.drop_after is not None and habits.drops > 0:
                habits.drops -= 1
                end = min(first + habits.drop_after, end)
            with suppress(OSError):  # the reader may have hung up
                self.wfile.write(data[first:end])
            self.close_connection = True

        def log_message(self, *ignored) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", habits
    finally:
        server.shutdown()
        server.server_close()
