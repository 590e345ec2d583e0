"""Statistics of a LeRobot v3.0 dataset: one block per episode and feature, and one over all frames.

Pictures are summed up as histograms of their 256 levels, numbers are kept whole: every quantile is exact, where merging
the episodes' own would give bounds only. Shapes: T frames, H height, W width, D dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

STATISTICS = ("min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99")
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def picture_histogram(frames: np.ndarray) -> np.ndarray:
    """How often each level occurs in each channel: uint8 (T, H, W, 3) to int64 (3, 256)."""
    histogram = np.zeros((3, 256), np.int64)
    for frame in frames:  # one at a time: bincount widens its input eightfold
        for channel in range(3):
            histogram[channel] += np.bincount(frame[..., channel].reshape(-1), minlength=256)
    return histogram


def picture_statistics(histogram: np.ndarray, frames: int) -> dict[str, Any]:
    """Statistics of levels scaled to [0, 1], nested (3, 1, 1) as LeRobot has them; `count` is the number of frames."""
    levels = np.arange(256) / 255.0
    total = histogram.sum(axis=1, keepdims=True)
    share = histogram / total
    mean = share @ levels
    cumulative = np.cumsum(histogram, axis=1)
    present = histogram > 0
    values = {
        "min": levels[present.argmax(axis=1)],
        "max": levels[255 - present[:, ::-1].argmax(axis=1)],
        "mean": mean,
        "std": np.sqrt((share * (levels - mean[:, None]) ** 2).sum(axis=1)),
    }
    for name, q in _QUANTILES.items():  # the smallest level with at least a share q at or below it
        values[name] = levels[(cumulative >= q * total).argmax(axis=1)]
    nested = {name: value.reshape(3, 1, 1).tolist() for name, value in values.items()}
    return {name: [frames] if name == "count" else nested[name] for name in STATISTICS}


def number_statistics(values: np.ndarray) -> dict[str, Any]:
    """Statistics over rows of (T, D); minimum and maximum keep whole numbers whole, the rest are floats."""
    wide = values.astype(np.float64)
    quantiles = np.quantile(wide, list(_QUANTILES.values()), axis=0)
    found = {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": wide.mean(axis=0),
        "std": wide.std(axis=0),
        "count": np.array([len(values)]),
        **dict(zip(_QUANTILES, quantiles)),
    }
    return {name: found[name].tolist() for name in STATISTICS}
