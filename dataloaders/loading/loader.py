"""Shards -> an endless, exactly resumable sequence of batches, in an order that knows no ranks and no workers.

The order of samples is arithmetic on the indices (`dataloaders.loading.streams`, `dataloaders.loading.mixture`); every
global step takes the next micro_batch · accumulation · world_size samples of it (`dataloaders.loading.cursor`); workers
fetch the samples of one micro-batch by their byte ranges (`dataloaders.loading.access`). Hence:

* With the same global batch, every layout (data ranks × accumulation × micro-batch × workers) trains on the same
  samples at every step. Peers of a data rank (tensor, context) are given its rank and get its batches.
* Every sample comes once per epoch of its source; the next epoch follows without a gap, a batch may span both.
* The position is a few numbers, the same on every rank. A resumed loader reads nothing again, and any number of ranks,
  workers and samples per batch may continue it.

A sample that cannot be read is either an error (`on_corrupt=stop`) or quarantined (`skip`): its place goes to a
stand-in, another sample of its source drawn from (seed, place), whose meta says so under "stands_in_for".

How a trainer uses it:

    loader = ShardLoader(config.data, LoaderShard(micro_batch, accumulation, data_rank, data_ranks), seed=…, gather=…)
    loader.load_state_dict(state)                         # any rank's state
    batches = [next(loader) for _ in range(accumulation)]  # one global step
    loader.sync()                                         # collective: before state_dict and when reporting
    state = loader.state_dict()                           # JSON, equal on all ranks; between steps only
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dataloaders.config import DataConfig, SourceConfig
from dataloaders.files.urls import is_url
from dataloaders.loading.batch import Batch, Sample, collate, decode_sample
from dataloaders.loading.buckets import Bucket, BucketQueue, SourceShapes
from dataloaders.loading.cache import ShardCache
from dataloaders.loading.cursor import BatchRequest, BucketedSteps, FixedSteps, LoaderShard, Steps, requests
from dataloaders.loading.fetch import Fetcher, Item, Reading, refusal
from dataloaders.loading.mixture import Mixture
from dataloaders.loading.peers import check_same
from dataloaders.loading.prefetch import Prefetch
from dataloaders.loading.quarantine import CorruptSample, Quarantine
from dataloaders.loading.streams import SourceOrder, default_streams
from dataloaders.shards import CorruptData, ShardIndex, check_size, read_index, read_shard
from kairos_train.basics.errors import UserError

Gather = Callable[[Any], list[Any]]


class ShardLoader:
    """Iterator of `Batch` without end over folders of shards; see the module's docstring for the order.

    Args:
        data: the settings of sources, order, damage, workers and cache (`dataloaders.config`).
        share: the samples of a batch, the batches of a global step, and which data-parallel share of them is read here.
            Peers that hold parts of the same samples (tensor, context) have the same.
        seed: of the order.
        with_frames: decode the clips (off: latents only, frames are None).
        quarantine: file that lists what was skipped, on the one process that writes it.
        gather: value -> list of the values of all processes; needed by `sync` with more than one rank. With
            `data.check_peers` the batches of processes that have the same rank are compared by it in every step.
        pin_memory: batches in page-locked memory, for copies to a GPU.

    Attributes:
        index: of the first source.
        indices: of all sources.
        skipped: {shard or sample: {"reason", "samples", "count"}}, of all ranks up to the last `sync`.

    Raises:
        UserError: bad settings; from `next`: corrupt data under "stop", sources that are used up.
        RunStopped: from `next` and `sync`: more corrupt data than allowed, peers that have different batches.
        MachineFault: from `next`: a dead or hung worker.
    """

    def __init__(
        self,
        data: DataConfig,
        share: LoaderShard,
        *,
        seed: int,
        with_frames: bool = True,
        quarantine: Path | None = None,
        gather: Gather | None = None,
        pin_memory: bool = False,
    ):
        sources = sources_of(data)
        self.indices = [read_index(source.shards) for source in sources]
        _check(data, share, self.indices)
        self.index = self.indices[0]
        self.data, self.share, self.pin_memory, self._gather = data, share, pin_memory, gather
        cache = ShardCache(Path(data.cache_dir), int(data.cache_gb * 1e9))
        self._reading = Reading(seed, data.on_corrupt, with_frames, cache, data.limits.member_bytes)
        self._order = {
            "seed": seed,
            "shuffle_buffer": data.shuffle_buffer,
            "streams": [data.streams or default_streams(len(index.shards)) for index in self.indices],
        }
        self._shapes = [SourceShapes(index) for index in self.indices]
        counts = [index.samples for index in self.indices]
        self._mixture_of = {
            "samples": counts,
            "weights": [source.weight for source in sources],
            "max_epochs": [source.max_epochs for source in sources],
            "temperature": data.temperature,
            "seed": seed,
        }
        self._position = Mixture(**self._mixture_of).state_dict()
        self._steps()  # what does not fit the token budget is found now
        self._quarantine = Quarantine(samples=sum(counts), limit=data.max_corrupt, file=quarantine)
        self._findings: list[CorruptSample] = []
        self._inside_step = 0  # batches given of the step that is not complete
        self._check_peers = data.check_peers and gather is not None
        self._digests: list[str] = []  # of those batches
        self._items: Prefetch[Item] | None = None
        self._under_way: deque[BatchRequest] = deque()

    def __iter__(self) -> ShardLoader:
        return self

    def __next__(self) -> Batch:
        if self._items is None:
            self._items = self._start()
        item = next(self._items)
        request = self._under_way.popleft()
        self._findings += item.findings
        if self._gather is None:
            self.sync()
        if item.failure is not None:
            self.close()
            raise UserError(item.failure)
        self._inside_step += 1
        if self._check_peers:
            self._digests.append(item.batch.digest())
        if request.after is not None:
            self._position, self._inside_step = request.after, 0
            if self._check_peers:
                mine, self._digests = self._digests, []
                check_same(self._gather((self.share.rank, mine)))
        return item.batch

    @property
    def skipped(self) -> dict[str, dict[str, Any]]:
        return self._quarantine.entries

    @property
    def epochs(self) -> list[float]:
        """How often each source has been gone through, up to the last complete step."""
        return [taken / index.samples for taken, index in zip(self._position["taken"], self.indices)]

    def largest_batch(self) -> tuple[Bucket, int]:
        """The bucket whose micro-batches have the most video tokens, of equal ones with actions; samples of one."""
        budget = self.data.tokens_per_micro_batch
        sizes = {
            bucket: self.share.micro_batch if budget is None else budget // bucket.tokens
            for source in self._shapes
            for bucket in source.buckets
        }
        return max(sizes.items(), key=lambda item: (item[0].tokens * item[1], item[0].has_actions))

    def sync(self) -> None:
        """Count and list what any rank has skipped. Collective over the processes of `gather`, where it was given.

        Raises:
            RunStopped: more than `max_corrupt` of the samples cannot be read; on all ranks alike.
        """
        mine, self._findings = self._findings, []
        found = {self.share.rank: mine}
        if self._gather is not None:
            found = dict(self._gather((self.share.rank, mine)))  # peers of a rank have found the same
        self._quarantine.add(finding for rank in sorted(found) for finding in found[rank])

    def close(self) -> None:
        """Stop the worker processes; the next `next` starts them again behind the last complete step."""
        if self._items is not None:
            self._items.close()
        self._items = None
        self._under_way.clear()
        self._inside_step, self._digests = 0, []

    def state_dict(self) -> dict[str, Any]:
        """Position behind the last complete global step; plain JSON values, the same on every rank after `sync`.

        Raises:
            ValueError: only a part of a step's batches has been taken.
        """
        if self._inside_step:
            raise ValueError(
                f"{self._inside_step} of {self.share.accumulation} batches of a step are taken: no position lies there"
            )
        return {
            **self._order,
            "shards": [index.fingerprint for index in self.indices],
            "position": dict(self._position),
            "skipped": self._quarantine.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where the loader that gave `state` stood, in any layout.

        Raises:
            UserError: the state is of another seed, shuffle buffer, number of streams, or of other shards; or of a
                token budget, and there is none now.
        """
        names = {"seed": "seed", "shuffle_buffer": "data.shuffle_buffer", "streams": "data.streams"}
        mine = self._order | {"shards": [index.fingerprint for index in self.indices]}
        for key, name in (names | {"shards": "content of data.shards"}).items():
            if state.get(key) != mine[key]:
                raise UserError(
                    f"loader state: {name} was {state.get(key)} when saved and is {mine[key]} now; the position in the "
                    "data is only defined for the same value: restore it, or start without the loader's state"
                )
        if self.data.tokens_per_micro_batch is None and state["position"].get("waiting"):
            raise UserError(
                f"data.tokens_per_micro_batch=null: {len(state['position']['waiting'])} samples wait in buckets since "
                "the state was saved and would be lost; set a token budget, or start without the loader's state"
            )
        self.close()
        self._position = dict(state["position"])
        self._findings = []
        self._quarantine.load_state_dict(state["skipped"])

    def _start(self) -> Prefetch[Item]:
        self._under_way.clear()
        return Prefetch(
            Fetcher(self.indices, self._shapes, self._reading),
            _Noted(requests(self._steps()), self._under_way),
            workers=self.data.workers,
            pin_memory=self.pin_memory,
            timeout=self.data.timeout,
        )

    def _steps(self) -> Steps:
        """Global steps from the position on."""
        orders = [
            SourceOrder(
                [shard.samples for shard in index.shards],
                label=(self._order["seed"], number),
                streams=self._order["streams"][number],
                shuffle=self._order["shuffle_buffer"],
            )
            for number, index in enumerate(self.indices)
        ]
        mixture = Mixture(**self._mixture_of)
        mixture.load_state_dict(self._position)
        if self.data.tokens_per_micro_batch is None:
            _check_one_shape(self._shapes, self.share)
            return FixedSteps(orders, mixture, self.share)
        queue = BucketQueue(self._shapes, orders, mixture, budget=self.data.tokens_per_micro_batch)
        queue.load_waiting(self._position.get("waiting", []))
        return BucketedSteps(queue, self.share)


