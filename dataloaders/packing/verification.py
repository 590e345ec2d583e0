"""Every byte of a shard folder against its index: checksums, counts, and each sample decoded as the loader would.

What is found is named: a file of the folder, a shard, or a sample of it. A unit of work is a shard, read by tar headers
from its start on, so that what lies before damage is still looked at.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataloaders.consistency.report import CONSISTENCY, lines, read_report
from dataloaders.files.urls import download, is_url, join
from dataloaders.files.workers import spread
from dataloaders.shards import INDEX, STATISTICS, CorruptData, ShardIndex, ShardInfo, read_index
from dataloaders.sources.tars import tar_samples
from dataloaders.windows import action_count, picture_size
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import sha256_of
from kairos_train.basics.progress import track


@dataclass(frozen=True)
class ShardFault:
    """Something that does not hold: `name` says where, as `shard-000003.tar/KEY`."""

    name: str
    reason: str


@dataclass
class VerificationResult:
    """What was looked at, what is wrong with it, and what its dataset said in two ways when it was packed."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    faults: list[ShardFault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _ShardVerdict:
    keys: list[str]
    bytes: int
    faults: list[ShardFault]


def verify(folder: Path | str, *, decode: bool = True, processes: int = 1) -> VerificationResult:
    """Look at everything in a shard folder.

    Args:
        decode: decode the clips too; without, all other members are still read.
        processes: shards at the same time.

    Raises:
        UserError: there is no index that can be read, hence nothing to compare with.
    """
    index = read_index(folder)
    verdict = VerificationResult(shards=len(index.shards), faults=_folder_faults(folder, index))
    verdict.faults += [ShardFault(INDEX, reason) for reason in index_faults(index)]
    _add_report(verdict, folder, index)
    found: dict[int, _ShardVerdict] = {}
    make = functools.partial(_looker, folder, index, decode)
    shards = len(index.shards)
    for number, shard in track(spread(make, range(shards), processes), "verify", shards, "shards"):
        found[number] = shard
    seen: dict[str, str] = {}
    for number, info in enumerate(index.shards):
        verdict.bytes += found[number].bytes
        verdict.samples += len(found[number].keys)
        verdict.faults += found[number].faults
        for key in found[number].keys:
            if key in seen:
                verdict.faults.append(ShardFault(f"{info.name}/{key}", f"has the key of a sample of {seen[key]}"))
            seen[key] = info.name
    return verdict


def index_faults(index: ShardIndex) -> list[str]:
    """What an index says of its cameras in one place and not in another."""
    told, packed = list(index.window.cameras), index.source.get("cameras")
    if packed is None or index.clips is not None:
        return []
    faults = []
    if told and told != packed:
        faults.append(f"window.cameras is {', '.join(told)}, source.cameras {', '.join(packed)}")
    size = picture_size(index.window, len(packed))
    for shape in index.shapes:
        if (shape["height"], shape["width"]) != size:
            found = f"{shape['height']}×{shape['width']}"
            faults.append(f"has pictures of {found}; its {len(packed)} cameras give {size[0]}×{size[1]}")
    return faults


def _add_report(verdict: VerificationResult, folder: Path | str, index: ShardIndex) -> None:
    """What the dataset said in two ways when it was packed."""
    try:
        report = read_report(folder)
    except UserError as error:
        verdict.faults.append(ShardFault(CONSISTENCY, str(error)))
        return
    if report is None:
        if index.files_sha256 is not None:
            verdict.faults.append(ShardFault(CONSISTENCY, "is missing"))
        return
    for entry, line in zip(report["contradictions"], lines(report)):
        if entry["believed"] is None:
            verdict.faults.append(ShardFault(CONSISTENCY, line))
        else:
            verdict.notes.append(line)


def _folder_faults(folder: Path | str, index: ShardIndex) -> list[ShardFault]:
    """Of the files beside the shards."""
    faults = []
    try:
        statistics = index.statistics()
        faults += [ShardFault(STATISTICS, reason) for reason in _statistics_faults(statistics, index)]
    except UserError as error:
        faults.append(ShardFault(STATISTICS, str(error)))
    if index.encoders is not None:
        try:
            if index.empty_context() is None:
                faults.append(ShardFault("empty_context.npy", "is missing, but the shards are encoded"))
        except UserError as error:
            faults.append(ShardFault("empty_context.npy", str(error)))
    if not is_url(folder):
        known = {shard.name for shard in index.shards}
        strange = sorted(path.name for path in Path(folder).glob("*.tar") if path.name not in known)
        faults += [ShardFault(name, "is not in the index") for name in strange]
    return faults


