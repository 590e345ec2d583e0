"""Shards -> an endless, exactly resumable sequence of batches.

How a batch comes about, each step decided by (seed, epoch, stream) alone:

1. The shards of epoch e are permuted by (seed, e) and dealt like cards: position j of the permutation goes to stream
   j mod (world_size · workers). Stream rank · workers + w belongs to loader worker w of that rank.
2. A stream reads its shards one after the other through a shuffle buffer seeded by (seed, e, stream), then goes on with
   epoch e + 1, for ever. Batches are formed across the border of epochs; no sample is left out or repeated.
3. Batch n of a rank comes from its worker n mod workers.

So the position is, per worker, (epoch, samples drawn from the shuffled stream in it), plus n. Every batch carries its
worker's position after it, hence prefetched batches that were never consumed do not count. A resumed stream draws that
many raw samples again without decoding any, and physical workers are rotated so that the next batch is the right one's.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dataloaders.batch import Batch, Sample, collate, decode_sample
from dataloaders.shards import CorruptData, ShardIndex, check_size, read_index, read_shard
from kairos_train.errors import UserError

PREFETCH = 2  # batches per worker
_SHUFFLE_INITIAL = (
    100  # samples buffered before the first is drawn: a cold start waits for these, not for the whole buffer
)


@dataclass(frozen=True)
class _Settings:
    batch_size: int
    seed: int
    rank: int
    world_size: int
    streams: int  # of this rank: max(1, workers)
    shuffle_buffer: int
    on_corrupt: str
    with_frames: bool


@dataclass(frozen=True)
class _Item:
    """A batch on its way from a worker, or the end of one (`failure`)."""

    batch: Batch | None
    stream: int  # within the rank
    position: tuple[int, int]  # epoch, samples drawn in it
    corrupt: list[tuple[str, str]]  # name, reason: what was skipped since the worker's last batch
    failure: str | None = None

    def pin_memory(self) -> _Item:
        batch = self.batch.pin_memory() if self.batch else None
        return _Item(batch, self.stream, self.position, self.corrupt, self.failure)


class ShardLoader:
    """Iterator of `Batch` without end over a folder of shards; see the module's docstring for the order.

    Args:
        shards: folder written by `pack`.
        batch_size: samples per batch.
        rank, world_size: which data-parallel share this loader reads, of how many.
        workers: loader processes; 0 reads in this process, in the same order as one worker.
        shuffle_buffer: samples each stream holds back for shuffling; 0 keeps the order of the shards.
        on_corrupt: "stop" raises on unreadable shards and samples, "skip" leaves them out and counts them in `skipped`.
        with_frames: decode the clips (off: latents only, frames are None).
        pin_memory: batches in page-locked memory, for copies to a GPU.

    Attributes:
        index: the folder's ShardIndex.
        skipped: {shard or sample: {"reason", "count"}} of the batches consumed so far.

    Raises:
        UserError: bad settings, fewer shards than streams; from `next`: corrupt data, a stream without a good sample.
    """

    def __init__(
        self,
        shards: Path | str,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        shuffle_buffer: int = 1000,
        on_corrupt: str = "stop",
        with_frames: bool = True,
        pin_memory: bool = False,
    ):
        self.index = read_index(shards)
        self.workers, self.pin_memory = workers, pin_memory
        self.settings = _Settings(
            batch_size, seed, rank, world_size, max(1, workers), shuffle_buffer, on_corrupt, with_frames
        )
        _check(self.settings, workers, self.index)
        self.skipped: dict[str, dict[str, Any]] = {}
        self._batches = 0
        self._positions = [(0, 0)] * self.settings.streams
        self._iterator: Iterator[_Item] | None = None

    def __iter__(self) -> ShardLoader:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        item = next(self._iterator)
        if item.failure is not None:
            self.close()
            raise UserError(item.failure)
        self._batches += 1
        self._positions[item.stream] = item.position
        for name, reason in item.corrupt:
            entry = self.skipped.setdefault(name, {"reason": reason, "count": 0})
            entry.update(reason=reason, count=entry["count"] + 1)
        return item.batch

    def close(self) -> None:
        """Stop the worker processes; the next `next` starts them again where the last consumed batch ended."""
        self._iterator = None

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch that `next` returned; plain JSON values, different on every rank."""
        s = self.settings
        return {
            "batches": self._batches,
            "positions": [list(position) for position in self._positions],
            "skipped": {name: dict(entry) for name, entry in self.skipped.items()},
            "rank": s.rank,
            "world_size": s.world_size,
            "streams": s.streams,
            "seed": s.seed,
            "shuffle_buffer": s.shuffle_buffer,
            "shards": self.index.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where the loader that gave `state` stood. The batch size alone may differ.

        Raises:
            UserError: the state is of another rank, world size, worker count, seed, shuffle buffer or other shards.
        """
        mine = self.state_dict()
        names = {"world_size": "number of data-parallel ranks", "streams": "data.workers (0 counts as 1)"}
        names |= {"seed": "seed", "shuffle_buffer": "data.shuffle_buffer", "shards": "content of data.shards"}
        for key, name in (names | {"rank": "data-parallel rank"}).items():
            if state.get(key) != mine[key]:
                raise UserError(
                    f"loader state: {name} was {state.get(key)} when saved and is {mine[key]} now; the position in the "
                    "data is only defined for the same value: restore it, or start without the loader's state"
                )
        self.close()
        self._batches = int(state["batches"])
        self._positions = [(int(epoch), int(drawn)) for epoch, drawn in state["positions"]]
        self.skipped = {name: dict(entry) for name, entry in state["skipped"].items()}

    def _start(self) -> Iterator[_Item]:
        dataset = _Batches(self.index, self.settings, tuple(self._positions), self._batches)
        if self.workers == 0 and not self.pin_memory:
            return iter(dataset)
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=PREFETCH if self.workers else None,
            persistent_workers=self.workers > 0,
            pin_memory=self.pin_memory,
            # its own generator: the default one would consume a number of the training's random stream at every start
            generator=torch.Generator(),
        )
        return iter(loader)


def fixed_batches(
    shards: Path | str, *, batch_size: int, count: int, with_frames: bool = True, on_corrupt: str = "stop"
) -> Iterator[Batch]:
    """The first `count` batches of the folder in the order it was packed, the same at every call (for validation).

    A folder with fewer samples gives what it has, the last batch being smaller.
    """
    index = read_index(shards)
    settings = _Settings(batch_size, 0, 0, 1, 1, 0, on_corrupt, with_frames)
    _check(settings, 0, index)
    stream = _Stream(index, settings, 0, (0, 0))
    decoded = (stream.decode(raw) for raw in stream.raw_samples(index.shards))
    samples = (sample for sample in decoded if sample is not None)
    for _ in range(count):
        if not (chunk := list(itertools.islice(samples, batch_size))):
            return
        yield collate(chunk)


class _Batches(IterableDataset):
    """Batches of one rank. In a worker process: those of its one stream. `done`: batches consumed before the start."""

    def __init__(self, index: ShardIndex, settings: _Settings, positions: tuple[tuple[int, int], ...], done: int):
        self.index, self.settings, self.positions, self.done = index, settings, positions, done

    def __iter__(self) -> Iterator[_Item]:
        info = get_worker_info()
        # the DataLoader asks physical worker 0 first; batch `done` is due from stream done mod streams
        local = ((info.id if info else 0) + self.done) % self.settings.streams
        stream = _Stream(self.index, self.settings, local, self.positions[local])
        samples: list[Sample] = []
        try:
            for sample in stream:
                samples.append(sample)
                if len(samples) == self.settings.batch_size:
                    yield _Item(collate(samples), local, stream.position, stream.take_corrupt())
                    samples = []
        except UserError as error:  # as a value: an exception would reach the user wrapped in the worker's traceback
            yield _Item(None, local, stream.position, [], failure=str(error))


class _Stream:
    """Decoded samples of one stream, epoch after epoch, from a position on; notes what it skips in `corrupt`."""

    def __init__(self, index: ShardIndex, settings: _Settings, local: int, position: tuple[int, int]):
        self.index, self.settings = index, settings
        self.number = settings.rank * settings.streams + local
        self.position = position
        self.corrupt: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[Sample]:
        epoch, drawn = self.position
        while True:
            raws = self._epoch(epoch)
            for _ in itertools.islice(raws, drawn):
                pass
            self.corrupt.clear()  # what those draws met was counted before the position was saved
            good = drawn > 0  # a position is saved after a batch, hence after a good sample
            for raw in raws:
                drawn += 1
                self.position = (epoch, drawn)
                if (sample := self.decode(raw)) is not None:
                    good = True
                    yield sample
            if not good:
                name, reason = self.corrupt[-1] if self.corrupt else ("its shards", "hold no samples")
                raise UserError(
                    f"{self.index.folder}: stream {self.number} found no usable sample in epoch {epoch}, last {name}: "
                    f"{reason}; restore or repack the shards"
                )
            epoch, drawn = epoch + 1, 0

    def raw_samples(self, shards) -> Iterator[dict[str, Any]]:
        """Undecoded samples of the shards, in order."""
        for shard in shards:
            try:
                for raw in read_shard(self.index.folder, shard):
                    yield raw | {"__shard__": shard.name}
            except CorruptData as error:
                self._corrupt(error.name, error.reason)

    def decode(self, raw: dict[str, Any]) -> Sample | None:
        """The sample, or None where it is corrupt and the policy is to skip."""
        try:
            return decode_sample(raw, self.index, with_frames=self.settings.with_frames)
        except CorruptData as error:
            self._corrupt(f"{raw['__shard__']}/{error.name}", error.reason)
            return None

    def take_corrupt(self) -> list[tuple[str, str]]:
        """What was skipped since the last call."""
        taken, self.corrupt = self.corrupt, []
        return taken

    def _epoch(self, epoch: int) -> Iterator[dict[str, Any]]:
        from webdataset.filters import shuffle

        s = self.settings
        order = list(self.index.shards)
        random.Random(f"shards/{s.seed}/{epoch}").shuffle(order)
        raws = self.raw_samples(order[self.number :: s.world_size * s.streams])
        rng = random.Random(f"samples/{s.seed}/{epoch}/{self.number}")
        return shuffle(s.shuffle_buffer, initial=_SHUFFLE_INITIAL, rng=rng)(raws)

    def _corrupt(self, name: str, reason: str) -> None:
        if self.settings.on_corrupt == "stop":
            raise _refusal(self.index, name, reason)
        self.corrupt.append((name, reason))


def check_shards(index: ShardIndex) -> None:
    """Look at every shard's size, before a run with `on_corrupt=stop` takes any device.

    Raises:
        UserError: a shard is missing or has not the indexed size.
    """
    for shard in index.shards:
        try:
            check_size(index.folder, shard)
        except CorruptData as error:
            raise _refusal(index, error.name, error.reason) from error


def _refusal(index: ShardIndex, name: str, reason: str) -> UserError:
    return UserError(
        f"{index.folder / name}: {reason}; restore or repack it, or leave it out with data.on_corrupt=skip"
    )


def _check(settings: _Settings, workers: int, index: ShardIndex) -> None:
    s = settings
    if s.on_corrupt not in ("stop", "skip"):
        raise UserError(f"data.on_corrupt={s.on_corrupt!r}: must be stop or skip")
    for name, value, least in (
        ("train.micro_batch", s.batch_size, 1),
        ("data.workers", workers, 0),
        ("data.shuffle_buffer", s.shuffle_buffer, 0),
    ):
        if value < least:
            raise UserError(f"{name}={value}: must be at least {least}")
    if not 0 <= s.rank < s.world_size:
        raise ValueError(f"rank {s.rank} is not in a world of {s.world_size}")
    if len(index.shards) < s.world_size * s.streams:
        raise UserError(
            f"{index.folder}: has {len(index.shards)} shards, fewer than {s.world_size} data-parallel ranks x "
            f"{s.streams} loader workers; repack with a smaller shard_samples or lower data.workers"
        )