class _Noted:
    """Hands requests to the workers and notes which are on their way."""

    def __init__(self, stream: Iterator[BatchRequest], under_way: deque[BatchRequest]) -> None:
        self.stream, self.under_way = stream, under_way

    def __iter__(self) -> Iterator[BatchRequest]:
        for request in self.stream:
            self.under_way.append(request)
            yield request


def sources_of(data: DataConfig) -> list[SourceConfig]:
    """What a run draws from: `data.sources`, or `data.shards` alone."""
    return list(data.sources) or [SourceConfig(shards=data.shards)]


def fixed_batches(
    shards: Path | str, *, batch_size: int, count: int, with_frames: bool = True, on_corrupt: str = "stop"
) -> Iterator[Batch]:
    """The first `count` batches of the folder in the order it was packed, the same at every call (for validation).

    A folder with fewer samples gives what it has, the last batch being smaller; so does one with samples that are
    skipped. Where the shape of the clips changes, a batch ends and another begins.
    """
    index = read_index(shards)
    _check(DataConfig(on_corrupt=on_corrupt), LoaderShard(batch_size, 1, 0, 1), [index])
    batches = (
        chunk
        for _, alike in itertools.groupby(_in_packed_order(index, with_frames, on_corrupt), key=_shape_of)
        for chunk in iter(lambda alike=alike: list(itertools.islice(alike, batch_size)), [])
    )
    yield from map(collate, itertools.islice(batches, count))


