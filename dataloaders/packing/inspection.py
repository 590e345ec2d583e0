"""What a dataset or a folder of shards holds: counts, hours, sizes, ranges, and pictures to look at.

Counts come from tables and indexes and are exact. Ranges of actions and states come from dataset_stats.json, or from
the numbers of up to EPISODES episodes; histograms from those or from about WINDOWS windows; what was looked at is said
beside them. Pictures are evenly spread over the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.config import MIN_RANGE, DataConfig
from dataloaders.consistency.report import Contradicted, lines, read_report, report
from dataloaders.files.npy import read_npy
from dataloaders.files.urls import is_url
from dataloaders.files.video import decode_mp4, frame_times
from dataloaders.lerobot.reader import LeRobotDataset
from dataloaders.lerobot.splits import choose_episodes
from dataloaders.lerobot.vectors import columns_of, read_modality, read_vector, stillness
from dataloaders.packing.dataset_check import check_episode, open_dataset, source_settings
from dataloaders.packing.findings import Findings, Strip, Vector
from dataloaders.shards import INDEX, CorruptData, ShardIndex, ShardInfo, read_index, read_shard
from dataloaders.sources.base import Clip
from dataloaders.sources.open import is_source_file, kind_of, open_source
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import new_folder
from kairos_train.basics.foreign_files import parse_json
from kairos_train.basics.secrets import redacted

EPISODES = 1000
WINDOWS = 2000  # about: whole shards
UNITS = 50
FRAMES = 6
"""Pictures of a row of the contact sheet."""


def inspect(location: Path | str, out: Path, *, data: DataConfig, samples: int = 12) -> list[str]:
    """Write DIR/index.html with its pictures and report.json; DIR appears when all is in it.

    Args:
        location: shards written by `pack`, or what `pack` takes.
        data: window and clips, as packing would use them.
        samples: rows of the contact sheet.

    Returns:
        The facts, one line each.

    Raises:
        UserError: `out` exists; nothing that can be inspected, or it cannot be read.
    """
    from dataloaders.packing.inspection_page import write_page

    out = Path(out)
    if out.exists():
        raise UserError(f"{out}: exists; remove it or choose another output folder")
    findings = _findings(location, data, samples)
    with new_folder(out) as work:
        write_page(findings, work)
    return [f"{name}: {text}" for name, text in findings.facts]


def _findings(location: Path | str, data: DataConfig, samples: int) -> Findings:
    if (is_url(location) and not is_source_file(location)) or (
        not is_url(location) and (Path(location) / INDEX).is_file()
    ):
        return _of_shards(location, samples)
    if kind_of(location) == "lerobot":
        return _of_lerobot(Path(location), data, samples)
    return _of_clips(location, data, samples)


# --- shards ---


def _of_shards(folder: Path | str, samples: int) -> Findings:
    index = read_index(folder)
    found = Findings(redacted(f"shards {folder}"))
    source, size = index.source, sum(shard.bytes for shard in index.shards)
    found.facts.append(("samples", f"{index.samples:,} in {len(index.shards):,} shards, {size / 1e6:,.1f} MB"))
    origin = [str(source[key]) for key in ("dataset", "version", "robot_type") if source.get(key)]
    found.facts.append(("source", ", ".join(origin) or "unknown"))
    if source.get("frames"):
        found.facts.append(("length", _length(source.get("episodes"), source["frames"], index.fps)))
    if source.get("cameras"):
        found.facts.append(("cameras", f"{', '.join(source['cameras'])} ({index.window.layout})"))
    if index.encoders is not None:
        found.facts.append(("encoded", ", ".join(f"{k}: {v.get('kind')}" for k, v in index.encoders.items())))
    if source.get("quarantined") or source.get("left_out"):
        left = ", ".join(f"{n:,} {name}" for name, n in source.get("left_out", {}).items())
        found.facts.append(
            ("left out", f"{source.get('quarantined', 0):,} quarantined" + (f", {left}" if left else ""))
        )
    found.facts += [("note", note) for note in source.get("notes", [])]
    _consistency(found, read_report(folder), "when it was packed")
    if index.shapes:
        _resolutions(found, [(s["frames"], s["height"], s["width"], s["samples"]) for s in index.shapes])
    _shard_samples(found, index, samples)
    if index.action_dim:
        _ranges_of_statistics(found, index)
    return found


def _shard_samples(found: Findings, index: ShardIndex, samples: int) -> None:
    """Strips, histograms, tasks and scores of the samples of some shards: each of them mixes the whole dataset."""
    per_shard = index.samples / len(index.shards)
    shards = [index.shards[i] for i in _spread(len(index.shards), max(1, round(WINDOWS / per_shard)))]
    count = sum(shard.samples for shard in shards)
    shown = set(_spread(count, samples))
    numbers: dict[str, list[np.ndarray]] = {"action": [], "state": []}
    tasks, captions, scores = Counter(), Counter(), {}
    for number, raw in enumerate(_raw_samples(index, shards)):
        meta = parse_json(raw["json"])
        if number in shown:
            given = {"name": raw["__key__"], "suffix": ".mp4"}
            wanted = _spread(len(frame_times(raw["mp4"], **given)), FRAMES)
            pictures = decode_mp4(raw["mp4"], indices=wanted, **given)
            found.strips.append(Strip(raw["__key__"], meta["text"], pictures))
        tasks[meta.get("task", "")] += 1
        captions.update(list(meta.get("captions", {})) or ["(none)"])
        for name, value in meta.get("scores", {}).items():
            scores.setdefault(name, []).append(value)
        if index.action_dim:
            numbers["action"].append(read_npy(raw["action.npy"])[: meta["valid_actions"]])
            numbers["state"].append(read_npy(raw["state.npy"]))
    of = f"{count:,} of {index.samples:,} samples"
    for name, values in numbers.items():
        if values:
            rows = np.concatenate(values)
            found.vectors.append(Vector(name, rows, rows.min(0).tolist(), rows.max(0).tolist(), of))
    _texts(found, tasks, captions, of)
    for name, values in sorted(scores.items()):
        text = f"{min(values):g} to {max(values):g}, median {np.median(values):g} in {of}"
        found.facts.append((f"score {name}", text))


def _raw_samples(index: ShardIndex, shards: Sequence[ShardInfo]) -> Iterator[dict[str, Any]]:
    try:
        for shard in shards:
            yield from read_shard(index.folder, shard)
    except CorruptData as error:
        raise UserError(f"{index.folder}: {error}; `data verify` names all that is damaged") from error


def _ranges_of_statistics(found: Findings, index: ShardIndex) -> None:
    statistics = index.statistics()
    for group, key in (("action", index.window.action_key), ("state", index.window.state_key)):
        fields = statistics.get(group, {}).get(key)
        if fields is None:
            raise UserError(f"{index.folder}: dataset_stats.json has no {group} statistics for {key!r}; pack again")
        names = ("min", "q01", "mean", "std", "q99", "max")
        rows = [[str(d), *(f"{fields[f'global_{n}'][d]:.4g}" for n in names)] for d in range(len(fields["global_min"]))]
        found.tables[f"{group}: {key}"] = [["dimension", *names], *rows]
        for vector in found.vectors:
            if vector.name == group:
                vector.low, vector.high = fields["global_min"], fields["global_max"]
        low, high = min(fields["global_min"]), max(fields["global_max"])
        still = sum(b - a < MIN_RANGE for a, b in zip(fields["global_min"], fields["global_max"]))
        found.facts.append((group, f"{len(rows)} dimensions from {low:.4g} to {high:.4g}, {still} never move"))


# --- sources ---


def _of_lerobot(root: Path, data: DataConfig, samples: int) -> Findings:
    dataset = open_dataset(root, data)
    found, outline = Findings(f"LeRobot dataset {root}"), dataset.outline()
    if not outline:
        raise UserError(f"{root}: has no episodes; there is nothing to inspect")
    lengths = np.array([length for _, length, *_ in outline])
    found.facts.append(("source", f"LeRobot {dataset.version}, {dataset.robot_type or 'unnamed robot'}"))
    found.facts.append(("length", _length(len(outline), int(lengths.sum()), dataset.fps)))
    found.facts.append(
        ("episodes", f"{lengths.min():,} to {lengths.max():,} frames, median {int(np.median(lengths)):,}")
    )
    tasks = Counter(task for _, _, texts, _ in outline for task in texts)
    _texts(found, tasks, Counter(), f"{len(outline):,} episodes")
    for camera in dataset.camera_keys:
        found.facts.append(("camera", _camera(dataset, camera)))
    if declared := sorted(set(_cameras(dataset.features)) - set(dataset.camera_keys)):
        found.facts.append(("without files", ", ".join(declared)))
    _, notes = choose_episodes(root, [index for index, *_ in outline], None)
    found.facts += [("note", note) for note in notes]
    _lerobot_numbers(found, dataset, data)
    _lerobot_consistency(found, dataset, data)
    shown = data.window.cameras or [key for key in dataset.camera_keys if key not in dataset.depth_keys]
    for number in _spread(dataset.num_episodes, samples) if shown else ():
        episode, camera = dataset.examine(number), shown[0]
        try:
            pictures = episode.frames(camera, _spread(episode.length, FRAMES))
        except Contradicted:
            continue
        label = f"episode {episode.index}, {episode.length} frames, {camera}"
        found.strips.append(Strip(label, episode.tasks[0] if episode.tasks else "", pictures))
    return found


def _camera(dataset: LeRobotDataset, camera: str) -> str:
    depth = ", depth: packed only where data.window.cameras names it" if camera in dataset.depth_keys else ""
    try:
        height, width = dataset.episode(0).frames(camera, [0]).shape[1:3]
    except UserError as error:
        return f"{camera}{depth}, cannot be packed: {error}"
    return f"{camera}, {height}×{width}{depth}"


def _lerobot_numbers(found: Findings, dataset: LeRobotDataset, data: DataConfig) -> None:
    modality = read_modality(dataset.root)
    looked_at = _spread(dataset.num_episodes, EPISODES)
    of = f"{len(looked_at):,} of {dataset.num_episodes:,} episodes"
    for name, key in (("action", data.window.action_key), ("state", data.window.state_key)):
        try:
            parts = columns_of(key, dataset.features, modality)
        except UserError as error:
            found.facts.append((name, str(error)))
            continue
        values = []
        for number in looked_at:
            episode = dataset.examine(number)
            values.append(read_vector(episode.columns, episode.length, parts, f"episode {episode.index}"))
        rows = np.concatenate(values)
        low, high = rows.min(0), rows.max(0)
        found.vectors.append(Vector(name, rows, low.tolist(), high.tolist(), of))
        head = ["dimension", "min", "mean", "std", "max"]
        table = np.stack([low, rows.mean(0), rows.std(0), high], axis=1)
        found.tables[f"{name}: {key}"] = [head, *([str(d), *(f"{v:.4g}" for v in row)] for d, row in enumerate(table))]
        still = int((high - low < MIN_RANGE).sum())
        found.facts.append(
            (name, f"{rows.shape[1]} dimensions from {low.min():.4g} to {high.max():.4g}, {still} never move")
        )
        about = {"parts": parts, "features": dataset.features, "window": data.window}
        if note := stillness(name, low, high, **about):
            found.facts.append(("note", note))


def _lerobot_consistency(found: Findings, dataset: LeRobotDataset, data: DataConfig) -> None:
    """What its tables, rows and videos say differently, of up to UNITS episodes."""
    looked_at = _spread(dataset.num_episodes, UNITS)
    parts = [check_episode(dataset, number, data.window) for number in looked_at]
    contradictions = [*dataset.contradictions, *(c for part in parts for c in part.contradictions)]
    told = report(contradictions, data.believe, data.timestamp_tolerance)
    _consistency(found, told, f"{len(looked_at):,} of {dataset.num_episodes:,} episodes")
    faults = [list(fault) for part in parts for fault in part.faults]
    if faults:
        found.facts.append(("cannot be used", f"{len(faults):,} in {len(looked_at):,} episodes"))
        found.tables["cannot be used"] = [["name", "reason"], *faults]


def _of_clips(location: Path | str, data: DataConfig, samples: int) -> Findings:
    source = open_source(location, source_settings(data))
    found = Findings(redacted(f"clips {location}"))
    about = source.describe()
    found.facts += [
        (k.replace("_", " "), ", ".join(v) if isinstance(v, list) else str(v)) for k, v in about.items() if v
    ]
    shapes, captions, bad, seconds = Counter(), Counter(), [], 0.0
    looked_at = _spread(source.units, UNITS)
    for unit in looked_at:
        for clip in source.unit(unit).samples:
            if not isinstance(clip, Clip):
                bad.append([clip.name, clip.reason])
                continue
            shapes[clip.frames.shape[:3]] += 1
            captions.update(list(clip.captions) or ["(none)"])
            seconds += len(clip.frames) / clip.fps
            pictures = clip.frames[_spread(len(clip.frames), FRAMES)]
            found.strips.append(Strip(clip.key, next(iter(clip.captions.values()), ""), pictures))
    of = f"{len(looked_at):,} of {source.units:,} units"
    count = sum(shapes.values())
    found.facts.append(("samples", f"{count:,} in {of}, {seconds / 3600:.3f} h at up to {data.clips.fps:g} fps"))
    found.facts.append(("cannot be used", f"{len(bad):,} in {of}"))
    if bad:
        found.tables["cannot be used"] = [["name", "reason"], *bad[:100]]
    _resolutions(found, [(*shape, n) for shape, n in sorted(shapes.items())])
    _texts(found, Counter(), captions, of)
    found.strips = [found.strips[i] for i in _spread(len(found.strips), samples)]
    return found


# --- shared ---


def _consistency(found: Findings, told: dict[str, Any] | None, of: str) -> None:
    """Contradictions by kind; one that is not resolved is refused when it is packed."""
    if told is None or not told["contradictions"]:
        return
    found.facts += [("contradiction", line) for line in lines(told)]
    rows = [
        [e["name"], e["where"], "; ".join(map(" ".join, e["says"])), e["believed"] or "neither", f"{e['count']:,}"]
        for e in told["contradictions"]
    ]
    found.tables[f"contradictions ({of})"] = [["name", "first", "what is said", "believed", "count"], *rows]


def _length(episodes: int | None, frames: int, fps: float) -> str:
    hours = frames / fps / 3600
    return f"{f'{episodes:,} episodes, ' if episodes else ''}{frames:,} frames at {fps:g} fps, {hours:.3f} h"


def _resolutions(found: Findings, shapes: Sequence[tuple[int, int, int, int]]) -> None:
    rows = [[str(t), f"{h}×{w}", f"{n:,}"] for t, h, w, n in sorted(shapes, key=lambda s: (-s[3], -s[0]))]
    found.tables["sizes (frames, height×width)"] = [["frames", "size", "samples"], *rows]
    if rows:
        first = f"{rows[0][0]} frames of {rows[0][1]}"
        found.facts.append(("sizes", first if len(rows) == 1 else f"{len(rows)}, most often {first} ({rows[0][2]})"))


def _texts(found: Findings, tasks: Counter[str], captions: Counter[str], of: str) -> None:
    tasks.pop("", None)
    if tasks:
        found.facts.append(("tasks", f"{len(tasks):,} in {of}"))
        found.tables[f"tasks ({of})"] = [["task", "count"], *([t, f"{n:,}"] for t, n in tasks.most_common(50))]
    if captions:
        found.facts.append(
            ("captions", ", ".join(f"{name} ({n:,})" for name, n in captions.most_common()) + f" in {of}")
        )


def _cameras(features: dict[str, Any]) -> list[str]:
    return [key for key, feature in features.items() if feature["dtype"] in ("video", "image")]


def _spread(length: int, count: int) -> list[int]:
    """At most `count` numbers below `length`, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int)).tolist() if length else []
