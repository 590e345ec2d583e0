"""A source of clips -> shard folder: every sample once, resumable.

Three passes over a work folder beside the result. First every unit of the source (an episode, some rows, a tar) is read
once, front to back, and its samples are written as ready tar entries to a spool file of its own. Then the entries are
copied into the shards in the order of one seeded permutation over all samples, so that every shard mixes episodes
(inside a shard, samples of one shape stand together); and the episodes' numbers go through the statistics in the order
of the units. At last the finished folder is renamed to its
name. Each unit and each shard appears complete or not at all, so that the same command goes on where an earlier one was
stopped, by whatever. The bytes of the result do not depend on that, nor on the number of processes.

Memory holds one episode's pictures and the index of entries; the disk briefly holds the data twice.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import json
import math
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.config import BelieveConfig, ClipConfig, LimitsConfig, WindowConfig
from dataloaders.consistency.report import CONSISTENCY, Contradiction, report
from dataloaders.files.workers import spread
from dataloaders.packing.members import MemberEncoder, MemberWriter, half
from dataloaders.packing.recipe import done_before, files_digest, recipe_of
from dataloaders.packing.spool import Spool, SpoolRecord
from dataloaders.packing.statistics import DatasetStatistics
from dataloaders.shards import (
    EMPTY_CONTEXT,
    INDEX,
    STATISTICS,
    ShardIndex,
    ShardInfo,
    write_shard,
)
from dataloaders.sources.base import Source, SourceSettings
from dataloaders.sources.open import open_source
from dataloaders.sources.rows import FIELD
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import locked, sha256_of, write_json, write_whole
from kairos_train.basics.progress import progress, track

QUARANTINE = "quarantine.jsonl"
LoadEncoder = Callable[[int], MemberEncoder]
"""Number of the process -> the frozen encoders. Picklable when there are several processes."""


@dataclass(frozen=True)
class _Job:
    """What a process needs to pack units."""

    location: Path | str
    settings: SourceSettings
    work: Path
    encoder: LoadEncoder | None
    skip_bad: bool


def pack(
    source: Path | str,
    out: Path | str,
    *,
    window: WindowConfig,
    prompt_template: str,
    clips: ClipConfig | None = None,
    captions: Path | None = None,
    only_episodes: Sequence[tuple[int, int]] | None = None,
    believe: BelieveConfig | None = None,
    timestamp_tolerance: float = 1e-4,
    limits: LimitsConfig | None = None,
    shard_samples: int = 256,
    encoder: LoadEncoder | None = None,
    processes: int = 1,
    seed: int = 0,
    on_bad: str = "stop",
) -> dict[str, Any]:
    """Write a source's samples as shards; `out` appears when everything is in it.

    An interrupted call leaves its work beside `out`; the same call goes on with it, and gives the index of a folder
    that it made before.

    Args:
        source: a LeRobot dataset, a manifest of videos or images, or WebDataset tars (see `open_source`).
        prompt_template: text of a robot's sample, with `{task}` where the episode's task goes.
        clips: how plain videos are cut; the schema's defaults when None.
        captions: for LeRobot, JSON lines with `episode_index` and further captions and scores.
        only_episodes: for LeRobot, (first, end) of the episodes to pack, by their index; None: its own split `train`.
        believe: for LeRobot, which side is right where two sources within the dataset contradict each other.
        timestamp_tolerance: for LeRobot, seconds a row's timestamp may lie from its frame.
        limits: of what the source's files may hold and name; the schema's defaults when None.
        shard_samples: most samples of a shard; the shards' sizes differ by one at most.
        encoder: makes the encoders whose latents and contexts are stored, as float16, in every process.
        processes: units packed at the same time.
        seed: of the permutation that mixes the units.
        on_bad: "stop" raises for what cannot be used; "skip" leaves it out, lists it in quarantine.jsonl and counts it.

    Returns:
        The content of index.json.

    Raises:
        UserError: `out` exists and holds something else, or is being packed; a setting, key, camera, task, episode,
            clip or action that cannot be used (named).
    """
    out = Path(out)
    settings = SourceSettings(
        window,
        clips or ClipConfig(),
        prompt_template,
        captions,
        only_episodes=None if only_episodes is None else tuple(only_episodes),
        believe=believe or BelieveConfig(),
        timestamp_tolerance=timestamp_tolerance,
        limits=limits or LimitsConfig(),
    )
    _check_settings(out, shard_samples, processes, on_bad)
    opened = open_source(source, settings)
    encoders = None if encoder is None else encoder(0)
    identity = None if encoders is None else encoders.identity
    recipe = recipe_of(opened, settings, identity, {"samples": shard_samples, "seed": seed, "on_bad": on_bad})
    if out.exists() or out.is_symlink():
        index = done_before(out, recipe, opened)
        _sweep(_work_path(out, recipe))
        return index
    with _work_folder(out, recipe) as work:
        job = _Job(source, settings, work, encoder, on_bad == "skip")
        empty = None if encoders is None else half("empty context", encoders.context("", None))
        if processes > 1:
            encoders = None  # every process has its own: these would be in their way
        records = _pack_units(job, opened, encoders, processes)
        shards = work / "shards"
        index = _write_folder(shards, job, opened, records, shard_samples, seed)
        index |= {"encoders": identity, "recipe": recipe, "files_sha256": files_digest(opened)}
        if empty is not None:
            np.save(shards / EMPTY_CONTEXT, empty)
        write_json(shards / INDEX, index)
        os.rename(shards, out)
    return index


def _check_settings(out: Path, shard_samples: int, processes: int, on_bad: str) -> None:
    for setting, value in (("shard_samples", shard_samples), ("processes", processes)):
        if value < 1:
            raise UserError(f"{setting}={value}: must be at least 1")
    if on_bad not in ("stop", "skip"):
        raise UserError(f"on_bad={on_bad!r}: must be stop or skip")
    if not out.name:
        raise UserError(f"{out}: is no name for a new folder; choose another")


@contextmanager
def _work_folder(out: Path, recipe: str) -> Iterator[Path]:
    """The folder of this packing's unfinished work, for this process alone; removed when the block ends well."""
    work = _work_path(out, recipe)
    known = out.parent.glob(f".{glob.escape(out.name)}.*.packing") if out.parent.is_dir() else ()
    for other in known:
        if other == work:
            continue
        if next((other / "units").glob("*/*.json"), None) is None and _sweep(other):
            continue  # refused before a single unit was done
        raise UserError(
            f"{other}: unfinished packing of {out.name} from another source or with other settings; "
            "finish that one, or remove the folder"
        )
    work.mkdir(parents=True, exist_ok=True)
    with locked(work / "lock", wait=False) as mine:
        if not mine:
            raise UserError(f"{out}: is being packed by another process; wait for it")
        yield work
        shutil.rmtree(work, ignore_errors=True)


