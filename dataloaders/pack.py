"""LeRobot dataset -> shard folder: every window of every episode, once.

Two passes. First each episode's video is read once, front to back, and its windows are written as ready tar entries to
a spool file. Then the entries are copied into the shards in the order of one seeded permutation over all windows, so
that every shard mixes episodes. Memory holds one episode's pictures and the index of entries; the disk briefly holds
the data twice. Shards and index are the same bytes at every repetition, for any number of processes.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.shards import EMPTY_CONTEXT, INDEX, STATISTICS, ShardIndex, sample_block, write_json, write_shard
from dataloaders.statistics import dataset_statistics
from dataloaders.windows import check_window, choose_cameras, cut_actions, frame_indices, side_by_side, windows_of
from kairos_train.config.schema import WindowConfig
from kairos_train.errors import UserError

Encode = Callable[[np.ndarray, str], dict[str, np.ndarray]]
FRAME_CHUNK = 256  # raw frames decoded at once
CLIP_GOP = 8  # best balance of size and seeking for training clips


@dataclass(frozen=True)
class _Entry:
    """One sample in a spool file."""

    spool: str
    offset: int
    size: int


@dataclass(frozen=True)
class _PackedEpisode:
    entries: list[_Entry]
    state: np.ndarray  # float32 (L, ds)
    actions: np.ndarray  # float32 (L, da)
    task: str


@dataclass(frozen=True)
class _Job:
    """What a process needs to pack some episodes."""

    source: Path
    spool: Path
    name: str
    window: WindowConfig
    cameras: tuple[str, ...]
    prompt_template: str


def pack(
    source: Path | str,
    out: Path | str,
    *,
    window: WindowConfig,
    prompt_template: str,
    shard_samples: int = 256,
    encode: Encode | None = None,
    encoders_identity: dict[str, Any] | None = None,
    empty_context: np.ndarray | None = None,
    processes: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Cut a LeRobot dataset into windows and write them as shards; `out` appears when everything is in it.

    Args:
        prompt_template: text of a sample, with `{task}` where the episode's task goes.
        shard_samples: most samples of a shard; the shards' sizes differ by one at most.
        encode: (frames uint8 (T, H, W, 3), text) -> {"latents": (16, F, h, w), "context": (N, C)}, stored as float16.
        encoders_identity: what `encode` is, for the index; given with `encode` and only with it.
        empty_context: context of the empty prompt, (N, C), stored once.
        processes: episodes packed at the same time; `encode` lives in this process and allows only 1.
        seed: of the permutation that mixes the episodes.
        progress: called with (episodes done, episodes in all).

    Returns:
        The content of index.json.

    Raises:
        UserError: `out` exists; a setting, key, camera, task, episode or action that cannot be used (named).
    """
    from dataloaders.lerobot.reader import LeRobotDataset

    source, out = Path(source), Path(out)
    _check_settings(out, window, prompt_template, shard_samples, processes, encode)
    if (encode is None) != (encoders_identity is None):
        raise ValueError("encode and encoders_identity come together")
    dataset = LeRobotDataset(source)
    for setting, key in (("state_key", window.state_key), ("action_key", window.action_key)):
        if key not in dataset.features:
            there = ", ".join(sorted(dataset.features))
            raise UserError(f"data.window.{setting}={key!r}: {source} has no such column; it has {there}")
    if dataset.num_episodes < 1:
        raise UserError(f"{source}: has no episodes; there is nothing to pack")
    cameras = tuple(choose_cameras(window.cameras, dataset.camera_keys))
    name = re.sub(r"[^A-Za-z0-9_-]", "_", source.resolve().name) or "dataset"  # a dot would split WebDataset's key
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        (work / "spool").mkdir()
        (work / "shards").mkdir()
        job = _Job(source, work / "spool", name, window, cameras, prompt_template)
        episodes = _pack_episodes(job, dataset, processes, encode, progress)
        index = _write_shards(work / "shards", job, dataset, episodes, shard_samples, encoders_identity, seed)
        if empty_context is not None:
            np.save(work / "shards" / EMPTY_CONTEXT, _half("empty_context", empty_context))
        os.rename(work / "shards", out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return index.to_dict()


def choose_task(tasks: Sequence[str]) -> str | None:
    """The instruction among an episode's task strings.

    Datasets in GR00T's layout attach two strings to every episode, the instruction and the annotation "valid" (the
    episode's validity): the first that is not that word is the instruction.
    """
    return next((task for task in tasks if task.strip() and task != "valid"), None)


def _check_settings(out, window, prompt_template, shard_samples, processes, encode) -> None:
    check_window(window)
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists; remove it or choose another output folder")
    if "{task}" not in prompt_template:
        raise UserError(
            f"data.prompt_template={prompt_template!r}: must contain {{task}}, the place of the instruction"
        )
    for setting, value in (("shard_samples", shard_samples), ("processes", processes)):
        if value < 1:
            raise UserError(f"{setting}={value}: must be at least 1")
    if encode is not None and processes > 1:
        raise UserError(
            f"processes={processes}: encoding happens in one process; use processes=1 or pack without encoders"
        )


def _pack_episodes(job: _Job, dataset, processes: int, encode: Encode | None, progress) -> list[_PackedEpisode]:
    total = dataset.num_episodes
    if processes == 1:
        done = []
        for i in range(total):
            done.append(_pack_episode(job, dataset, i, encode))
            if progress:
                progress(i + 1, total)
        return done
    # contiguous runs, a few per process: the dataset's metadata is read once per run
    runs = [list(map(int, run)) for run in np.array_split(np.arange(total), min(total, processes * 4))]
    packed: dict[int, list[_PackedEpisode]] = {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_pack_run, job, run): i for i, run in enumerate(runs)}
        try:
            for future in as_completed(futures):
                packed[futures[future]] = future.result()
                if progress:
                    progress(sum(map(len, packed.values())), total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [episode for i in range(len(runs)) for episode in packed[i]]


def _pack_run(job: _Job, indices: Sequence[int]) -> list[_PackedEpisode]:
    from dataloaders.lerobot.reader import LeRobotDataset

    dataset = LeRobotDataset(job.source)
    return [_pack_episode(job, dataset, i, None) for i in indices]


def _pack_episode(job: _Job, dataset, number: int, encode: Encode | None) -> _PackedEpisode:
    """Write all windows of one episode to its spool file."""
    episode = dataset.episode(number)
    where = f"{job.source}: episode {episode.index}"
    if episode.length < 1:
        raise UserError(f"{where}: has no frames; remove it from the dataset")
    state = _column(episode, job.window.state_key, where)
    actions = _column(episode, job.window.action_key, where)
    task = choose_task(episode.tasks)
    if task is None:
        raise UserError(f"{where}: has no task string (tasks={list(episode.tasks)}); add one to the dataset")
    windows = windows_of(episode.length, job.window)
    indices = [frame_indices(w.start, episode.length, job.window) for w in windows]
    needed = np.unique(np.concatenate(indices))
    pictures = _read_pictures(episode, job, needed)
    entries, path = [], job.spool / f"{number:06d}"
    with path.open("wb") as file:
        for w, rows in zip(windows, indices):
            meta = {
                "text": job.prompt_template.replace("{task}", task),
                "task": task,
                "episode": int(episode.index),
                "dataset": job.name,
                "fps": float(dataset.fps),
            } | asdict(w)
            if "seed" in episode.columns:
                meta["seed"] = int(np.ravel(episode.columns["seed"])[0])
            frames = pictures[np.searchsorted(needed, rows)]
            members = _members(
                frames, state[w.start], cut_actions(actions, w.start, job.window), meta, job.window, encode
            )
            block = sample_block(f"{job.name}-{episode.index:06d}-{w.start:06d}", members)
            entries.append(_Entry(path.name, file.tell(), len(block)))
            file.write(block)
    return _PackedEpisode(entries, state, actions, task)


def _read_pictures(episode, job: _Job, needed: np.ndarray) -> np.ndarray:
    """uint8 (len(needed), H, C·W, 3): each needed raw frame decoded once and composed at the window's size."""
    w = job.window
    out = np.empty((len(needed), w.height, len(job.cameras) * w.width, 3), dtype=np.uint8)
    for first in range(0, len(needed), FRAME_CHUNK):
        chunk = needed[first : first + FRAME_CHUNK]
        out[first : first + len(chunk)] = side_by_side([episode.frames(c, chunk) for c in job.cameras], w)
    return out


def _members(frames, state, actions, meta: dict, window: WindowConfig, encode: Encode | None) -> dict[str, bytes]:
    from dataloaders.video import encode_mp4

    clip = io.BytesIO()
    encode_mp4(clip, frames, meta["fps"] / window.action_video_freq_ratio, codec="h264", gop=CLIP_GOP)
    members = {
        "mp4": clip.getvalue(),
        "action.npy": _npy(actions),
        "state.npy": _npy(state[None]),
        "json": json.dumps(meta, sort_keys=True).encode(),
    }
    if encode is not None:
        encoded = encode(frames, meta["text"])
        members |= {f"{k}.npy": _npy(_half(k, encoded[k])) for k in ("latents", "context")}
    return members


def _write_shards(
    folder: Path, job: _Job, dataset, episodes: list[_PackedEpisode], shard_samples: int, encoders, seed: int
) -> ShardIndex:
    entries = [entry for episode in episodes for entry in episode.entries]
    random.Random(seed).shuffle(entries)
    count = math.ceil(len(entries) / shard_samples)
    bounds = [i * len(entries) // count for i in range(count + 1)]
    shards = [
        write_shard(folder / f"shard-{i:06d}.tar", _blocks(job.spool, entries[bounds[i] : bounds[i + 1]]))
        for i in range(count)
    ]
    w = job.window
    source = {"dataset": job.name, "version": dataset.version, "robot_type": dataset.robot_type, "seed": seed}
    source |= {"episodes": len(episodes), "frames": sum(len(e.state) for e in episodes), "cameras": list(job.cameras)}
    index = ShardIndex(
        folder=folder,
        samples=len(entries),
        window=w,
        prompt_template=job.prompt_template,
        action_dim=episodes[0].actions.shape[1],
        state_dim=episodes[0].state.shape[1],
        fps=float(dataset.fps),
        encoders=encoders,
        tasks=sorted({e.task for e in episodes}),
        source=source,
        shards=tuple(shards),
    )
    stats = dataset_statistics(
        [e.state for e in episodes],
        [e.actions for e in episodes],
        window=w,
        state_key=w.state_key,
        action_key=w.action_key,
    )
    write_json(folder / STATISTICS, stats)
    write_json(folder / INDEX, index.to_dict())
    return index


def _blocks(spool: Path, entries: Sequence[_Entry]) -> Iterator[bytes]:
    for entry in entries:
        with (spool / entry.spool).open("rb") as file:
            file.seek(entry.offset)
            yield file.read(entry.size)


def _column(episode, key: str, where: str) -> np.ndarray:
    """float32 (L, d) of a column, checked: present, as long as the episode, finite."""
    if key not in episode.columns:
        raise UserError(f"{where}: lacks column {key!r}; it has {', '.join(sorted(episode.columns))}")
    values = np.asarray(episode.columns[key], dtype=np.float32)
    values = values.reshape(len(values), -1)
    if len(values) != episode.length:
        raise UserError(f"{where}: column {key!r} has {len(values)} rows, the episode {episode.length} frames; mend it")
    if (bad := np.argwhere(~np.isfinite(values))).size:
        row, dim = (int(i) for i in bad[0])
        raise UserError(
            f"{where}: column {key!r} is {values[row, dim]} at frame {row}, dimension {dim}; every value must "
            "be finite: mend or remove the episode"
        )
    return values


def _npy(value: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(value), allow_pickle=False)
    return file.getvalue()


def _half(name: str, value: Any) -> np.ndarray:
    out = np.asarray(value).astype(np.float16)
    if not np.isfinite(out).all():
        raise UserError(f"{name}: the encoder gave values that float16 cannot hold (up to {np.abs(value).max()})")
    return out
