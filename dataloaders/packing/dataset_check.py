"""Every episode of a dataset, or every clip of another source, against all that is said of it elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dataloaders.config import DataConfig, WindowConfig
from dataloaders.consistency.numbers import refuse_lost_steps
from dataloaders.consistency.report import Contradiction
from dataloaders.consistency.tables import check_picture_size
from dataloaders.files.workers import spread
from dataloaders.lerobot.episode import DatasetEpisode
from dataloaders.lerobot.reader import LeRobotDataset
from dataloaders.lerobot.vectors import columns_of, read_modality, read_vector
from dataloaders.sources.base import Bad, SourceSettings
from dataloaders.sources.open import kind_of, open_source
from kairos_train.basics.errors import UserError
from kairos_train.basics.progress import track


@dataclass
class DatasetCheck:
    """What was looked at, what contradicts itself, and (name, reason) of what cannot be read."""

    units: int = 0
    contradictions: list[Contradiction] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)

    @property
    def unresolved(self) -> int:
        return sum(found.believed is None for found in self.contradictions)


def source_settings(data: DataConfig) -> SourceSettings:
    """How a configuration has a source read."""
    return SourceSettings(
        data.window,
        data.clips,
        data.prompt_template,
        believe=data.believe,
        timestamp_tolerance=data.timestamp_tolerance,
        limits=data.limits,
    )


def check_dataset(location: Path | str, data: DataConfig, *, processes: int = 1) -> DatasetCheck:
    """Look at all of a source that could be packed.

    Args:
        data: clips, `believe` and `timestamp_tolerance`.
        processes: units at the same time.

    Raises:
        UserError: no source, or tables without which nothing can be read.
    """
    if kind_of(location) == "lerobot":
        dataset = open_dataset(Path(location), data)
        found, units = DatasetCheck(contradictions=list(dataset.contradictions)), dataset.num_episodes
        make = functools.partial(_episode_checker, Path(location), data)
    else:
        found, units = DatasetCheck(), open_source(location, source_settings(data)).units
        make = functools.partial(_unit_checker, location, data)
    parts: dict[int, DatasetCheck] = {}
    for unit, part in track(spread(make, range(units), processes), "verify", units, "units"):
        parts[unit] = part
    for unit in sorted(parts):
        found.units += 1
        found.contradictions += parts[unit].contradictions
        found.faults += parts[unit].faults
    return found


def open_dataset(root: Path, data: DataConfig) -> LeRobotDataset:
    """A LeRobot dataset as a configuration has it read."""
    return LeRobotDataset(root, believe=data.believe, tolerance=data.timestamp_tolerance, limits=data.limits)


def check_episode(dataset: LeRobotDataset, number: int, window: WindowConfig) -> DatasetCheck:
    """What the tables, rows and videos say of an episode; its states and actions where `window` names such columns."""
    found = DatasetCheck(units=1)
    try:
        episode = dataset.examine(number)
        found.contradictions += episode.contradictions
        for camera in episode.cameras:
            pictures = episode.check_pictures(camera)
            found.contradictions += pictures
            if all(c.believed is not None for c in pictures):
                size = episode.frames(camera, [0]).shape[1:3]
                found.contradictions += check_picture_size(camera, dataset.features[camera], size)
        _check_vectors(dataset, episode, window)
    except UserError as error:
        found.faults.append((f"episode {dataset.outline()[number][0]}", str(error)))
    return found


def _episode_checker(root: Path, data: DataConfig, worker: int) -> Callable[[int], DatasetCheck]:
    dataset = open_dataset(root, data)
    return lambda number: check_episode(dataset, number, data.window)


def _check_vectors(dataset: LeRobotDataset, episode: DatasetEpisode, window: WindowConfig) -> None:
    modality, where = read_modality(dataset.root), f"episode {episode.index}"
    absolute = {"state_key": True, "action_key": window.action_values == "recorded"}
    for setting, whole in absolute.items():
        key = getattr(window, setting)
        try:
            parts = columns_of(key, dataset.features, modality)
        except UserError:
            continue  # the window of another dataset
        values = read_vector(episode.columns, episode.length, parts, where)
        if whole:
            refuse_lost_steps(values, where, f"data.window.{setting}={key}")


def _unit_checker(location: Path | str, data: DataConfig, worker: int) -> Callable[[int], DatasetCheck]:
    source = open_source(location, source_settings(data))

    def check(number: int) -> DatasetCheck:
        unit = source.unit(number)
        bad: Iterable[Bad] = (sample for sample in unit.samples if isinstance(sample, Bad))
        return DatasetCheck(faults=[(sample.name, sample.reason) for sample in bad])

    return check
