"""Curves made fit to be looked at: thinned out, freed of what would hide the rest, drawn with characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

POINTS = 800  # of a curve; longer ones are averaged
SPARKS = "▁▂▃▄▅▆▇█"
HIGH = 3.0  # times the 90 % quantile: above it a value hides the others


def thinned(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """A curve of at most `points` points, each the mean of its neighbours that are finite; NaN where none is."""
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    ys = np.where(np.isfinite(ys), ys, np.nan)
    if len(xs) <= points:
        return xs, ys
    parts = np.array_split(np.arange(len(xs)), points)
    means = [np.nanmean(ys[part]) if np.isfinite(ys[part]).any() else np.nan for part in parts]
    return np.array([xs[part].mean() for part in parts]), np.array(means)


def ceiling(values: Sequence[float]) -> float | None:
    """Where to cut a curve off at the top, so that single high values (loss spikes) do not hide all others.

    Returns:
        None when nothing has to be cut.
    """
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return None
    usual = float(np.quantile(finite, 0.9))
    return HIGH * usual if 0 < HIGH * usual < finite.max() else None


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve of block characters, from the smallest to the largest value.

    Where values are not finite there is "?", where they are above the `ceiling` "▲".
    """
    _, means = thinned(range(len(values)), values, width)
    top = ceiling(means)
    usual = [mean for mean in means if math.isfinite(mean) and (top is None or mean <= top)]
    low, high = min(usual, default=0.0), max(usual, default=0.0)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0

    def spark(mean: float) -> str:
        if not math.isfinite(mean):
            return "?"
        return "▲" if top is not None and mean > top else SPARKS[round((mean - low) * scale)]

    return "".join(map(spark, means))
