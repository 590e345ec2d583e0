"""The rows of an episode against each other: their order, their times, the rate, and what else numbers them.

Shapes: T rows of the episode, as they lie in their file unless something else is said.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from dataloaders.config import BelieveConfig
from dataloaders.consistency.report import Contradiction, decide

RATE = 0.01
"""Share by which two rates may differ: 29.97 is taken for 30, 25 is not."""

_LAG = 32
"""Most rows over which a step is measured: the rounding of the stored type then counts little."""

_UNITS = {1e3: "milliseconds", 1e6: "microseconds", 1e9: "nanoseconds"}


@dataclass(frozen=True)
class Clock:
    """Timestamps in the precision of their column.

    Attributes:
        start: of the first row, in seconds.
        since: seconds since the first row, float64 (T,): differences were taken before anything was rounded.
        resolution: seconds that the stored type can tell apart at these values.
        kind: of the stored type, as `float32`.
    """

    start: float
    since: np.ndarray
    resolution: float
    kind: str

    def take(self, order: np.ndarray) -> Clock:
        """Of the rows `order`, the first of which gives the start."""
        since = self.since[order]
        return replace(self, start=self.start + float(since[0]), since=since - since[0])

    @property
    def seconds(self) -> np.ndarray:
        """The timestamps, float64 (T,)."""
        return self.start + self.since


@dataclass(frozen=True)
class RowOrder:
    """How the rows of an episode follow each other.

    Attributes:
        order: the rows in their order, int64 (T,).
        frame_index: in that order; None where there is none, or where it does not count the rows up.
        runs: (first, end) of the parts, in that order, inside which nothing is missing.
        contradictions: what was found.
    """

    order: np.ndarray
    frame_index: np.ndarray | None
    runs: list[tuple[int, int]]
    contradictions: list[Contradiction]


def check_rows(
    where: str,
    *,
    clock: Clock,
    frame_index: np.ndarray | None,
    fps: float,
    believe: BelieveConfig,
    tolerance: float,
) -> RowOrder:
    """Order the rows by frame_index and look for what is missing between them.

    Args:
        where: what errors call the episode.
        frame_index: int64 (T,); None where the dataset has none.
        fps: of the dataset.
        tolerance: seconds by which a step of the timestamps may differ from that of the frames.
    """
    order, found = _order(where, clock, frame_index, believe)
    clock = clock.take(order)
    counted = frame_index is not None and (np.diff(frame_index[order]) > 0).all()
    frame_index = frame_index[order] if counted else None
    numbers = np.arange(len(order)) if frame_index is None else frame_index
    steps = np.diff(numbers)
    breaks = steps > 1
    if fault := _unusable(clock, 1 / fps):
        believed, remedy = decide(believe, "frames", "fix the timestamps", "frame_index")
        found.append(Contradiction("frames", where, fault, believed, remedy))
    elif len(order) > 1:
        period, rate = _period(where, clock, numbers, fps, believe)
        found += rate
        if not rate or rate[0].believed is not None:
            gaps, jitter = _steps(where, clock, steps, period, believe, tolerance)
            breaks, found = breaks | gaps, found + jitter
    found += _gaps(where, clock, steps, breaks)
    ends = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(order)]
    return RowOrder(order, frame_index, list(itertools.pairwise(ends)), found)


def measured_fps(clock: Clock, frame_index: np.ndarray | None) -> float | None:
    """The rate that timestamps in order tell, as the nearest fraction of small numbers; None where they tell none."""
    numbers = np.arange(len(clock.since)) if frame_index is None else frame_index
    if len(numbers) < 2 or not (period := _median_step(clock, numbers)) > 0:
        return None
    return float(Fraction(1 / period).limit_denominator(1001)) or None


def check_index(where: str, index: np.ndarray | None, told: tuple[int, int] | None) -> list[Contradiction]:
    """The column `index` of rows in their order, and the (from, to) that the table of episodes has for them."""
    if index is None:
        return []
    first, rows = int(index[0]), {"rows": f"have index {int(index[0])} to {int(index[-1])}"}
    if not np.array_equal(index, first + np.arange(len(index))):
        said = {"index": "does not count on by one", "frame_index": "orders the rows"}
        return [Contradiction("index", where, said, "frame_index")]
    if told is not None and told != (first, first + len(index)):
        said = rows | {"meta/episodes": f"dataset_from_index {told[0]} and dataset_to_index {told[1]}"}
        return [Contradiction("index", where, said, "the rows, by their episode_index")]
    return []


def check_episode_index(where: str, episode: int, column: np.ndarray | None, believe: BelieveConfig):
    """The column `episode_index` of a file that by its name holds the rows of `episode` alone."""
    if column is None or (column == episode).all():
        return []
    believed, remedy = decide(believe, "episode_index", "fix the column")
    others = ", ".join(map(str, np.unique(column).tolist()[:5]))
    said = {"the file": f"is that of episode {episode}", "episode_index": f"of its rows is {others}"}
    return [Contradiction("episode_index", where, said, believed, remedy)]


def check_tasks(
    where: str, task_index: np.ndarray | None, texts: Mapping[int, str], told: Sequence[str], believe: BelieveConfig
) -> list[Contradiction]:
    """The instructions of rows against those of their episode.

    Args:
        task_index: int64 (T,), of rows in their order; each is in `texts`.
        texts: the table of tasks.
        told: the episode's, by the table of episodes.
    """
    if task_index is None or not told:
        return []
    known = {text.strip() for text in told}
    for number in dict.fromkeys(task_index.tolist()):
        text = texts[number].strip()
        if text and text in known:
            continue
        row = int(np.flatnonzero(task_index == number)[0])
        believed, remedy = decide(believe, "task", "fix the tables", *(("rows",) if text else ()), "episodes")
        mine = f"task_index {number} is {texts[number]!r}"
        said = {"the row's": mine, "the table of episodes": f"has {', '.join(map(repr, told))}"}
        return [Contradiction("task", f"{where}, row {row}", said, believed, remedy)]
    return []


def passing(needed: float, resolution: float, period: float) -> float | None:
    """The tolerance that lets a deviation of `needed` seconds pass, in two digits; None where frames would be mixed."""
    if not math.isfinite(needed):
        return None
    needed = max(needed - resolution, 1e-9)
    scale = 10.0 ** (math.floor(math.log10(needed)) - 1)
    value = float(f"{(math.floor(needed / scale) + 1) * scale:.3g}")
    return value if value + resolution < period / 2 else None


def _order(
    where: str, clock: Clock, frame_index: np.ndarray | None, believe: BelieveConfig
) -> tuple[np.ndarray, list[Contradiction]]:
    """(the rows in their order, what was found)."""
    lying = np.arange(len(clock.since))
    by_time = np.argsort(clock.since, kind="stable")
    if frame_index is None:
        if (np.diff(clock.since) >= 0).all():
            return lying, []
        row = int(np.flatnonzero(np.diff(clock.since) < 0)[0]) + 1
        said = {"the rows": "lie in one order", "timestamp": f"goes back at row {row}"}
        side, remedy = decide(believe, "order", "fix the rows", "timestamps", "rows")
        return by_time if side == "timestamps" else lying, [Contradiction("order", where, said, side, remedy)]
    if (np.diff(frame_index) > 0).all():
        return lying, []
    by_index = np.argsort(frame_index, kind="stable")
    row = int(np.flatnonzero(np.diff(frame_index) <= 0)[0]) + 1
    said = {
        "the rows": "lie in another order",
        "frame_index": f"goes from {frame_index[row - 1]} to {frame_index[row]}",
    }
    said["frame_index"] += f" at row {row}"
    whole = (np.diff(frame_index[by_index]) > 0).all()
    side, remedy = decide(believe, "order", "fix the rows", *(("frame_index",) if whole else ()), "timestamps", "rows")
    if side is None and whole and (np.diff(clock.since[by_index]) > 0).all():
        side = "frame_index"  # the timestamps agree with it
    else:
        said["timestamp"] = "orders them differently" if whole else "may order them: a frame_index is there twice"
    order = {"frame_index": by_index, "timestamps": by_time}.get(side, lying)
    return order, [Contradiction("order", where, said, side, remedy)]


def _unusable(clock: Clock, period: float) -> dict[str, str]:
    """What is said where timestamps in order cannot tell the rows apart; empty where they can."""
    if not np.isfinite(clock.since).all() or not np.isfinite(clock.start):
        return {"timestamp": "has values that are not finite"}
    if clock.resolution >= period / 2:
        near = f"is {clock.kind} near {clock.start + clock.since[-1]:g}, where it steps by {clock.resolution:g} s"
        return {"timestamp": near, "meta/info.json": f"has frames {period:g} s apart"}
    back = np.flatnonzero(np.diff(clock.since) <= 0)
    if len(back):
        row = int(back[0]) + 1
        return {"timestamp": f"does not rise at row {row}", "the order of the rows": "says that it must"}
    return {}


def _median_step(clock: Clock, numbers: np.ndarray) -> float:
    """Seconds from frame to frame."""
    lag = min(max((len(numbers) - 1) // 4, 1), _LAG)
    return float(np.median((clock.since[lag:] - clock.since[:-lag]) / (numbers[lag:] - numbers[:-lag])))


def _period(
    where: str, clock: Clock, numbers: np.ndarray, fps: float, believe: BelieveConfig
) -> tuple[float, list[Contradiction]]:
    """(seconds between frames, what is to be said of the rate)."""
    step, period = _median_step(clock, numbers), 1 / fps
    if abs(step - period) <= RATE * period + 2 * clock.resolution / min(max(len(numbers) // 4, 1), _LAG):
        return period, []
    believed, remedy = decide(believe, "fps", "fix the dataset")
    believed = believed if believed == "info" else None  # else `fps` is that of the timestamps of other episodes
    said = {
        "meta/info.json": f"says {fps:g} fps",
        "timestamp": f"says {1 / step:g} fps (its median step is {step:g} s)",
    }
    unit = next((name for scale, name in _UNITS.items() if abs(step / scale / period - 1) < 0.1), None)
    if unit:
        said["timestamp"] += f", as if in {unit}: LeRobot's are seconds"
    return step, [Contradiction("fps", where, said, believed, remedy)]


def _steps(
    where: str, clock: Clock, steps: np.ndarray, period: float, believe: BelieveConfig, tolerance: float
) -> tuple[np.ndarray, list[Contradiction]]:
    """(bool (T-1,): between which rows something is missing, what is to be said of steps that are not even)."""
    excess = np.diff(clock.since) - steps * period
    off = np.abs(excess) > tolerance + clock.resolution
    gaps = off & ((excess >= period / 2) | ((excess <= -period / 2) & (steps > 1)))
    uneven = np.flatnonzero(off & ~gaps)
    if not len(uneven):
        return gaps, []
    most = float(np.abs(excess[uneven]).max())
    row, lets = int(uneven[np.abs(excess[uneven]).argmax()]) + 1, passing(most, clock.resolution, period)
    believed, remedy = decide(believe, "frames", "fix the timestamps", "frame_index")
    said = {
        "timestamp": f"is {most:.2g} s off the frames' {period:g} s at row {row}, "
        f"farther than the tolerance of {tolerance:g} s"
    }
    return gaps, [Contradiction("frames", where, said, believed, remedy, lets)]


def _gaps(where: str, clock: Clock, steps: np.ndarray, breaks: np.ndarray) -> list[Contradiction]:
    rows = np.flatnonzero(breaks)
    if not len(rows):
        return []
    row, lapse = int(rows[0]) + 1, float(np.diff(clock.since)[rows[0]])
    said = {"frame_index": f"goes on by {int(steps[row - 1])}", "timestamp": f"by {lapse:g} s"}
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return [Contradiction("gap", f"{where}, row {row}{more}", said, "rows are missing: windows end before it")]
