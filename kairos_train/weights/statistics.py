"""Dataset statistics of weights: which file is theirs, and the names that its entries have.

A checkpoint's statistics name their entries as the dataset does (`data.window.state_key`, `action_key`); in public
files each group has one entry, called `default`. How they normalise stands in neither: the RoboTwin release takes
z-scores, the LIBERO ones min/max.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dataloaders.config import WindowConfig
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import read_json
from kairos_train.config.schema import Config
from kairos_train.inference.normalization import from_statistics

FILE = "dataset_stats.json"
DEFAULT = "default"
MODES = ("data.normalize_action", "data.normalize_state")


def statistics_file(folder: Path) -> Path | None:
    """The file of statistics in a folder: `dataset_stats.json`, or one whose name ends so.

    Raises:
        UserError: there are several.
    """
    found = sorted(path for path in folder.glob(f"*{FILE}") if path.is_file())
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder}: holds {names}; name the statistics of these weights with --statistics FILE")
    return found[0] if found else None


def read_statistics(file: Path) -> dict[str, Any]:
    """A JSON object of statistics.

    Raises:
        UserError: unreadable, no JSON object, or without groups `state` and `action`.
    """
    remedy = "give the statistics of the dataset, with groups state and action"
    content = read_json(file, remedy=remedy)
    for group in ("state", "action"):
        if not isinstance(content.get(group), dict):
            raise UserError(f"{file}: has no group {group!r}; {remedy}")
    return content


def imported_statistics(file: Path, config: Config, given: Iterable[str], *, exported: bool) -> dict[str, Any]:
    """Statistics of imported weights, their entries under the names of `config.data.window`.

    Args:
        file: the statistics.
        config: of the checkpoint.
        given: keys that the command line sets.
        exported: the run of an export says how they normalise and which entries are meant.

    Raises:
        UserError: unreadable, ambiguous, of other sizes than the model's, or nobody said how they normalise.
    """
    content, given = read_statistics(file), set(given)
    if config.model.action is None:
        return content
    if not (exported or {"data", "experiment"} & given or given.issuperset(MODES)):
        raise UserError(
            f"{file}: do not say how they normalise; add data=robotwin (z-score) or data=libero (min/max), "
            f"or {MODES[0]}=zscore {MODES[1]}=zscore (or minmax)"
        )
    for group, size in (("state", config.model.action.state_dim), ("action", config.model.action.action_dim)):
        key = getattr(config.data.window, f"{group}_key")
        found = _entry(file, content[group], group, key, named=exported or f"data.window.{group}_key" in given)
        content[group] = {key: content[group][found]}
        mode = getattr(config.data, f"normalize_{group}")
        width = from_statistics(content, group=group, key=key, mode=mode).dim
        if width != size and not (exported and width < size):  # of several robots trained together, the policy's
            raise UserError(
                f"{file}: {group}/{found} is of {width} dimensions, the weights' {group} of {size}; give "
                "the statistics of the dataset that these weights were trained on"
            )
    return content


def _entry(file: Path, entries: dict[str, Any], group: str, key: str, *, named: bool) -> str:
    """Which entry is meant: `default`, or the one of the dataset's own name."""
    found = [name for name in (key, DEFAULT) if name in entries]
    if len(found) == 1 or (named and key in entries):
        return found[0]
    there = ", ".join(sorted(entries)) or "nothing"
    raise UserError(
        f"{file}: group {group} has {there}, and which of them is these weights' is "
        f"{'ambiguous' if found else 'unknown'}; name it with data.window.{group}_key=KEY"
    )


def public_statistics(statistics: dict[str, Any], window: WindowConfig) -> dict[str, Any]:
    """As the public clients read them: one entry per group, called `default`."""
    renamed = dict(statistics)
    for group, key in (("state", window.state_key), ("action", window.action_key)):
        if isinstance(statistics.get(group), dict) and key in statistics[group]:
            renamed[group] = {DEFAULT: statistics[group][key]}
    return renamed
