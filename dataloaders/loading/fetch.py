"""What a loader process does: read, decode and stack the samples of a request, and see to those that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from dataloaders.files.urls import is_url
from dataloaders.loading.access import ShardReader
from dataloaders.loading.batch import Batch, BatchSchema, Sample, collate, decode_sample
from dataloaders.loading.buckets import Bucket, SourceShapes
from dataloaders.loading.cache import ShardCache
from dataloaders.loading.cursor import BatchRequest
from dataloaders.loading.memory import Blocks, Buffers, Rows
from dataloaders.loading.quarantine import CorruptSample
from dataloaders.loading.streams import Slot, uniform
from dataloaders.shards import CorruptData, ShardIndex
from kairos_train.basics.errors import UserError

ATTEMPTS = 64  # stand-ins tried before the data counts as unusable


@dataclass(frozen=True)
class Reading:
    """How samples are read: `seed` of the stand-ins, "stop" or "skip" on corrupt ones, whether clips are decoded, where
    remote shards are kept, how many bytes a sample may have."""

    seed: int
    on_corrupt: str
    with_frames: bool
    cache: ShardCache
    most_bytes: int | None = None


@dataclass(frozen=True)
class Item:
    """A batch on its way from a loader process, or the end of all (`failure`)."""

    batch: Batch | None
    findings: list[CorruptSample]
    failure: str | None = None

    def pin_memory(self) -> Item:
        return replace(self, batch=self.batch.pin_memory() if self.batch else None)


class _BatchSlot(NamedTuple):
    """Where a sample goes: its number in the batch, and memory of the batch for what is large (None: not known yet)."""

    number: int
    frames: Rows | None
    latents: Rows | None


class _KnownSizes:
    """Shapes and types of frames and latents, as the last sample of a bucket had them."""

    def __init__(self) -> None:
        self._blocks = Blocks()
        self._known: dict[tuple[str, Bucket], tuple[tuple[int, ...], np.dtype]] = {}

    def note(self, bucket: Bucket, sample: Sample) -> None:
        for name in ("frames", "latents"):
            if (value := getattr(sample, name)) is not None:
                self._known[name, bucket] = value.shape, value.dtype

    def of(self, name: str, bucket: Bucket, count: int) -> Rows | None:
        """Memory for that of `count` samples; None where no sample has been seen."""
        if (name, bucket) not in self._known:
            return None
        shape, dtype = self._known[name, bucket]
        return Rows((count, *shape), dtype, self._blocks)


class Fetcher(Dataset):
    """Request -> Item."""

    def __init__(self, indices: Sequence[ShardIndex], shapes: Sequence[SourceShapes], reading: Reading) -> None:
        self.indices, self.shapes, self.reading = indices, shapes, reading
        self.layout = BatchSchema.of(indices)
        self.buffers = Buffers()
        self._rows = _KnownSizes()
        skip = None if reading.with_frames else "mp4"
        self.readers = [
            ShardReader(
                index,
                skip=skip,
                cache=reading.cache if is_url(index.folder) else None,
                most_bytes=reading.most_bytes,
            )
            for index in indices
        ]

    def __getitem__(self, request: BatchRequest) -> Item:
        findings: list[CorruptSample] = []
        if not request.slots:
            folders = ", ".join(index.place for index in self.indices)
            return Item(None, [], f"data.sources: {folders} are used up; raise max_epochs or lower train.steps")
        try:
            bucket = self._bucket(request.slots[0])
            frames, latents = (self._rows.of(name, bucket, len(request.slots)) for name in ("frames", "latents"))
            samples = [
                self._sample(slot, _BatchSlot(number, frames, latents), findings)
                for number, slot in enumerate(request.slots)
            ]
            self._rows.note(bucket, samples[0])
            return Item(collate(samples, self.layout, frames=frames, latents=latents), findings)
        except UserError as error:  # as a value: an exception would reach the user wrapped in the worker's traceback
            return Item(None, findings, str(error))

    def _sample(self, slot: Slot, place: _BatchSlot, findings: list[CorruptSample]) -> Sample:
        """The slot's sample, or the first stand-in that can be read."""
        index = self.indices[slot.source]
        try:
            return self._decode(slot, place)
        except CorruptData as error:
            if self.reading.on_corrupt == "stop":
                raise refusal(index, error) from error
            name = error.name if len(self.indices) == 1 else f"{index.place}/{error.name}"
            findings.append(CorruptSample(name, error.reason, error.samples))
        for attempt in range(ATTEMPTS):
            try:
                sample = self._decode(self._stand_in(slot, attempt), place)
            except CorruptData:
                continue  # it will be found in its own place
            return replace(sample, meta=sample.meta | {"stands_in_for": name})
        raise UserError(
            f"{index.place}: no usable sample among {ATTEMPTS}, as {findings[-1].name}: {findings[-1].reason}; "
            "restore or repack the shards"
        )

    def _stand_in(self, slot: Slot, attempt: int) -> Slot:
        """A sample of the same source and shape, a function of (seed, slot, attempt)."""
        draw = uniform(1, self.reading.seed, *slot, "stand-in", attempt)[0]
        shard, row = self.shapes[slot.source].sample(self._bucket(slot), float(draw))
        return slot._replace(shard=shard, row=row)

    def _bucket(self, slot: Slot) -> Bucket:
        return self.shapes[slot.source].bucket(slot.shard, slot.row)

    def _decode(self, slot: Slot, place: _BatchSlot) -> Sample:
        index = self.indices[slot.source]
        number, frames, latents = place
        into = None if latents is None else latents.bytes_of(number)
        raw = self.readers[slot.source].read(slot.shard, slot.row, self.buffers, number, into)
        try:
            return decode_sample(
                raw,
                index,
                with_frames=self.reading.with_frames,
                shape=self.shapes[slot.source].shape(slot.shard, slot.row),
                source=slot.source,
                frames_into=None if frames is None else frames.rows[number],
            )
        except CorruptData as error:
            raise CorruptData(f"{index.shards[slot.shard].name}/{error.name}", error.reason) from error


def refusal(index: ShardIndex, error: CorruptData) -> UserError:
    """What `on_corrupt=stop` says of a shard or sample."""
    return UserError(
        f"{index.place}/{error.name}: {error.reason}; restore or repack it, or leave it out with data.on_corrupt=skip"
    )