def _statistics_faults(statistics: Any, index: ShardIndex) -> Iterator[str]:
    if not index.action_dim:
        return
    steps = {"action": action_count(index.window), "state": 1}
    sizes = {"action": index.action_dim, "state": index.state_dim}
    for group, key in (("action", index.window.action_key), ("state", index.window.state_key)):
        try:
            fields = statistics[group][key]
            for name in ("min", "max", "mean", "std", "q01", "q99"):
                if len(fields[f"global_{name}"]) != sizes[group]:
                    yield f"{group}/{key}: global_{name} is not of {sizes[group]} dimensions"
                if [len(row) for row in fields[f"stepwise_{name}"]] != [sizes[group]] * steps[group]:
                    yield f"{group}/{key}: stepwise_{name} is not of {steps[group]} steps and {sizes[group]} dimensions"
        except (KeyError, TypeError) as error:
            yield f"{group}/{key}: is incomplete ({error}); these are the statistics of another dataset"


# --- one shard ---


def _looker(folder: Path | str, index: ShardIndex, decode: bool, worker: int) -> Callable[[int], _ShardVerdict]:
    return lambda number: _look(folder, index, index.shards[number], decode)


def _look(folder: Path | str, index: ShardIndex, info: ShardInfo, decode: bool) -> _ShardVerdict:
    if is_url(folder):
        with tempfile.TemporaryDirectory() as here:
            try:
                download(join(folder, info.name), Path(here) / info.name, most_bytes=info.bytes)
            except (OSError, UserError) as error:
                return _ShardVerdict([], 0, [ShardFault(info.name, str(error))])
            return _look(here, index, info, decode)
    path = Path(folder) / info.name
    if not path.is_file():
        return _ShardVerdict([], 0, [ShardFault(info.name, "is missing")])
    size, faults, keys = path.stat().st_size, [], []
    digest = sha256_of(path)
    if size != info.bytes:
        faults.append(ShardFault(info.name, f"has {size} bytes, the index says {info.bytes}"))
    elif digest != info.sha256:
        faults.append(ShardFault(info.name, f"sha256 is {digest[:16]}…, the index says {info.sha256[:16]}…"))
    shapes = _shapes(index, info)
    for key, members in tar_samples(path):
        reason = members if isinstance(members, str) else _sample_fault(key, members, index, next(shapes, None), decode)
        if reason is None:
            keys.append(key)
        else:
            faults.append(ShardFault(f"{info.name}/{key}", reason))
    rows = len(keys) + sum("/" in fault.name for fault in faults)
    if rows != info.samples:
        faults.append(ShardFault(info.name, f"holds {rows} samples, the index says {info.samples}"))
    return _ShardVerdict(keys, size, faults)


def _shapes(index: ShardIndex, info: ShardInfo) -> Iterator[tuple[int, int, int] | None]:
    """The shape that each row must have, as far as the index says."""
    if info.shapes is not None:
        for *shape, rows in info.shapes:
            yield from [tuple(shape)] * rows
    elif len(index.shapes) == 1:
        (shape,) = index.shapes
        yield from [(shape["frames"], shape["height"], shape["width"])] * info.samples


def _sample_fault(
    key: str, members: dict[str, bytes], index: ShardIndex, shape: tuple[int, int, int] | None, decode: bool
) -> str | None:
    """Why the loader could not use a sample, or what its members lack; None when nothing is wrong."""
    from dataloaders.loading.batch import decode_sample

    missing = {"mp4", "json"} | ({"latents.npy", "context.npy"} if index.encoders is not None else set())
    if index.action_dim:
        missing |= {"action.npy", "state.npy"}
    if missing := sorted(missing - set(members)):
        return f"lacks {missing[0]}"
    try:
        sample = decode_sample({"__key__": key, **members}, index, with_frames=decode, shape=shape)
    except CorruptData as error:
        return error.reason
    meta = sample.meta
    if index.clips is None and meta.get("fps", index.fps) != index.fps:
        return f"its JSON says {meta['fps']} fps, the index {index.fps}"
    for name, kind in (("captions", str), ("scores", int | float)):
        values = meta.get(name, {})
        if not isinstance(values, dict) or not all(isinstance(v, kind) for v in values.values()):
            return f"its JSON has {name} of a wrong type: {json.dumps(values)[:80]}"
    return None