def _work_path(out: Path, recipe: str) -> Path:
    return out.parent / f".{out.name}.{recipe[:12]}.packing"


def _sweep(work: Path) -> bool:
    """Remove what a packing left that has ended, as one that was killed after its last rename; False: it still runs."""
    if not work.is_dir():
        return True
    with locked(work / "lock", wait=False) as mine:
        if mine:
            shutil.rmtree(work, ignore_errors=True)
        return mine


# --- units ---


def _pack_units(job: _Job, source: Source, encoders: MemberEncoder | None, processes: int) -> list[SpoolRecord]:
    """The records of all units, in their order; those that an earlier call left are taken as they are."""
    spool = Spool(job.work / "units")
    records = {unit: record for unit in range(source.units) if (record := spool.record(unit)) is not None}
    todo = [unit for unit in range(source.units) if unit not in records]
    if processes == 1 or len(todo) < 2:
        make = functools.partial(_packer, job, source=source, encoders=encoders)
    else:
        make = functools.partial(_packer, job)
    with progress("pack", source.units, "units" if source.sizes_differ else "episodes", done=len(records)) as advance:
        for unit, _ in spread(make, todo, processes):
            records[unit] = spool.record(unit)
            if records[unit] is None:
                raise UserError(f"{source.name}: unit {unit}: its files changed while they were read; run again")
            advance(len(records))
    return [records[unit] for unit in range(source.units)]


