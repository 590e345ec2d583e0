"""The endless order of samples, cut into the micro-batches of one data rank.

Of a fixed size: a global step takes the next G = micro_batch · accumulation · world_size samples of the order, on
whichever rank; data rank r takes every world_size-th of them from the r-th on, and its micro-batches are that share in
pieces. So with the same G, every layout trains on the same samples at every step.

By token budget (`dataloaders.loading.buckets`): a global step takes the next accumulation · world_size micro-batches,
and rank r every world_size-th of them from the r-th on.

Either way the position is one for all ranks. Ranks keep to shards of their own (`dataloaders.loading.streams`) where
there is one source and a fixed size; else every rank may come to read every shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from dataloaders.loading.buckets import BucketQueue
from dataloaders.loading.mixture import Exhausted, Mixture
from dataloaders.loading.streams import Slot, SourceOrder


@dataclass(frozen=True)
class BatchRequest:
    """One micro-batch to be read.

    Attributes:
        slots: its samples; empty where the sources are used up.
        after: the position behind the global step that it completes; None within a step.
    """

    slots: tuple[Slot, ...]
    after: dict[str, Any] | None


@dataclass(frozen=True)
class LoaderShard:
    """Which part of each global step is read here.

    Attributes:
        micro_batch: samples per batch, all of one shape; of no meaning under a token budget.
        accumulation: batches that one rank takes per global step.
        rank, world_size: which data-parallel share is read, of how many.
    """

    micro_batch: int
    accumulation: int
    rank: int
    world_size: int


class Steps(Protocol):
    """Global steps from a position on."""

    def next(self) -> list[tuple[Slot, ...]]:
        """The micro-batches of this rank in the next global step. Raises Exhausted where the sources give no more."""

    def state_dict(self) -> dict[str, Any]:
        """The position behind it; JSON values."""


class FixedSteps:
    """Micro-batches of a fixed number of samples."""

    def __init__(self, orders: list[SourceOrder], mixture: Mixture, share: LoaderShard) -> None:
        self._orders, self._mixture, self._share = orders, mixture, share

    def next(self) -> list[tuple[Slot, ...]]:
        s = self._share
        places = self._mixture.take(s.micro_batch * s.accumulation * s.world_size, first=s.rank, stride=s.world_size)
        slots = [Slot(source, *self._orders[source].sample(place)) for source, place in places]
        return [tuple(slots[i : i + s.micro_batch]) for i in range(0, len(slots), s.micro_batch)]

    def state_dict(self) -> dict[str, Any]:
        return self._mixture.state_dict()


class BucketedSteps:
    """Micro-batches of one shape each, by a token budget."""

    def __init__(self, queue: BucketQueue, share: LoaderShard) -> None:
        self._queue, self._share = queue, share

    def next(self) -> list[tuple[Slot, ...]]:
        s = self._share
        return [self._queue.next() for _ in range(s.accumulation * s.world_size)][s.rank :: s.world_size]

    def state_dict(self) -> dict[str, Any]:
        return self._queue.state_dict()


def requests(steps: Steps) -> Iterator[BatchRequest]:
    """Every micro-batch of this rank; the last one, when the sources are used up, is empty."""
    while True:
        try:
            mine = steps.next()
        except Exhausted:
            yield BatchRequest((), None)
            return
        for slots in mine[:-1]:
            yield BatchRequest(slots, None)
        yield BatchRequest(mine[-1], steps.state_dict())
