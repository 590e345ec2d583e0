"""One sample out of a shard by its row, without reading what lies before it.

A shard's tar headers are walked once (512 bytes per member), which gives the row's byte range; a sample's members lie
side by side, so that one read fetches them. The latents, which are most of it, go straight to where the batch wants
them. Only what `write_shard` writes is understood: plain members of plain names.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dataloaders.config import LimitsConfig
from dataloaders.files.npy import NPY_HEADER
from dataloaders.loading.cache import ShardCache
from dataloaders.loading.memory import Buffers
from dataloaders.shards import MEMBER_NAME, CorruptData, ShardIndex, ShardInfo, check_size

OPEN_SHARDS = 64
"""Shards kept open by a reader; opening one again costs little."""

KNOWN_SHARDS = 2048
"""Shards whose rows a reader remembers: 48 bytes per sample."""

DIRECT = "latents.npy"

_BLOCK = 512
_END = bytes(_BLOCK)


class Apart(NamedTuple):
    """A .npy member whose data lie apart from its header."""

    head: memoryview
    data: memoryview


@dataclass
class _Rows:
    """What the headers of a shard say.

    Attributes:
        ranges: int64 (rows, 6): start of the row, start and end of its member that is skipped, end of the row; start
            and size of the content of DIRECT.
        problem: why there are not as many rows as the index says.
        bad: row -> key and what is wrong with it.
    """

    ranges: np.ndarray
    problem: str | None
    bad: dict[int, tuple[str, str]]


class ShardReader:
    """Random access to the samples of a shard folder.

    Args:
        skip: extension of a member that is not wanted and not read, as "mp4".
        most_bytes: of a sample.
        cache: where the shards of a remote folder are kept.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        skip: str | None = None,
        cache: ShardCache | None = None,
        most_bytes: int | None = None,
    ) -> None:
        self.index, self.skip, self.cache = index, skip, cache
        self.most_bytes = LimitsConfig().member_bytes if most_bytes is None else most_bytes
        self._rows: OrderedDict[int, _Rows] = OrderedDict()
        self._files: OrderedDict[int, int] = OrderedDict()

    def read(
        self, shard: int, row: int, buffers: Buffers, number: int = 0, into: memoryview | None = None
    ) -> dict[str, Any]:
        """Raw members of one sample: `{"__key__": …, "action.npy": memoryview, …}`, lying in buffer `number`.

        Args:
            into: memory for the data of DIRECT, which is then an `Apart`; not used where they are of another size.

        Raises:
            CorruptData: naming the shard (missing, of another size, damaged before that row) or the sample.
        """
        info = self.index.shards[shard]
        try:
            rows = self._table(shard, info)
            if row in rows.bad:
                key, reason = rows.bad[row]
                raise CorruptData(f"{info.name}/{key}", reason)
            if row >= len(rows.ranges):
                raise CorruptData(info.name, rows.problem, samples=info.samples - len(rows.ranges))
            ranges = rows.ranges[row].tolist()
            start, hole, after, end, _, size = ranges
            if into is not None and size != NPY_HEADER + len(into):
                into = None
            elsewhere = 0 if into is None else len(into)
            data = memoryview(buffers.take(number, hole - start + end - after - elsewhere))
            _fill(self._file(shard, info), ranges, data, into)
            return _members(data, into)
        except OSError as error:
            raise CorruptData(info.name, f"cannot be read ({error.strerror or error})", samples=info.samples) from error
        except ValueError as error:
            raise CorruptData(f"{info.name}/row {row}", str(error)) from error

    def close(self) -> None:
        """Close the files; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("index", "skip", "cache", "most_bytes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def _table(self, shard: int, info: ShardInfo) -> _Rows:
        if shard not in self._rows:
            if self.cache is None:  # which checks by itself
                check_size(self.index.folder, info)
            rows = _walk(self._file(shard, info), self.skip, info.samples, self.most_bytes)
            if len(rows.ranges) != info.samples:
                more = f" ({rows.problem})" if rows.problem else ""
                rows.problem = f"holds {len(rows.ranges)} samples, the index says {info.samples}{more}"
            self._rows[shard] = rows
            if len(self._rows) > KNOWN_SHARDS:
                self._rows.popitem(last=False)
        self._rows.move_to_end(shard)
        return self._rows[shard]

    def _file(self, shard: int, info: ShardInfo) -> int:
        if shard not in self._files:
            if self.cache is not None:
                self._files[shard] = self.cache.open(self.index, info)
            else:
                self._files[shard] = os.open(self.index.folder / info.name, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._files) > OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]


def _walk(file: int, skip: str | None, samples: int, most_bytes: int) -> _Rows:
    """Read the headers from the first to the end of the archive, or to the first that is none.

    A last row of which only the first members are there is left out. Members are sorted, so that rows end alike.
    """
    ranges: list[list[int]] = []
    rows, at, key, last = _Rows(np.empty(0), None, {}), 0, None, None
    keys: set[str] = set()
    endings: set[str | None] = set()  # the last members of the rows but the last one
    length = os.fstat(file).st_size
    try:
        while (header := os.pread(file, _BLOCK, at)) and header != _END:
            name, size = _header(header)
            stem, _, extension = name.partition(".")
            end = at + _BLOCK + -(-size // _BLOCK) * _BLOCK
            if end > length:
                raise ValueError("ends inside a member")
            if stem != key:
                if ranges:
                    endings.add(last)
                key = stem
                if key in keys:
                    rows.bad[len(ranges)] = (key, "is in its shard a second time")
                keys.add(key)
                ranges.append([at, 0, 0, 0, 0, 0])
            if extension == skip:
                ranges[-1][1:3] = at, end
            elif extension == DIRECT:
                ranges[-1][4:] = at + _BLOCK, size
            ranges[-1][3] = at = end
            if at - ranges[-1][0] > most_bytes:
                reason = f"has members of more than {most_bytes:,} bytes, which data.limits.member_mb allows"
                rows.bad.setdefault(len(ranges) - 1, (stem, reason))
            last = extension
    except ValueError as error:
        rows.problem = str(error)
    if ranges and last not in endings and (endings or rows.problem or len(ranges) != samples):
        ranges.pop()
        rows.problem = rows.problem or "ends inside a sample"
    rows.ranges = np.array(ranges, dtype=np.int64).reshape(-1, 6)
    whole = rows.ranges[:, 2] == 0  # nothing to skip: the hole is empty and lies at the end
    rows.ranges[whole, 1] = rows.ranges[whole, 2] = rows.ranges[whole, 3]
    return rows


def _header(block: bytes) -> tuple[str, int]:
    """Name and size of a member. ValueError when it is no header of a plain file with a plain name."""
    if len(block) < _BLOCK:
        raise ValueError("ends inside a member's header")
    try:
        checksum, size = _octal(block[148:156]), _octal(block[124:136])
        name = block[:100].rstrip(b"\0").decode()
    except ValueError:
        raise ValueError("a member's header is damaged") from None
    if checksum != sum(block) - sum(block[148:156]) + 8 * 32:
        raise ValueError("a member's header is damaged")
    if block[156:157] not in b"0\0" or block[345] or not MEMBER_NAME.fullmatch(name):
        raise ValueError(f"member name {name!r} is not plain" if block[156:157] in b"0\0" else f"{name!r} is no file")
    return name, size


def _octal(digits: bytes) -> int:
    """A number of a header. ValueError when it is none; a negative size would lead back to what was read before."""
    if not (digits := digits.rstrip(b" \0")).isdigit():
        raise ValueError(f"{digits!r} is no number")
    return int(digits, 8)


def _members(row: memoryview, into: memoryview | None) -> dict[str, Any]:
    """Split a row's bytes into its members. Their headers have been checked when the shard was walked."""
    raw: dict[str, Any] = {}
    at = 0
    while at < len(row):
        name = bytes(row[at : at + 100]).rstrip(b"\0").decode()
        size = _octal(bytes(row[at + 124 : at + 136]))
        key, _, extension = name.partition(".")
        if extension in raw:
            raise ValueError(f"its key {key} has {extension} twice")
        begin, at = at + _BLOCK, at + _BLOCK + -(-size // _BLOCK) * _BLOCK
        raw["__key__"] = key
        if into is not None and extension == DIRECT:
            raw[extension] = Apart(row[begin : begin + NPY_HEADER], into)
            at -= len(into)
        else:
            raw[extension] = row[begin : begin + size]
    return raw


def _fill(file: int, ranges: list[int], data: memoryview, into: memoryview | None) -> None:
    """Read a row, less its skipped member, into `data`; the data of DIRECT into `into`, where that is given."""
    start, hole, after, end, at, _ = ranges
    position = 0
    for first, last in ((start, hole), (after, end)):
        if first == last:
            continue
        stop = position + last - first
        if into is not None and first <= at < last:
            stop -= len(into)
            cut = position + at - first + NPY_HEADER
            _read_into([data[position:cut], into, data[cut:stop]], file, first)
        else:
            _read_into([data[position:stop]], file, first)
        position = stop


def _read_into(parts: list[memoryview], file: int, start: int) -> None:
    """Fill the parts, one behind the other, with the file's bytes from `start` on."""
    done = os.preadv(file, parts, start)
    for part in parts if done < sum(map(len, parts)) else ():  # one call gives at most 2 GiB
        while len(part) > done:
            if not (count := os.preadv(file, [part[done:]], start + done)):
                raise OSError(0, "shorter than it was when it was opened")
            done += count
        start, done = start + len(part), done - len(part)
