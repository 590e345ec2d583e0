"""Samples of different shape, grouped so that every micro-batch is of one shape and of about equal cost.

A bucket is what may be stacked: frames, height and width of the clip, and whether it has actions. Samples arrive in the
order of the mixture and wait in their bucket; when it holds as many as the token budget allows, they leave together as
a micro-batch:

    tokens of a sample = ((frames - 1)/4 + 1) · height/16 · width/16      (VAE 4 × 8 × 8, patches of 1 × 2 × 2)
    samples of a micro-batch = budget // tokens of a sample

What waits is part of the position. So no sample is lost or repeated, and the sequence of micro-batches knows no ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from dataloaders.loading.mixture import Mixture
from dataloaders.loading.streams import Slot, SourceOrder
from dataloaders.shards import ShardIndex
from kairos_train.basics.errors import UserError
from kairos_train.basics.geometry import TOKEN_PIXELS, latent_frames


class Bucket(NamedTuple):
    """What samples of one micro-batch have in common."""

    frames: int
    height: int
    width: int
    has_actions: bool

    @property
    def tokens(self) -> int:
        """Video tokens of a sample."""
        return latent_frames(self.frames) * (self.height // TOKEN_PIXELS) * (self.width // TOKEN_PIXELS)

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}{' with actions' if self.has_actions else ''}"


class SourceShapes:
    """Bucket of every row of a source, by the index alone.

    Attributes:
        buckets: those that occur.
    """

    def __init__(self, index: ShardIndex) -> None:
        self._labelled = index.action_dim > 0
        self._only = self._bucket(_one_shape(index))
        self._known = len(index.shapes) == 1
        self._runs: list[tuple[list[int], list[Bucket]] | None] = []  # by shard: first rows, buckets
        self._places: dict[Bucket, tuple[list[int], list[tuple[int, int]]]] = {}  # running count, (shard, first row)
        for number, shard in enumerate(index.shards):
            if shard.shapes is None:
                runs = [(*self._only[:3], shard.samples)]
                self._runs.append(None)
            else:
                runs = shard.shapes
                if sum(run[3] for run in runs) != shard.samples:
                    raise UserError(
                        f"{index.folder}: the shapes of {shard.name} are not those of {shard.samples} samples; repack"
                    )
                firsts = [0, *accumulate(run[3] for run in runs)][:-1]
                self._runs.append((firsts, [self._bucket(run[:3]) for run in runs]))
            self._add_places(number, runs)
        self.buckets = sorted(self._places)

    def bucket(self, shard: int, row: int) -> Bucket:
        """Of a sample."""
        runs = self._runs[shard]
        if runs is None:
            return self._only
        return runs[1][bisect_right(runs[0], row) - 1]

    def shape(self, shard: int, row: int) -> tuple[int, int, int] | None:
        """Frames, height and width of a sample's clip; None where an old index does not say."""
        return self.bucket(shard, row)[:3] if self._known or self._runs[shard] is not None else None

    def sample(self, bucket: Bucket, share: float) -> tuple[int, int]:
        """(shard, row) of the sample at `share` in [0, 1) of all those of a bucket."""
        ends, places = self._places[bucket]
        position = int(share * ends[-1])
        i = bisect_right(ends, position)
        shard, first = places[i]
        return shard, first + position - (ends[i - 1] if i else 0)

    def _bucket(self, shape: Sequence[int]) -> Bucket:
        return Bucket(*shape[:3], self._labelled)

    def _add_places(self, shard: int, runs: Sequence[Sequence[int]]) -> None:
        first = 0
        for *shape, count in runs:
            ends, places = self._places.setdefault(self._bucket(shape), ([], []))
            ends.append(count + (ends[-1] if ends else 0))
            places.append((shard, first))
            first += count


class BucketQueue:
    """The endless sequence of micro-batches of one shape each.

    Args:
        shapes: of the sources.
        orders: of the sources.
        mixture: gives the samples; at its position.
        budget: tokens per micro-batch.

    Raises:
        UserError: a sample alone has more tokens than the budget.
    """

    def __init__(self, shapes: list[SourceShapes], orders: list[SourceOrder], mixture: Mixture, *, budget: int) -> None:
        largest = max((bucket for source in shapes for bucket in source.buckets), key=lambda b: b.tokens)
        if largest.tokens > budget:
            raise UserError(
                f"data.tokens_per_micro_batch={budget}: a sample of {largest} alone has {largest.tokens} tokens; "
                "raise it, or leave out what is larger"
            )
        self._shapes, self._orders, self._mixture, self._budget = shapes, orders, mixture, budget
        self._waiting: dict[Bucket, list[tuple[tuple[int, int], Slot]]] = {}
        self._ready: deque[tuple[Bucket, list]] = deque()

    def next(self) -> tuple[Slot, ...]:
        """The slots of the next micro-batch.

        Raises:
            Exhausted: the sources are used up; what waits stays.
        """
        while not self._ready:
            self._add(*self._mixture.next())
        return tuple(slot for _, slot in self._ready.popleft()[1])

    def state_dict(self) -> dict[str, Any]:
        """The mixture's position and the (source, place) of what it has given and waits here."""
        groups = [group for _, group in self._ready] + [self._waiting[bucket] for bucket in sorted(self._waiting)]
        return self._mixture.state_dict() | {"waiting": [list(place) for group in groups for place, _ in group]}

    def load_waiting(self, waiting: list[list[int]]) -> None:
        """Take in what waited at the mixture's position."""
        for source, place in waiting:
            self._add(source, place)

    def _add(self, source: int, place: int) -> None:
        slot = Slot(source, *self._orders[source].sample(place))
        bucket = self._shapes[source].bucket(slot.shard, slot.row)
        group = self._waiting.setdefault(bucket, [])
        group.append(((source, place), slot))
        if len(group) >= self._budget // bucket.tokens:
            self._ready.append((bucket, self._waiting.pop(bucket)))


def _one_shape(index: ShardIndex) -> tuple[int, int, int]:
    """Frames, height and width of a source's windows."""
    if len(index.shapes) == 1:
        (only,) = index.shapes
        return only["frames"], only["height"], only["width"]
    window, cameras = index.window, index.source.get("cameras") or [""]
    return window.frames, window.height, window.width * (len(cameras) if window.layout == "side_by_side" else 1)