def _packer(
    job: _Job, worker: int, *, source: Source | None = None, encoders: MemberEncoder | None = None
) -> Callable[[int], None]:
    """What a process does with the number of a unit. It opens what it is not given."""
    source = source or open_source(job.location, job.settings)
    if encoders is None and job.encoder is not None:
        encoders = job.encoder(worker)
    spool, writer = Spool(job.work / "units"), MemberWriter(encoders)
    return lambda unit: spool.write(unit, source, writer, skip_bad=job.skip_bad)


# --- the folder ---


def _write_folder(
    folder: Path, job: _Job, source: Source, records: Sequence[SpoolRecord], shard_samples: int, seed: int
) -> dict[str, Any]:
    """Shards, statistics and quarantine list; returns the index without what only `pack` knows."""
    entries = np.concatenate([np.insert(record.samples, 0, unit, axis=1) for unit, record in enumerate(records)])
    bad = [{"name": name, "reason": reason} for record in records for name, reason in record.bad]
    if not len(entries):
        last = f"; {bad[0]['name']}: {bad[0]['reason']}" if bad else ""
        found = next((Contradiction(**values) for record in records for values in record.contradictions), None)
        raise UserError(f"{job.location}: has no usable sample{last or f'; {found}' if found else last}")
    dims = _one_size(job.location, records)
    spool = Spool(job.work / "units")
    order = list(range(len(entries)))
    random.Random(seed).shuffle(order)
    entries = entries[order]
    plan = hashlib.sha256(entries.tobytes() + repr([record.files for record in records]).encode()).hexdigest()
    notes = job.work / f"shards.{plan[:12]}"
    if not notes.is_dir():  # shards of an earlier call, before the source's files changed
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        notes.mkdir()
    if bad:
        write_whole(folder / QUARANTINE, "".join(json.dumps(line, sort_keys=True) + "\n" for line in bad))
    shards = _write_shards(folder, notes, spool, entries, shard_samples)
    statistics, rank_error = _statistics(job.settings.window, spool, records)
    write_json(folder / STATISTICS, statistics)
    found = [
        *source.contradictions,
        *(Contradiction(**values) for record in records for values in record.contradictions),
    ]
    write_json(folder / CONSISTENCY, report(found, job.settings.believe, job.settings.timestamp_tolerance))
    left_out = sum((Counter(record.left_out) for record in records), Counter())
    episodes = {"episodes": sum(len(record.samples) > 0 for record in records)}
    about = {"seed": seed} | ({} if source.sizes_differ else episodes)
    about |= {"frames": sum(record.frames for record in records), "quantile_rank_error": rank_error}
    about |= {"quarantined": len(bad)}
    about |= {"left_out": {name: n for name, n in sorted(left_out.items()) if not name.startswith(FIELD)}}
    index = ShardIndex(
        folder=folder,
        samples=len(entries),
        window=job.settings.window,
        prompt_template=job.settings.prompt_template,
        action_dim=dims[0],
        state_dim=dims[1],
        fps=float(source.fps),
        encoders=None,
        tasks=sorted({task for record in records for task in record.tasks}),
        source=source.describe() | about | _texts(source, records, left_out, source.notes(statistics)),
        shards=shards,
        clips=job.settings.clips if source.sizes_differ else None,
        shapes=_shapes(entries),
        captions=list(dict.fromkeys(name for record in records for name in record.captions)),
        scores=sorted({name for record in records for name in record.scores}),
        statistics_sha256=sha256_of(folder / STATISTICS),
    )
    return index.to_dict()


