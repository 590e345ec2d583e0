"""State and action vectors of an episode, by keys that may name columns, parts of columns, or several of them.

    action                            a column
    action[0:7]                       dimensions 0 to 6 of it
    action.right_arm                  a part that GR00T's `meta/modality.json` names
    observation.joints+observation.gripper    one behind the other

Shapes: T frames of an episode, D dimensions.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.config import MIN_RANGE, WindowConfig
from kairos_train.basics.errors import UserError, one_line
from kairos_train.basics.foreign_files import parse_json, read_text, whole

MODALITY_PATH = "meta/modality.json"
_COLUMNS = {"state": "observation.state", "action": "action"}  # that modality.json means where it names none
_MOST_DIMENSIONS = 100_000
_SLICE = re.compile(r"(.+)\[(\d+):(\d+)\]")


def read_modality(root: Path) -> dict[str, tuple[str, int, int]]:
    """(column, first, end) by name, as `action.right_arm`; empty without a `meta/modality.json`.

    Raises:
        UserError: the file is not what GR00T writes.
    """
    path = root / MODALITY_PATH
    if not path.is_file():
        return {}
    text = read_text(path)
    try:
        groups = parse_json(text)
        return {
            f"{group}.{name}": (
                str(part.get("original_key", column)),
                whole(part["start"], "start"),
                whole(part["end"], "end"),
            )
            for group, column in _COLUMNS.items()
            for name, part in groups.get(group, {}).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: is not a table of parts with start and end ({one_line(error)}); fix or remove it"
        ) from error


def columns_of(key: str, features: Mapping[str, Any], modality: Mapping[str, tuple[str, int, int]]) -> list[tuple]:
    """(column, slice) of every part of `key`.

    Raises:
        UserError: a part is neither a column nor a named part; says what there is.
    """
    parts = []
    for name in key.split("+"):
        sliced = _SLICE.fullmatch(name)
        if name in features:
            parts.append((name, slice(None)))
        elif sliced and sliced[1] in features:
            parts.append((sliced[1], slice(int(sliced[2]), int(sliced[3]))))
        elif name in modality and modality[name][0] in features:
            column, first, end = modality[name]
            parts.append((column, slice(first, end)))
        else:
            there = ", ".join([*sorted(features), *sorted(modality)])
            raise UserError(f"{name!r}: the dataset has no such column; it has {there}")
    return parts


def stillness(
    group: str,
    low: Sequence[float],
    high: Sequence[float],
    *,
    parts: Sequence[tuple],
    features: Mapping[str, Any],
    window: WindowConfig,
) -> str | None:
    """Which dimensions of a vector never move, and how to leave them out; None where all move.

    Args:
        group: "action" or "state".
        low, high: of every dimension, D each.
        parts: of `columns_of`.
        features: of the dataset.
    """
    still = [d for d, (a, b) in enumerate(zip(low, high)) if b - a < MIN_RANGE]
    if not still:
        return None
    told = f"{group}: {len(still)} of {len(low)} dimensions never move ({', '.join(_runs(still))})"
    places = [(name, d) for name, part in parts for d in range(_width(features[name]))[part]]
    moving = [place for d, place in enumerate(places) if d not in still]
    if not moving or len(places) != len(low):
        return told
    if window.action_values == "minus_state":  # a dimension of actions is paired with the state's of the same number
        return f"{told}; leave the same ones out of data.window.action_key and state_key, as {_key_of(moving)}"
    absolute = ", where data.window.absolute_dims then counts what is left" * (
        group == "action" and bool(window.absolute_dims)
    )
    return f"{told}; data.window.{group}_key='{_key_of(moving)}' leaves them out{absolute}"


def _width(feature: Mapping[str, Any]) -> int:
    """Dimensions that the dataset announces; 0 where it says no number of them that a vector could have."""
    shape = feature.get("shape")
    told = math.prod(shape) if isinstance(shape, list | tuple) and all(isinstance(n, int) for n in shape) else 0
    return told if 0 < told <= _MOST_DIMENSIONS else 0


def _runs(numbers: Sequence[int]) -> list[str]:
    """1, 2, 3, 7 -> "1 to 3", "7"."""
    return [str(a) if a + 1 == b else f"{a} to {b - 1}" for a, b in _spans(numbers)]


def _key_of(places: Sequence[tuple[str, int]]) -> str:
    """The key of dimensions of columns, in their order."""
    groups = itertools.groupby(places, key=lambda place: place[0])
    return "+".join(f"{name}[{a}:{b}]" for name, run in groups for a, b in _spans([d for _, d in run]))


def _spans(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(first, end) of every run of numbers that follow each other."""
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number:
            spans[-1] = (spans[-1][0], number + 1)
        else:
            spans.append((number, number + 1))
    return spans


def read_vector(columns: Mapping[str, np.ndarray], length: int, parts: list[tuple], where: str) -> np.ndarray:
    """float (T, D) of the parts, checked: present, as long as the episode, finite.

    float32 where every part is or needs no more; whole numbers of 64 bits and float64 give float64.

    Raises:
        UserError: naming the column, frame and dimension of the first fault.
    """
    found = []
    for name, part in parts:
        if name not in columns:
            raise UserError(f"{where}: lacks column {name!r}; it has {', '.join(sorted(columns))}")
        values = np.asarray(columns[name])
        values = values.astype(np.float64 if values.dtype in (np.int64, np.float64) else np.float32)
        values = values.reshape(len(values), -1)
        if len(values) != length:
            raise UserError(f"{where}: column {name!r} has {len(values)} rows, the episode {length} frames; fix it")
        if part.stop is not None and not part.start < part.stop <= values.shape[1]:
            raise UserError(
                f"{where}: dimensions {part.start} to {part.stop} asked of column {name!r}, which has {values.shape[1]}"
            )
        with np.errstate(over="ignore"):
            packed = values.astype(np.float32)
        if (bad := np.argwhere(~np.isfinite(packed))).size:
            row, dim = (int(i) for i in bad[0])
            raise UserError(
                f"{where}: column {name!r} is {values[row, dim]} at frame {row}, dimension {dim}; every value must "
                "be finite in float32: fix or remove the episode"
            )
        found.append(values[:, part])
    return np.concatenate(found, axis=1)
