"""Statistics of a dataset's states and actions in one pass, in the layout that published checkpoints carry.

`{"action": {key: {...}}, "state": {key: {...}}, "num_episodes", "num_transition"}`; each inner dictionary has
`global_<s>` (a list over dimensions) and `stepwise_<s>` (one such list per step), s in min, max, mean, std, q01, q99.

Episodes are added one after the other and forgotten. min and max are exact; mean and std are merged sums in float64
(Chan, Golub and LeVeque 1979), exact up to rounding; quantiles are exact up to `KEEP` rows per step, and beyond that
within `rank_error`, a proven bound that says how far a quantile's rank may lie from the asked one, as a share of all
rows (0.0004 at ten million rows: q01 is then some value between the 0.96 % and the 1.04 % quantile).

Shapes: L raw frames of an episode, n rows, A actions of a window, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dataloaders.config import WindowConfig
from dataloaders.windows import action_count, action_offset, windows_of_runs

NAMES = ("min", "max", "mean", "std", "q01", "q99")
QUANTILES = {"q01": 0.01, "q99": 0.99}
KEEP = 16384
"""Rows of a level of a quantile sketch; up to as many rows in all its answers are exact."""


class DatasetStatistics:
    """Collects the statistics of a packed dataset, episode by episode.

    States count once per raw frame (their one step is the window's first, so stepwise equals global). Actions count as
    the windows show them: `stepwise` row i over the i-th action of all windows, `global` over all steps of all windows;
    padded steps never count. A step that no window of the dataset reaches (every episode is shorter) takes the global
    values, so that the rows always number A.

    Attributes:
        rank_error: largest possible distance of a quantile's rank from the asked one, as a share of the rows.
    """

    def __init__(self, window: WindowConfig, *, state_key: str, action_key: str) -> None:
        self._window, self._state_key, self._action_key = window, state_key, action_key
        self._state = ColumnSummary()
        self._steps = [ColumnSummary() for _ in range(action_count(window))]
        self._episodes = 0

    def add(self, states: np.ndarray, actions: np.ndarray, runs: Sequence[tuple[int, int]] = ()) -> None:
        """One episode: float (L, ds) and (L, da), counted as the float32 that samples hold.

        Args:
            runs: (first, end) of its parts, over whose ends no window reaches; none: it is one.
        """
        self._episodes += 1
        self._state.add(states.astype(np.float32))
        windows = [w for w, _ in windows_of_runs(runs or [(0, len(actions))], self._window)]
        starts, valid = np.array([w.start for w in windows]), np.array([w.valid_actions for w in windows])
        offset = action_offset(actions.shape[1], states, starts, self._window)
        for i, step in enumerate(self._steps if windows else ()):
            step.add((actions[starts[valid > i] + i] - offset[valid > i]).astype(np.float32))

    @property
    def rank_error(self) -> float:
        return max(s.rank_error for s in (self._state, *self._steps))

    def result(self) -> dict:
        """The content of dataset_stats.json. Needs at least one episode."""
        total, state = column_statistics(*self._steps), column_statistics(self._state)
        steps = [column_statistics(step) if step.count else total for step in self._steps]
        return {
            "action": {self._action_key: _layout(total, steps)},
            "state": {self._state_key: _layout(state, [state])},
            "num_episodes": self._episodes,
            "num_transition": self._state.count,
        }


class ColumnSummary:
    """Moments and a quantile sketch of the columns of any number of rows (n, D).

    The sketch is a tower of levels; a row of level h stands for 2^h rows. When a level holds `KEEP` rows, each of its
    columns is sorted and every other value moves up, from the first or the second in turn. That shifts the rank of any
    value by at most 2^h rows, and the shifts are summed up: `rank_error` is their sum over all rows. A function of the
    order in which rows come alone.
    """

    def __init__(self) -> None:
        self.count = 0
        self._levels: list[_Level] = []
        self._shift = 0

    @property
    def rank_error(self) -> float:
        return self._shift / max(self.count, 1)

    def add(self, values: np.ndarray) -> None:
        """Float (n, D)."""
        if not len(values):
            return
        wide = values.astype(np.float64)
        first = wide[0].copy()  # sums around a value of the data: constants have no spread, large offsets no loss
        wide -= first
        mean = wide.mean(axis=0)
        spread = ((wide - mean) ** 2).sum(axis=0)
        self._merge(len(values), first + mean, spread, values.min(axis=0), values.max(axis=0))
        self._push(0, np.array(values))

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """(values (m, D), how many rows each stands for (m,))."""
        parts = [level.rows() for level in self._levels]
        weights = [np.full(len(part), 2**h) for h, part in enumerate(parts)]
        return np.concatenate(parts), np.concatenate(weights)

    def _merge(self, count: int, mean: np.ndarray, spread: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        if not self.count:
            self.mean, self.spread, self.low, self.high = mean, spread, low, high
        else:
            total, delta = self.count + count, mean - self.mean
            self.mean = self.mean + delta * (count / total)
            self.spread = self.spread + spread + delta**2 * (self.count * count / total)
            self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
        self.count += count

    def _push(self, height: int, values: np.ndarray) -> None:
        if height == len(self._levels):
            self._levels.append(_Level())
        level = self._levels[height]
        level.parts.append(values)
        level.count += len(values)
        if level.count > KEEP:
            rows = np.sort(level.rows(), axis=0)
            odd = len(rows) % 2  # the last one stays: the others go up in pairs
            upper = rows[int(level.turn) : len(rows) - odd : 2]
            level.parts, level.count, level.turn = [rows[len(rows) - odd :]], odd, not level.turn
            self._shift += 2**height
            self._push(height + 1, upper)


class _Level:
    """Rows of one level, in the parts they came in; `turn` says from which of a pair the next one moves up."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.count = 0
        self.turn = False

    def rows(self) -> np.ndarray:
        return np.concatenate(self.parts)


def dataset_statistics(
    states: Sequence[np.ndarray],
    actions: Sequence[np.ndarray],
    *,
    window: WindowConfig,
    state_key: str,
    action_key: str,
) -> dict:
    """Statistics of a dataset that is in memory: one float (L, ds) and (L, da) array per episode."""
    statistics = DatasetStatistics(window, state_key=state_key, action_key=action_key)
    for state, action in zip(states, actions, strict=True):
        statistics.add(state, action)
    return statistics.result()


def column_statistics(*summaries: ColumnSummary) -> dict[str, np.ndarray]:
    """min, max, mean, std (population), q01, q99 of the rows of all summaries, each float64 (D,).

    Quantiles interpolate linearly between order statistics (as numpy does).
    """
    summaries = tuple(s for s in summaries if s.count)
    total = ColumnSummary()
    for s in summaries:
        total._merge(s.count, s.mean, s.spread, s.low, s.high)
    out = {"min": total.low, "max": total.high, "mean": total.mean, "std": np.sqrt(total.spread / total.count)}
    values, weights = (np.concatenate(parts) for parts in zip(*(s.rows() for s in summaries)))
    for name, q in QUANTILES.items():
        out[name] = np.array([_weighted_quantile(column, weights, q) for column in values.T])
    return {name: np.asarray(value, np.float64) for name, value in out.items()}


def _weighted_quantile(column: np.ndarray, weights: np.ndarray, q: float) -> float:
    """`np.quantile(np.repeat(column, weights), q)` without the repetition."""
    order = np.argsort(column)
    ends = np.cumsum(weights[order])  # the sorted value i stands at ranks ends[i-1] … ends[i] - 1
    rank = q * (ends[-1] - 1)
    low, high = int(np.floor(rank)), int(np.ceil(rank))
    at = column[order[np.searchsorted(ends, [low, high], side="right")]].astype(np.float64)
    return float(at[0] + (at[1] - at[0]) * (rank - low))


def _layout(total: dict[str, np.ndarray], steps: list[dict[str, np.ndarray]]) -> dict[str, list]:
    out: dict[str, list] = {f"global_{name}": total[name].tolist() for name in NAMES}
    return out | {f"stepwise_{name}": [step[name].tolist() for step in steps] for name in NAMES}
