"""Remote shards as local files: each is downloaded whole when it is first wanted, checked, and kept while there's room.

    DIR/<fingerprint of the index>/shard-000000.tar

All processes of a machine share the folder. Of a shard that several want at once, one downloads it and the others wait.
Beyond the limit the files that were opened longest ago go; a reader that has one open reads on.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from dataloaders.files.urls import TooLarge, download, join
from dataloaders.shards import CorruptData, ShardIndex, ShardInfo
from kairos_train.basics.files import locked, sha256_of


class ShardCache:
    """Local copies of remote shards.

    Args:
        root: the folder; made when needed.
        limit: bytes that all copies together may take; one shard at least is kept.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit = root, limit
        self._refused: dict[Path, CorruptData] = {}

    def open(self, index: ShardIndex, info: ShardInfo) -> int:
        """A file descriptor of the shard's copy.

        Raises:
            CorruptData: it is not there, cannot be read to its end, or is not what the index says.
        """
        path = self.root / index.fingerprint / info.name
        if path in self._refused:
            raise self._refused[path]  # not downloaded for each of its samples again
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            # nobody removes it between the two: that takes the same lock
            if absent := not path.exists():
                try:
                    self._fetch(index, info, path)
                except CorruptData as error:
                    self._refused[path] = error
                    raise
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.utime(path, ns=(time.time_ns(), time.time_ns()))  # finer than the file system's own clock
        if absent:
            self._make_room(path)
        return file

    def _fetch(self, index: ShardIndex, info: ShardInfo, path: Path) -> None:
        arriving = path.with_suffix(".new")
        try:
            download(join(index.folder, info.name), arriving, most_bytes=info.bytes)
        except FileNotFoundError as error:
            raise CorruptData(info.name, "is missing", samples=info.samples) from error
        except TooLarge as error:
            raise CorruptData(info.name, str(error), samples=info.samples) from error
        except OSError as error:
            raise CorruptData(info.name, f"cannot be read ({error})", samples=info.samples) from error
        if (size := arriving.stat().st_size) != info.bytes:
            reason = f"has {size} bytes, the index says {info.bytes}: truncated or replaced"
            raise CorruptData(info.name, reason, samples=info.samples)
        if (found := sha256_of(arriving)) != info.sha256:
            reason = f"has sha256 {found[:16]}…, the index says {info.sha256[:16]}…"
            raise CorruptData(info.name, reason, samples=info.samples)
        os.replace(arriving, path)

    def _make_room(self, newest: Path) -> None:
        """Remove the copies opened longest ago while all of them take more than the limit."""
        copies = []
        for path in self.root.glob("*/*.tar"):
            with suppress(FileNotFoundError):  # another process makes room too
                state = path.stat()
                copies.append((state.st_mtime_ns, state.st_size, path))
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total <= self.limit:
                return
            if path != newest:
                with locked(path.with_suffix(".lock")):
                    path.unlink(missing_ok=True)
                total -= size
