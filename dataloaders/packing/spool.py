"""Packed units on their way into shards: one spool file and one record per unit, both there or neither.

A spool file holds the tar entries of the unit's samples one behind the other, then its states and actions as .npy. The
record is written last and says where each of them lies, so that a unit whose record is there is done. Both are renamed
into place: whatever is killed leaves only files that nobody reads.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.consistency.report import LEFT_OUT
from dataloaders.packing.members import MemberWriter, npy
from dataloaders.shards import sample_block
from dataloaders.sources.base import Bad, Clip, Source, Unit
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import replacing, write_whole

_FOLDER_UNITS = 1000  # units of a folder
_NOT_THE_SOURCE = (MemoryError, ImportError)  # the machine's fault; of any other error, --on-bad skip blames the source


@dataclass
class SpoolRecord:
    """What a unit gave.

    Attributes:
        samples: (offset, size, T, H, W) of each; an int64 array (n, 5) once it is read back.
        frames: raw frames of the episode; for clips, frames of the samples.
        dims: (action_dim, state_dim); None without a robot.
        runs: of the episode, as `Unit` has them.
        without_caption: samples.
        contradictions: as `Contradiction` has them.
        numbers: (offset, size) of the states and the actions.
        bad: (name, reason) of what cannot be used.
        files: [bytes, modification time in ns] of what it was read from, by path.
    """

    samples: Any = field(default_factory=list)
    frames: int = 0
    tasks: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    scores: list[str] = field(default_factory=list)
    dims: list[int] | None = None
    runs: list[list[int]] = field(default_factory=list)
    without_caption: int = 0
    contradictions: list[dict[str, Any]] = field(default_factory=list)
    numbers: list[list[int]] = field(default_factory=list)
    bad: list[list[str]] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    files: dict[str, list[int]] = field(default_factory=dict)


class Spool:
    """The units of one packing in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def record(self, unit: int) -> SpoolRecord | None:
        """What is known of a unit; None when it is not done, or its files are no longer what they were."""
        path = self._path(unit, "json")
        if not path.is_file():
            return None
        record = SpoolRecord(**json.loads(path.read_text()))
        record.samples = np.array(record.samples, dtype=np.int64).reshape(-1, 5)  # millions of lists would be gigabytes
        return record if record.files == _signatures(map(Path, record.files)) else None

    def write(self, unit: int, source: Source, writer: MemberWriter, *, skip_bad: bool) -> None:
        """Pack one unit.

        Raises:
            UserError: something in it cannot be used and `skip_bad` is false.
        """
        spool = self._path(unit, "spool")
        spool.parent.mkdir(parents=True, exist_ok=True)
        with replacing(spool) as temporary, temporary.open("wb") as file:
            record = _pack(unit, source, writer, file, skip_bad)
        write_whole(self._path(unit, "json"), json.dumps(asdict(record)))

    def blocks(self, rows: np.ndarray) -> Iterator[bytes]:
        """The tar entries of samples: int64 (n, 3) of unit, offset and size, in the order given."""
        for unit, offset, size in rows.tolist():
            yield self._read(unit, offset, size)

    def numbers(self, unit: int, record: SpoolRecord) -> tuple[np.ndarray, np.ndarray]:
        """States and actions of a unit's episode."""
        state, actions = (np.load(io.BytesIO(self._read(unit, *place)), allow_pickle=False) for place in record.numbers)
        return state, actions

    def _read(self, unit: int, offset: int, size: int) -> bytes:
        with self._path(unit, "spool").open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def _path(self, unit: int, suffix: str) -> Path:
        return self._folder / f"{unit // _FOLDER_UNITS:06d}" / f"{unit:09d}.{suffix}"


def _pack(unit: int, source: Source, writer: MemberWriter, file: io.BufferedWriter, skip_bad: bool) -> SpoolRecord:
    try:
        found = source.unit(unit)
    except _NOT_THE_SOURCE:
        raise
    except Exception as error:
        if not skip_bad:
            raise
        settled = [asdict(replace(c, believed=LEFT_OUT)) for c in getattr(error, "contradictions", ())]
        return SpoolRecord(bad=[_line(Bad(f"{source.name}: unit {unit}", _reason(error)))], contradictions=settled)
    record = SpoolRecord(files=_signatures(found.files))
    for sample in _samples(found, skip_bad):
        if sample is None:  # an episode that cannot be read to its end counts as none
            return SpoolRecord(bad=record.bad, files=record.files)
        block = sample if isinstance(sample, Bad) else _block(sample, writer, skip_bad)
        if isinstance(block, Bad):
            record.bad.append(_line(block))
            continue
        record.samples.append([file.tell(), len(block), *sample.frames.shape[:3]])
        file.write(block)
        record.frames += len(sample.frames)
        record.without_caption += not any(sample.captions.values())
        record.tasks.append(sample.meta.get("task", ""))
        record.captions += sample.captions
        record.scores += sample.scores
    record.contradictions = [asdict(contradiction) for contradiction in found.contradictions]
    record.left_out = {k: n for k, n in found.left_out.items() if n}
    record.tasks = sorted({task for task in record.tasks if task})
    record.captions, record.scores = (list(dict.fromkeys(names)) for names in (record.captions, record.scores))
    if found.numbers is not None:
        state, actions = found.numbers
        record.frames, record.dims = len(state), [actions.shape[1], state.shape[1]]
        record.runs = [list(run) for run in found.runs]
        for values in found.numbers:
            data = npy(values)
            record.numbers.append([file.tell(), len(data)])
            file.write(data)
    return record


def _block(sample: Clip, writer: MemberWriter, skip_bad: bool) -> bytes | Bad:
    """The tar entries of a sample; what no shard can hold raises unless it may be skipped."""
    try:
        return sample_block(sample.key, writer.members(sample))
    except UserError as error:
        if not skip_bad:
            raise
        return Bad(sample.key, str(error))


def _line(bad: Bad) -> list[str]:
    return [bad.name, bad.reason]


def _samples(unit: Unit, skip_bad: bool) -> Iterator[Clip | Bad | None]:
    """Samples of a unit; None where it breaks off. What cannot be used raises unless it may be skipped."""
    try:
        for sample in unit.samples:
            if isinstance(sample, Bad) and not skip_bad:
                raise UserError(f"{sample.name}: {sample.reason} (--on-bad skip leaves such out)")
            yield sample
    except _NOT_THE_SOURCE:
        raise
    except Exception as error:
        if not skip_bad:
            raise
        yield Bad(unit.name, _reason(error))
        yield None


def _reason(error: Exception) -> str:
    """Of an error that nobody foresaw, its type as well."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {' '.join(str(error).split())}"


def _signatures(files) -> dict[str, list[int]]:
    out = {}
    for path in files:
        if os.path.isfile(path):
            status = path.stat()
            out[str(path)] = [status.st_size, status.st_mtime_ns]
    return out