def _in_packed_order(index: ShardIndex, with_frames: bool, on_corrupt: str) -> Iterator[Sample]:
    shapes = SourceShapes(index)
    for number, shard in enumerate(index.shards):
        try:
            for row, raw in enumerate(read_shard(index.folder, shard)):
                try:
                    yield decode_sample(raw, index, with_frames=with_frames, shape=shapes.shape(number, row))
                except CorruptData as error:
                    if on_corrupt == "stop":
                        raise CorruptData(f"{shard.name}/{error.name}", error.reason) from error
        except CorruptData as error:
            if on_corrupt == "stop":
                raise refusal(index, error) from error


def _shape_of(sample: Sample) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(None if value is None else value.shape for value in (sample.frames, sample.latents, sample.actions))


def check_shards(index: ShardIndex) -> None:
    """Look at every local shard's size, before a run with `on_corrupt=stop` takes any device.

    Raises:
        UserError: a shard is missing or has not the indexed size.
    """
    for shard in () if is_url(index.folder) else index.shards:
        try:
            check_size(index.folder, shard)
        except CorruptData as error:
            raise refusal(index, error) from error


def _check(data: DataConfig, share: LoaderShard, indices: list[ShardIndex]) -> None:
    if data.on_corrupt not in ("stop", "skip"):
        raise UserError(f"data.on_corrupt={data.on_corrupt!r}: must be stop or skip")
    for name, value, least in (
        ("train.micro_batch", share.micro_batch, 1),
        ("train.accumulation", share.accumulation, 1),
        ("data.workers", data.workers, 0),
        ("data.shuffle_buffer", data.shuffle_buffer, 0),
        ("data.streams", 1 if data.streams is None else data.streams, 1),
    ):
        if value < least:
            raise UserError(f"{name}={value}: must be at least {least}")
    if not 0 <= share.rank < share.world_size:
        raise ValueError(f"rank {share.rank} is not in a world of {share.world_size}")
    for index in indices:
        if not index.samples:
            raise UserError(f"{index.folder}: holds no samples; pack the dataset again")
        if index.encoders != indices[0].encoders:
            raise UserError(
                f"data.sources: {index.folder} was encoded with {index.encoders}, {indices[0].folder} with "
                f"{indices[0].encoders}; pack them with the same encoders"
            )


def _check_one_shape(shapes: list[SourceShapes], share: LoaderShard) -> None:
    found = sorted({bucket[:3] for source in shapes for bucket in source.buckets})
    if len(found) > 1 and share.micro_batch > 1:
        texts = [f"{frames}x{height}x{width}" for frames, height, width in found]
        raise UserError(
            f"train.micro_batch={share.micro_batch}: the samples have {len(texts)} shapes ({texts[0]} to {texts[-1]}); "
            "set data.tokens_per_micro_batch, which keeps them apart"
        )
