"""The order of one source's samples, as arithmetic on the index alone: nothing is read to know it.

For a source of N samples, S streams and a shuffle distance D, everything random being drawn from (seed, source, epoch):

1. The shards of epoch e are permuted and laid end to end: position 0 … N-1.
2. The line is cut into S streams of N/S positions, the first N mod S of them one longer.
3. Within a stream, position i gets the key i + D·u with u uniform in [0, 1), and the stream is read in the order of the
   keys: a shuffle that moves no sample by more than D places, so that few shards are in use at a time.
4. The streams are dealt round robin: place g of the epoch is element g div S of stream g mod S. They end together, so
   place 0 … N-1 is a permutation of the samples and place N is the next epoch's first.

`place` k = epoch · N + g is thus a sample of the endless order, for any number of readers. Readers that take every R-th
place stay on streams of their own when R divides S.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MOST_STREAMS = 64
"""Of the default: the usual numbers of data ranks divide it."""


class Slot(NamedTuple):
    """One place of a micro-batch: a sample of a source, as drawn in an epoch of that source. All count from 0."""

    source: int
    epoch: int
    shard: int
    row: int


def default_streams(shards: int) -> int:
    """The largest power of two that gives every stream a shard, at most MOST_STREAMS."""
    return min(MOST_STREAMS, 1 << (max(shards, 1).bit_length() - 1))


def uniform(count: int, *label: object) -> np.ndarray:
    """float64 (count,) in [0, 1), a function of the label. Raw PCG64 words: numpy keeps those for ever."""
    seed = int.from_bytes(hashlib.sha256("/".join(map(str, label)).encode()).digest()[:16], "little")
    return (np.random.PCG64(seed).random_raw(count) >> np.uint64(11)) * 2.0**-53


class SourceOrder:
    """The endless order of one source; see the module's docstring.

    Args:
        counts: samples of each shard.
        label: what the randomness depends on besides the epoch: seed and source.
        streams: S; a source of fewer samples has as many streams as samples.
        shuffle: D in samples; 0 keeps the order of the shards.
    """

    def __init__(self, counts: Sequence[int], *, label: tuple[object, ...], streams: int, shuffle: int) -> None:
        self.samples = sum(counts)
        self.counts, self.label, self.shuffle = np.asarray(counts, dtype=np.int64), label, shuffle
        self.streams = min(streams, self.samples)
        self._shards: dict[int, tuple[list[int], list[int]]] = {}
        self._streams: dict[tuple[int, int], np.ndarray] = {}

    def sample(self, place: int) -> tuple[int, int, int]:
        """(epoch, shard, row of the shard) of the sample at a place of the endless order, all from 0."""
        epoch, g = divmod(place, self.samples)
        index, stream = divmod(g, self.streams)
        position = int(self._stream(epoch, stream)[index])
        order, starts = self._shard_line(epoch)
        i = bisect_right(starts, position) - 1
        return epoch, order[i], position - starts[i]

    def _shard_line(self, epoch: int) -> tuple[list[int], list[int]]:
        """Shards in the epoch's order, and the position of each one's first sample."""
        if epoch not in self._shards:
            self._forget(epoch)
            order = np.argsort(uniform(len(self.counts), *self.label, epoch, "shards"), kind="stable")
            order = order[self.counts[order] > 0]
            ends = np.cumsum(self.counts[order])
            self._shards[epoch] = order.tolist(), (ends - self.counts[order]).tolist()
        return self._shards[epoch]

    def _stream(self, epoch: int, stream: int) -> np.ndarray:
        """Positions in the order in which the stream gives them."""
        if (epoch, stream) not in self._streams:
            self._shard_line(epoch)
            short, longer = divmod(self.samples, self.streams)
            first, count = stream * short + min(stream, longer), short + (stream < longer)
            line = np.arange(count)
            if self.shuffle:
                keys = line + self.shuffle * uniform(count, *self.label, epoch, "stream", stream)
                line = np.argsort(keys, kind="stable")
            # half the memory wherever it suffices
            self._streams[epoch, stream] = (first + line).astype(np.int32 if self.samples < 2**31 else np.int64)
        return self._streams[epoch, stream]

    def _forget(self, epoch: int) -> None:
        """Drop what lies more than one epoch back."""
        self._shards = {e: line for e, line in self._shards.items() if e >= epoch - 1}
        self._streams = {key: line for key, line in self._streams.items() if key[0] >= epoch - 1}
