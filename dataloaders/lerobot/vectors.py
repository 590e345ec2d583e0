"""State and action vectors of an episode, by keys that may name columns, parts of columns, or several of them.

    action                            a column
    action[0:7]                       dimensions 0 to 6 of it
    action.right_arm                  a part that GR00T's `meta/modality.json` names
    observation.joints+observation.gripper    one behind the other

Shapes: T frames of an episode, D dimensions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kairos_train.basics.errors import UserError

MODALITY_PATH = "meta/modality.json"
_COLUMNS = {"state": "observation.state", "action": "action"}  # that modality.json means where it names none
_SLICE = re.compile(r"(.+)\[(\d+):(\d+)\]")


def read_modality(root: Path) -> dict[str, tuple[str, int, int]]:
    """(column, first, end) by name, as `action.right_arm`; empty without a `meta/modality.json`.

    Raises:
        UserError: the file is not what GR00T writes.
    """
    path = root / MODALITY_PATH
    if not path.is_file():
        return {}
    try:
        groups = json.loads(path.read_text())
        return {
            f"{group}.{name}": (part.get("original_key", column), int(part["start"]), int(part["end"]))
            for group, column in _COLUMNS.items()
            for name, part in groups.get(group, {}).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not a table of parts with start and end ({error!r}); fix or remove it") from error


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


def read_vector(columns: Mapping[str, np.ndarray], length: int, parts: list[tuple], where: str) -> np.ndarray:
    """float32 (T, D) of the parts, checked: present, as long as the episode, finite.

    Raises:
        UserError: naming the column, frame and dimension of the first fault.
    """
    found = []
    for name, part in parts:
        if name not in columns:
            raise UserError(f"{where}: lacks column {name!r}; it has {', '.join(sorted(columns))}")
        values = np.asarray(columns[name], dtype=np.float32)
        values = values.reshape(len(values), -1)
        if len(values) != length:
            raise UserError(f"{where}: column {name!r} has {len(values)} rows, the episode {length} frames; fix it")
        if part.stop is not None and not part.start < part.stop <= values.shape[1]:
            raise UserError(
                f"{where}: dimensions {part.start} to {part.stop} asked of column {name!r}, which has {values.shape[1]}"
            )
        if (bad := np.argwhere(~np.isfinite(values))).size:
            row, dim = (int(i) for i in bad[0])
            raise UserError(
                f"{where}: column {name!r} is {values[row, dim]} at frame {row}, dimension {dim}; every value must "
                "be finite: fix or remove the episode"
            )
        found.append(values[:, part])
    return np.concatenate(found, axis=1)
