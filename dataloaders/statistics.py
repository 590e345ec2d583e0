"""Exact statistics of a dataset's states and actions, in the layout that published checkpoints carry.

`{"action": {key: {...}}, "state": {key: {...}}, "num_episodes", "num_transition"}`; each inner dictionary has
`global_<s>` (a list over dimensions) and `stepwise_<s>` (one such list per step), s in min, max, mean, std, q01, q99.

Shapes: L raw frames of an episode, N values, A actions of a window, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dataloaders.windows import action_count, windows_of
from kairos_train.config.schema import WindowConfig

NAMES = ("min", "max", "mean", "std", "q01", "q99")
QUANTILES = {"q01": 0.01, "q99": 0.99}


def dataset_statistics(
    states: Sequence[np.ndarray],
    actions: Sequence[np.ndarray],
    *,
    window: WindowConfig,
    state_key: str,
    action_key: str,
) -> dict:
    """Statistics of a whole dataset; nothing is sampled or merged from bounds.

    States count once per raw frame (their one step is the window's first, so stepwise equals global). Actions count as
    the windows show them: `stepwise` row i over the i-th action of all windows, `global` over all steps of all windows;
    padded steps never count. A step that no window of the dataset reaches (every episode is shorter) takes the global
    values, so that the rows always number A.

    Args:
        states: one float (L, ds) array per episode.
        actions: one float (L, da) array per episode, with the same lengths.
    """
    state = np.concatenate(states)
    return {
        "action": {action_key: _action_statistics(actions, window)},
        "state": {state_key: _layout(column_statistics(state), [column_statistics(state)])},
        "num_episodes": len(states),
        "num_transition": len(state),
    }


def column_statistics(values: np.ndarray, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """min, max, mean, std (population), q01, q99 of (N, D), each float64 (D,), as if row n stood weights[n] times.

    Two passes in float64 around the first value: exact for constants (std is 0, not 1e-9), and no cancellation for
    large offsets. Quantiles interpolate linearly between order statistics (as numpy does).
    """
    if weights is not None:
        values, weights = values[weights > 0], weights[weights > 0]
    out = {name: np.empty(values.shape[1]) for name in NAMES}
    for d in range(values.shape[1]):  # one column at a time: a float64 copy of all of them would be the memory peak
        column = values[:, d].astype(np.float64)
        offset = column - column[0]
        out["min"][d], out["max"][d] = column.min(), column.max()
        mean = np.average(offset, weights=weights)
        out["mean"][d] = column[0] + mean
        out["std"][d] = np.sqrt(np.average((offset - mean) ** 2, weights=weights))
        for name, q in QUANTILES.items():
            out[name][d] = np.quantile(column, q) if weights is None else _weighted_quantile(column, weights, q)
    return out


def _weighted_quantile(column: np.ndarray, weights: np.ndarray, q: float) -> float:
    """`np.quantile(np.repeat(column, weights), q)` without the repetition (a window shows a frame up to A times)."""
    order = np.argsort(column)
    ends = np.cumsum(weights[order])  # the sorted value i stands at ranks ends[i-1] … ends[i] - 1
    rank = q * (ends[-1] - 1)
    low, high = int(np.floor(rank)), int(np.ceil(rank))
    at = column[order[np.searchsorted(ends, [low, high], side="right")]]
    return float(at[0] + (at[1] - at[0]) * (rank - low))


def _action_statistics(actions: Sequence[np.ndarray], window: WindowConfig) -> dict:
    values = np.concatenate(actions)
    firsts = np.concatenate([[0], np.cumsum([len(a) for a in actions])])
    starts, valid = [], []
    for first, episode in zip(firsts, actions):
        for w in windows_of(len(episode), window):
            starts.append(first + w.start)
            valid.append(w.valid_actions)
    starts, valid = np.array(starts), np.array(valid)
    # how many windows show each raw frame's action: +1 where a window begins, -1 where its valid part ends
    change = np.zeros(len(values) + 1, dtype=np.int64)
    np.add.at(change, starts, 1)
    np.add.at(change, starts + valid, -1)
    total = column_statistics(values, np.cumsum(change)[:-1])
    steps = []
    for i in range(action_count(window)):
        rows = starts[valid > i] + i
        steps.append(column_statistics(values[rows]) if len(rows) else total)
    return _layout(total, steps)


def _layout(total: dict[str, np.ndarray], steps: list[dict[str, np.ndarray]]) -> dict[str, list]:
    out: dict[str, list] = {f"global_{name}": total[name].tolist() for name in NAMES}
    return out | {f"stepwise_{name}": [step[name].tolist() for step in steps] for name in NAMES}
