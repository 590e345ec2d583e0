"""Recorded frames beyond one window, put together from the windows of an episode that shards hold in any order.

A window that starts at raw frame s shows the raw frames s, s + r, s + 2r, … (r = `action_video_freq_ratio`), so that
the frames behind it are those of windows that start a multiple of r later. How far that reaches is told by the shards
themselves: with a stride that leaves holes, or at the episode's end, a recording is as long as its frames follow each
other.

Shapes: T video frames of a window, N of a recording, H W pixels.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dataloaders.loading.batch import Sample, decode_sample
from dataloaders.shards import CorruptData, ShardIndex, read_shard
from kairos_train.basics.errors import UserError


@dataclass(frozen=True)
class WindowPosition:
    """A window in the shards.

    Attributes:
        number: of the sample, counted through all shards.
        start: its first raw frame.
        valid: how many of its video frames lie inside the episode.
    """

    number: int
    key: str
    episode: tuple[Hashable, Hashable]
    start: int
    valid: int


@dataclass(frozen=True)
class Recording:
    """A window and what was recorded behind it.

    Attributes:
        first: the window.
        pieces: number of a sample → (its video frame, the recording's) pairs that are taken from it.
        frames: N, video frames that follow each other from the window's first on.
    """

    first: WindowPosition
    pieces: dict[int, list[tuple[int, int]]]
    frames: int


def places(index: ShardIndex) -> list[WindowPosition]:
    """Every window of a shard folder; reads its JSON members alone, decodes nothing.

    Raises:
        UserError: a shard is damaged, or a sample does not say which window of which episode it is.
    """
    found: list[WindowPosition] = []
    try:
        for shard in index.shards:
            for raw in read_shard(index.folder, shard):
                meta = json.loads(bytes(raw["json"]))
                episode = (meta.get("dataset"), meta["episode"])
                number = len(found)
                found.append(
                    WindowPosition(number, raw["__key__"], episode, int(meta["start"]), int(meta["valid_frames"]))
                )
    except CorruptData as error:
        raise UserError(f"{index.folder}: {error}; restore or repack the shards") from error
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{index.folder}: a sample's JSON has no usable {error}; long horizons need windows of episodes, as "
            "`kairos-train data pack` cuts them out of a dataset"
        ) from error
    return found


def choose(windows: Sequence[WindowPosition], *, count: int, frames: int, ratio: int) -> list[Recording]:
    """The windows with the longest recordings, spread over the episodes; the same at every call.

    Every episode in turn, before any gives a second one; inside an episode, windows spread evenly over those whose
    recording is its longest.

    Args:
        count: recordings at most.
        frames: N that is wanted; longer recordings are cut.
        ratio: raw frames between video frames.
    """
    episodes: dict[tuple[Hashable, Hashable], list[WindowPosition]] = defaultdict(list)
    for window in windows:
        episodes[window.episode].append(window)
    names = sorted(episodes, key=str)
    if count < len(names):
        names = [names[i] for i in np.linspace(0, len(names) - 1, count).round().astype(int)]
    each = -(-count // len(names))
    candidates = [_of_episode(episodes[name], each, frames, ratio) for name in names]
    turns = [found[turn] for turn in range(each) for found in candidates if turn < len(found)]
    return turns[:count]


def read(index: ShardIndex, recordings: Sequence[Recording]) -> list[tuple[Sample, np.ndarray]]:
    """The first window of each recording, decoded, and its video frames uint8 (N, H, W, 3).

    Raises:
        UserError: a shard or sample is damaged.
    """
    users: dict[int, list[int]] = defaultdict(list)
    for i, recording in enumerate(recordings):
        for number in {recording.first.number, *recording.pieces}:
            users[number].append(i)
    firsts: dict[int, Sample] = {}
    frames: dict[int, np.ndarray] = {}
    try:
        for number, sample in _decoded(index, users.keys()):
            for i in users[number]:
                if i not in frames:
                    frames[i] = np.zeros((recordings[i].frames, *sample.frames.shape[1:]), np.uint8)
                for own, place in recordings[i].pieces.get(number, []):
                    frames[i][place] = sample.frames[own]
                if recordings[i].first.number == number:
                    firsts[i] = sample
    except CorruptData as error:
        raise UserError(f"{index.folder}: {error}; restore or repack the shards") from error
    return [(firsts[i], frames[i]) for i in range(len(recordings))]


def _of_episode(windows: Sequence[WindowPosition], count: int, frames: int, ratio: int) -> list[Recording]:
    """At most `count` windows of one episode, out of those with its longest recording."""
    aligned: dict[int, list[WindowPosition]] = defaultdict(list)
    for window in sorted(windows, key=lambda w: w.start):
        aligned[window.start % ratio].append(window)
    found = [_recording(w, aligned[w.start % ratio], frames, ratio) for w in sorted(windows, key=lambda w: w.start)]
    longest = max(recording.frames for recording in found)
    found = [recording for recording in found if recording.frames == longest]
    chosen = np.unique(np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int))
    return [found[i] for i in chosen]


def _recording(first: WindowPosition, windows: Sequence[WindowPosition], frames: int, ratio: int) -> Recording:
    """What follows a window: at each point from the last window that shows it, which leads furthest.

    Args:
        windows: those of the episode that start a multiple of `ratio` before or after, in order of their start.
    """
    pieces, done = {first.number: [(i, i) for i in range(min(first.valid, frames))]}, min(first.valid, frames)
    while done < frames:
        raw = first.start + done * ratio
        window = windows[bisect_right(windows, raw, key=lambda w: w.start) - 1]
        begin = (window.start - first.start) // ratio
        if begin + window.valid <= done:
            break
        end = min(begin + window.valid, frames)
        pieces[window.number] = [(i - begin, i) for i in range(done, end)]
        done = end
    return Recording(first, pieces, done)


def _decoded(index: ShardIndex, wanted: Collection[int]) -> Iterator[tuple[int, Sample]]:
    """(number, sample) of the wanted samples, with frames; shards without any are not read."""
    first = 0
    for shard in index.shards:
        if any(first <= number < first + shard.samples for number in wanted):
            for number, raw in enumerate(read_shard(index.folder, shard), first):
                if number in wanted:
                    yield number, decode_sample(raw, index, with_frames=True)
        first += shard.samples
