"""Which frame of its video each row of an episode shows, by the clocks of both.

LeRobot looks for the frame at `from_timestamp + timestamp` on the video's own clock and refuses one that lies farther
off than a tolerance. So it is here. Where that leads out of the episode's part of the video, as with clock times and
with offsets, but the timestamps since the first row span exactly the frames that are there, these are taken.

Shapes: T rows of the episode in their order, N frames of its part of the video.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dataloaders.config import BelieveConfig
from dataloaders.consistency.report import Contradiction, decide
from dataloaders.consistency.rows import RATE, Clock, passing


@dataclass(frozen=True)
class Pairing:
    """Seconds of the shown frames on the video's clock, float64 (T,), and what was found; times of an unresolved
    contradiction mean nothing."""

    times: np.ndarray
    contradictions: list[Contradiction]


@dataclass(frozen=True)
class VideoSpan:
    """An episode's part of a video. `to` is the second behind its last frame; None: the file's end."""

    start: float
    to: float | None = None


@dataclass(frozen=True)
class _Match:
    """A way to find the frames: the nearest of each row, int64 (T,), and how far off the farthest one is."""

    numbers: np.ndarray
    row: int
    wanted: float
    off: float

    @property
    def rises(self) -> bool:
        return bool((np.diff(self.numbers) > 0).all())


def pair_rows(
    where: str,
    *,
    clock: Clock,
    frame_index: np.ndarray | None,
    video: np.ndarray,
    span: VideoSpan,
    fps: float,
    believe: BelieveConfig,
    tolerance: float,
) -> Pairing:
    """Find each row's frame.

    Args:
        where: what errors call episode and camera.
        clock, frame_index: of the rows in their order; None where the dataset has no such column.
        video: seconds of the file's frames on its clock, float64, in order.
        span: the episode's part of it.
    """
    frames = _part(video, span)
    if believe.frames == "frame_index" or not len(frames):
        return _by_number(where, frame_index, len(clock.since), frames, span)
    told = span.start + clock.seconds
    as_told, since_first = _match(told, frames), _match(frames[0] + clock.since, frames)
    period, allowed = 1 / fps, tolerance + clock.resolution
    if as_told.off <= allowed and as_told.rises:
        other_rate = _rate(where, frames, fps)
        found = other_rate or _against_frame_index(where, as_told, frame_index, len(frames), believe)
        return Pairing(frames[as_told.numbers], found)
    whole = since_first.numbers[0] == 0 and since_first.numbers[-1] == len(frames) - 1
    if believe.frames is None and whole and since_first.off <= allowed and since_first.rises:
        said = {
            "timestamp": f"leads from {told[0]:g} to {told[-1]:g} s of the video",
            "the video": f"has {len(frames)} frames from {frames[0]:g} to {frames[-1]:g} s",
        }
        believed = "the timestamps since the first row, which span all of these frames"
        return Pairing(frames[since_first.numbers], [Contradiction("offset", where, said, believed)])
    near = [match for match in (as_told, *([since_first] if whole else ())) if match.rises]
    best = min(near, key=lambda match: match.off, default=as_told)
    said = {
        "timestamp": f"says {best.wanted:.4f} s at row {best.row}",
        "the video": f"has its nearest frame {best.off:.4f} s from there, farther than the tolerance of "
        f"{tolerance:g} s, and {len(frames)} frames from {frames[0]:g} to {frames[-1]:g} s for {len(told)} rows",
    }
    _, remedy = decide(believe, "frames", "fix the timestamps", "frame_index")
    lets = passing(best.off, clock.resolution, period) if near else None
    return Pairing(told, [Contradiction("frames", where, said, None, remedy, lets)])


def check_parts(camera: str, parts: Iterable[tuple[int, VideoSpan]], period: float, believe: BelieveConfig):
    """The parts that episodes have of one video file: (episode, span) of each."""
    ordered = sorted(parts, key=lambda part: (part[1].start, part[0]))
    found = []
    for (before, first), (after, second) in itertools.pairwise(ordered):
        if first.to is not None and first.to > second.start + period / 2:
            believed, remedy = decide(believe, "video_parts", "fix the table of episodes")
            said = {
                f"episode {before}": f"has its part to {first.to:g} s",
                f"episode {after}": f"has its part from {second.start:g} s of the same file",
            }
            found.append(Contradiction("video_parts", f"{camera}, episode {after}", said, believed, remedy))
    return found


def _part(video: np.ndarray, span: VideoSpan) -> np.ndarray:
    half = float(np.median(np.diff(video))) / 2 if len(video) > 1 else 1e-3
    inside = video >= span.start - half
    if span.to is not None:
        inside &= video < span.to - half
    return video[inside] if span != VideoSpan(0.0) else video


def _match(wanted: np.ndarray, frames: np.ndarray) -> _Match:
    after = np.clip(np.searchsorted(frames, wanted), 1, max(len(frames) - 1, 1))
    if len(frames) == 1:
        numbers = np.zeros(len(wanted), np.int64)
    else:
        numbers = after - (wanted - frames[after - 1] <= frames[after] - wanted)
    off = np.abs(frames[numbers] - wanted)
    row = int(off.argmax())
    return _Match(numbers, row, float(wanted[row]), float(off[row]))


def _by_number(where: str, frame_index: np.ndarray | None, rows: int, frames: np.ndarray, span: VideoSpan) -> Pairing:
    """Row k shows the frame of its number: of the episode's, or where that is beyond them counted from its first."""
    numbers = np.arange(rows) if frame_index is None else frame_index
    if len(numbers) and numbers[-1] >= len(frames):
        numbers = numbers - numbers[0]
    if numbers[-1] < len(frames):
        return Pairing(frames[numbers], [])
    to = "its end" if span.to is None else f"{span.to:g} s"
    said = {
        "frame_index": f"goes up to {int(numbers[-1])}",
        "the video": f"has {len(frames)} frames from {span.start:g} s to {to}",
    }
    return Pairing(np.zeros(rows), [Contradiction("frames", where, said, None, "restore the video or fix the rows")])


def _against_frame_index(
    where: str, match: _Match, frame_index: np.ndarray | None, frames: int, believe: BelieveConfig
) -> list[Contradiction]:
    """The timestamps fit the video: does frame_index say the same?

    One that counts the rows from 0 tells nothing of the video. Another one that fits it too is a second opinion.
    """
    if frame_index is None or np.array_equal(match.numbers, frame_index):
        return []
    row = int(np.flatnonzero(match.numbers != frame_index)[0])
    said = {
        "timestamp": f"says frame {int(match.numbers[row])} of the video at row {row}",
        "frame_index": f"says {int(frame_index[row])}",
    }
    counts = np.array_equal(frame_index, np.arange(len(frame_index)))
    all_shown = len(match.numbers) == frames
    believed, remedy = decide(believe, "frames", "fix the dataset")
    if counts or all_shown or frame_index[-1] >= frames:
        believed = "timestamps, as LeRobot's reader does"
    return [Contradiction("frames", where, said, believed, remedy)]


def _rate(where: str, frames: np.ndarray, fps: float) -> list[Contradiction]:
    if len(frames) < 2:
        return []
    step = float(np.median(np.diff(frames)))
    if abs(step * fps - 1) <= RATE:
        return []
    said = {"the video": f"runs at {1 / step:g} fps", "the dataset": f"at {fps:g} fps"}
    return [Contradiction("video_rate", where, said, "the timestamps, which lead to frames of it")]
