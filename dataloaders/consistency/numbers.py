"""Whether float32, in which shards hold states and actions, can hold what a column of a wider type says.

Shapes: T rows of an episode, D dimensions.
"""

from __future__ import annotations

import numpy as np

from dataloaders.config import MIN_RANGE
from kairos_train.basics.errors import UserError

_OF_RANGE, _OF_STEP = 0.01, 0.25
"""Largest rounding error, as a share of the movement within an episode and of a large step of it."""


def refuse_lost_steps(values: np.ndarray, where: str, setting: str) -> None:
    """Return unless rounding to float32 swallows the movement of a dimension.

    Args:
        values: float64 (T, D); float32 ones pass.
        where: what errors call the episode.
        setting: that names the columns.

    Raises:
        UserError: naming the dimension.
    """
    if values.dtype != np.float64 or len(values) < 2:
        return
    low, high = values.min(0), values.max(0)
    moved = high - low
    error = np.spacing(np.maximum(np.abs(low), np.abs(high)).astype(np.float32)).astype(np.float64) / 2
    steps = np.abs(np.diff(values, axis=0))
    for dim in np.flatnonzero((moved >= MIN_RANGE) & (error > 0)):
        taken = steps[:, dim][steps[:, dim] > 0]
        step = float(np.quantile(taken, 0.9))
        if error[dim] > _OF_RANGE * moved[dim] or (step >= MIN_RANGE and error[dim] > _OF_STEP * step):
            raise UserError(
                f"{where}: {setting}: dimension {dim} moves by {moved[dim]:.3g} near {high[dim]:.10g} in steps of "
                f"{step:.3g}; float32, in which it is packed and learned, resolves {2 * error[dim]:.3g} there: "
                "subtract an origin from the column, or leave the dimension out"
            )
