"""States and actions to the model's range and back, from the statistics that a checkpoint carries.

Modes (model specification, State and actions): `minmax` and `quantile` map [min, max] or [q01, q99] to [-1, 1], and a
dimension whose range is under 1e-4 to 0 with scale 1; `zscore` subtracts the mean and divides by std + 1e-8; all three
are then clamped to ±5. `none` changes nothing.

A dimension that never moved (max - min under 1e-4; std where neither is known) has scale 1 in `zscore`, too: divided by
its std, a reading a millionth away would be at the clamp (ours). On the way back it stays between its min and max, that
is, at its constant, whatever the model says: nothing in the data taught it (ours).

Shapes: D dimensions of a state or an action, A steps of a chunk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kairos_train.basics.errors import UserError

MODES = ("minmax", "quantile", "zscore", "none")
_FIELDS = {"minmax": ("min", "max"), "quantile": ("q01", "q99"), "zscore": ("mean", "std"), "none": ("mean", "std")}
MIN_RANGE = 1e-4
RANGES = ("minmax", "quantile")
CLAMP = 5.0


class Normalizer:
    """Affine map of the last dimension (D), kept in float32.

    Args:
        stats: one key's statistics, `{"global_min": [...], …, "stepwise_min": [[...], …], …}`.
        mode: one of MODES.
        stepwise: one map per step of the chunk; tensors are then (…, A, D) with A at most the steps of the statistics.
        name: what the statistics are called in errors.

    Raises:
        UserError: an unknown mode, statistics without the mode's fields, of shapes that do not fit, or not finite.
    """

    def __init__(self, stats: dict[str, Any], mode: str, *, stepwise: bool = False, name: str = "statistics"):
        if mode not in MODES:
            raise UserError(f"normalisation mode {mode!r} of {name}: must be one of {', '.join(MODES)}")
        self.mode, self.stepwise, self.name = mode, stepwise, name
        prefix = "stepwise_" if stepwise else "global_"
        low, high = (_field(stats, prefix + field, 2 if stepwise else 1, name) for field in _FIELDS[mode])
        if low.shape != high.shape:
            fields = " and ".join(prefix + field for field in _FIELDS[mode])
            raise UserError(f"{name}: {fields} have shapes {low.shape} and {high.shape}; they must be equal")
        least, most = _bounds(stats, prefix, low, high, mode, name)
        still = most - least < MIN_RANGE
        if mode in ("minmax", "quantile"):
            if (high < low).any():
                raise UserError(
                    f"{name}: {prefix}{_FIELDS[mode][1]} is below {prefix}{_FIELDS[mode][0]}; recompute them"
                )
            flat = high - low < MIN_RANGE
            shift, scale = np.where(flat, low, (low + high) / 2), np.where(flat, 1.0, (high - low) / 2)
        elif mode == "zscore":
            shift, scale = low, np.where(still, 1.0, high + 1e-8)
        else:
            shift, scale = np.zeros_like(low), np.ones_like(low)
        # (D,) or (A, D) each; what moves is not bounded
        self._maps = tuple(
            torch.from_numpy(values.astype(np.float32))
            for values in (shift, scale, np.where(still, least, -np.inf), np.where(still, most, np.inf))
        )
        self.dim = int(shift.shape[-1])

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """(…, D) any float dtype -> float32 of the same shape, within ±5 (mode `none`: unbounded)."""
        shift, scale, *_ = self._fitted(x)
        out = (x.float() - shift) / scale
        return out if self.mode == "none" else out.clamp(-CLAMP, CLAMP)

    def unnormalize(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalize` (what was clamped stays at the bound): (…, D) -> float32 of the same shape.

        A dimension that never moved is its constant (mode `none`: what is given).
        """
        shift, scale, least, most = self._fitted(x)
        out = x.float() * scale + shift
        return out if self.mode == "none" else out.clamp(least, most)

    def _fitted(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Shift, scale and bounds for a tensor's steps, on its device."""
        steps, ndim = len(self._maps[0]), self._maps[0].ndim
        if x.ndim < ndim or x.shape[-1] != self.dim:
            raise UserError(f"{self.name}: are of {self.dim} dimensions, the tensor has shape {tuple(x.shape)}")
        if not self.stepwise:
            return tuple(values.to(x.device) for values in self._maps)
        if x.shape[-2] > steps:
            raise UserError(f"{self.name}: are of {steps} steps, the tensor has shape {tuple(x.shape)}")
        return tuple(values[: x.shape[-2]].to(x.device) for values in self._maps)


def from_statistics(
    stats: dict[str, Any] | Path | str, *, group: str, key: str, mode: str, stepwise: bool = False
) -> Normalizer:
    """Normalizer for one entry of a dataset's statistics (`dataset_stats.json`, its path or its content).

    Args:
        group: "action" or "state".
        key: the dataset's name for it, e.g. "observation.state" ("default" in the published files).

    Raises:
        UserError: the file, the group or the key does not exist (the keys that do are named); see also `Normalizer`.
    """
    entry, name = _entry(stats, group, key)
    return Normalizer(entry, mode, stepwise=stepwise, name=name)


def action_range(stats: dict[str, Any], *, key: str, kind: str, margin: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest action of a dataset, float32 (D,) each, in the units of its windows.

    Args:
        stats, key: as for `from_statistics`.
        kind: one of RANGES: all values, or those between the 1 % and the 99 % quantile.
        margin: what both sides are moved outwards, as a share of the range.

    Raises:
        UserError: as `from_statistics`.
    """
    entry, name = _entry(stats, "action", key)
    low, high = (_field(entry, f"global_{field}", 1, name) for field in _FIELDS[kind])
    more = margin * (high - low)
    return (low - more).astype(np.float32), (high + more).astype(np.float32)


def _entry(stats: dict[str, Any] | Path | str, group: str, key: str) -> tuple[dict[str, Any], str]:
    """One entry of a dataset's statistics, and what errors call it."""
    name = "dataset statistics"
    if isinstance(stats, (str, Path)):
        name = str(stats)
        try:
            stats = json.loads(Path(stats).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{name}: cannot be read as JSON statistics ({type(error).__name__})") from error
    if group not in ("action", "state"):
        raise UserError(f"statistics group {group!r}: must be action or state")
    entries = stats.get(group) if isinstance(stats, dict) else None
    if not isinstance(entries, dict) or not isinstance(entries.get(key), dict):
        there = ", ".join(sorted(entries)) if isinstance(entries, dict) and entries else "nothing"
        raise UserError(f"{name}: no {group} statistics for key {key!r}; it has {there}")
    return entries[key], f"{name}: {group}/{key}"


def _bounds(
    stats: dict[str, Any], prefix: str, low: np.ndarray, high: np.ndarray, mode: str, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest value; of statistics without them, what the mode's own fields say of a constant."""
    if f"{prefix}min" in stats and f"{prefix}max" in stats:
        least, most = (_field(stats, prefix + field, low.ndim, name) for field in ("min", "max"))
        if least.shape == most.shape == low.shape:
            return least, most
        raise UserError(
            f"{name}: {prefix}min and {prefix}max have shapes {least.shape} and {most.shape}, the other fields "
            f"{low.shape}; recompute them"
        )
    return (low - high, low + high) if mode in ("zscore", "none") else (low, high)


def _field(stats: dict[str, Any], field: str, ndim: int, name: str) -> np.ndarray:
    if field not in stats:
        raise UserError(f"{name}: lacks {field}; recompute the statistics")
    try:
        value = np.asarray(stats[field], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {field} is not a regular list of numbers") from error
    if value.ndim != ndim or value.size == 0:
        raise UserError(f"{name}: {field} has shape {value.shape}; it must be a list of {ndim} levels, not empty")
    if not np.isfinite(value).all():
        raise UserError(f"{name}: {field} has values that are not finite; recompute the statistics")
    return value