def _texts(source: Source, records: Sequence[SpoolRecord], left_out: Counter[str], notes: list[str]) -> dict[str, Any]:
    """Notes, and where captions may have been missed: samples without any, fields that mean nothing here."""
    fields = {name.removeprefix(FIELD) for name in left_out if name.startswith(FIELD)}
    unused = sorted(fields | set(source.describe().get("columns_left_out", ())))
    if not source.sizes_differ:
        return {"notes": notes} | ({"columns_left_out": unused} if unused else {})
    silent, samples = (sum(counts) for counts in zip(*((r.without_caption, len(r.samples)) for r in records)))
    said = [f"{silent:,} of {samples:,} samples have no caption"] if silent else []
    said += [f"fields left out: {', '.join(unused)} (a caption is called caption)"] if unused else []
    notes = [*notes, *(["; ".join(said)] if said else [])]
    return {"notes": notes, "without_caption": silent, "columns_left_out": unused}


def _one_size(location: Path | str, records: Sequence[SpoolRecord]) -> tuple[int, int]:
    """(action_dim, state_dim) of all episodes; (0, 0) without a robot."""
    first: dict[tuple[int, int], int] = {}
    for unit, record in enumerate(records):
        if record.dims is not None:
            first.setdefault(tuple(record.dims), unit)
    if len(first) > 1:
        (one, a), (other, b) = list(first.items())[:2]
        raise UserError(
            f"{location}: unit {a} has actions and states of {one[0]} and {one[1]} dimensions, unit {b} of {other[0]} "
            f"and {other[1]}; one dataset is one embodiment: divide it, pack its parts and mix them with data.sources"
        )
    return next(iter(first), (0, 0))


def _write_shards(
    folder: Path, notes: Path, spool: Spool, entries: np.ndarray, shard_samples: int
) -> tuple[ShardInfo, ...]:
    """The tars; those that have a note in `notes` were finished by an earlier call.

    entries: int64 (N, 6) of unit, offset, size, frames, height and width, in the order of the shards.
    """
    count = math.ceil(len(entries) / shard_samples)
    bounds = [i * len(entries) // count for i in range(count + 1)]
    one_shape = (entries[:, 3:] == entries[0, 3:]).all()
    shards = []
    for i in track(range(count), "write shards", count, "shards"):
        name = f"shard-{i:06d}.tar"
        note = notes / f"{name}.json"
        if not note.is_file():
            rows = entries[bounds[i] : bounds[i + 1]]
            rows = rows[np.lexsort(rows[:, :2:-1].T)]  # by frames, height, width; stable
            info = write_shard(notes / name, spool.blocks(rows[:, :3]))
            runs = [[*shape, len(list(run))] for shape, run in itertools.groupby(rows[:, 3:].tolist())]
            os.replace(notes / name, folder / name)
            write_json(note, asdict(info) | {"shapes": None if one_shape else runs})
        shards.append(ShardInfo(**json.loads(note.read_text())))
    return tuple(shards)


def _statistics(window: WindowConfig, spool: Spool, records: Sequence[SpoolRecord]) -> tuple[dict[str, Any], float]:
    """(content of dataset_stats.json, largest rank error of its quantiles)."""
    with_numbers = [(unit, record) for unit, record in enumerate(records) if record.numbers and len(record.samples)]
    if not with_numbers:
        return {"action": {}, "state": {}, "num_episodes": 0, "num_transition": 0}, 0.0
    statistics = DatasetStatistics(window, state_key=window.state_key, action_key=window.action_key)
    for unit, record in with_numbers:
        statistics.add(*spool.numbers(unit, record), [tuple(run) for run in record.runs])
    return statistics.result(), statistics.rank_error


def _shapes(entries: np.ndarray) -> list[dict[str, int]]:
    shapes, counts = np.unique(entries[:, 3:], axis=0, return_counts=True)
    return [
        {"frames": t, "height": h, "width": w, "samples": n} for (t, h, w), n in zip(shapes.tolist(), counts.tolist())
    ]
