"""Demonstrations as references: which seeds they had, and which of them began most like an episode.

Shapes: N demonstrations of a task, ds state dimensions, T actions, da action dimensions, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataloaders.lerobot.reader import LeRobotDataset
from dataloaders.simulators.base import TASKS, Simulator, SimulatorObservation
from dataloaders.windows import cover
from kairos_train.basics.errors import UserError

SEED = "seed"  # what `data simulate` writes beside each episode
SIDE = 16  # pixels in which pictures are compared: things that do not overlap are near or far by more than yes and no


@dataclass(frozen=True)
class Beginnings:
    """The demonstrations of one task.

    Attributes:
        states: float32 (N, ds), of their first frames.
        pictures: float32 (N, SIDE, SIDE, 3) in [0, 1].
        actions: (T, da) of each.
    """

    states: np.ndarray
    pictures: np.ndarray
    actions: tuple[np.ndarray, ...]

    def nearest(self, first: SimulatorObservation) -> int:
        """The demonstration that began most like `first`.

        The distance is that of the states plus that of the pictures, mean squares, each in units of how far the
        demonstrations lie from their mean; what is the same in all of them counts nothing.
        """
        distance = np.zeros(len(self.actions))
        for known, now in ((self.states, first.state), (self.pictures, _small(first.frame))):
            axes = tuple(range(1, known.ndim))
            spread = ((known - known.mean(axis=0)) ** 2).mean()
            if spread > 1e-12:
                distance += ((known - now) ** 2).mean(axis=axes) / spread
        return int(distance.argmin())


class Demonstrations:
    """Demonstrations by task; made by `read_demonstrations`."""

    def __init__(self, tasks: dict[str, Beginnings]) -> None:
        self.tasks = tasks

    def nearest(self, task: str, first: SimulatorObservation) -> np.ndarray:
        """Actions (T, da) of the demonstration of `task` that began most like `first`."""
        known = self.tasks[task]
        return known.actions[known.nearest(first)]


def open_demonstrations(folder: Path, simulator: Simulator) -> LeRobotDataset:
    """The dataset of demonstrations.

    Raises:
        UserError: no such dataset, or of another robot than the simulator's.
    """
    dataset = LeRobotDataset(folder)
    for name, found, wanted in (
        ("robot_type", dataset.robot_type, simulator.robot_type),
        ("cameras", dataset.camera_keys, [simulator.camera_key]),
        ("fps", dataset.fps, simulator.fps),
    ):
        if found != wanted:
            raise UserError(f"demos={folder}: {name} is {found}, the simulator has {wanted}; give its demonstrations")
    return dataset


def picture_side(dataset: LeRobotDataset, simulator: Simulator) -> int:
    """Pixels of its square pictures. UserError for others."""
    height, width = dataset.features[simulator.camera_key]["shape"][:2]
    if height != width:
        raise UserError(f"demos={dataset.root}: pictures are {height}×{width}; the simulators' are square")
    return int(height)


def seeds_of(dataset: LeRobotDataset) -> set[int]:
    """The seeds of its episodes, of whatever task; empty where it does not tell them."""
    return {int(extra[SEED]) for _, _, _, extra in dataset.outline() if SEED in extra}


def read_demonstrations(dataset: LeRobotDataset, env: str, tasks: Sequence[str], camera: str) -> Demonstrations:
    """The beginnings of the demonstrations of `tasks`.

    Of a dataset that tells its seeds only those of even ones: in the others `data simulate` records what the expert
    wanted while noise was added to what was executed, and such actions lead elsewhere.

    Raises:
        UserError: there is none of a task, or a file of the dataset is missing or damaged.
    """
    found = {}
    for task in tasks:
        wanted = TASKS[env][task]
        numbers = [i for i, (_, _, texts, extra) in enumerate(dataset.outline()) if wanted in texts and _clean(extra)]
        if not numbers:
            raise UserError(f"demos={dataset.root}: has no demonstration of {wanted!r} to replay; leave {task} out")
        episodes = [dataset.episode(number) for number in numbers]
        found[task] = Beginnings(
            states=np.stack([episode.columns["observation.state"][0] for episode in episodes]).astype(np.float32),
            pictures=np.stack([_small(episode.frames(camera, [0])[0]) for episode in episodes]),
            actions=tuple(episode.columns["action"] for episode in episodes),
        )
    return Demonstrations(found)


def _clean(extra: dict) -> bool:
    return int(extra.get(SEED, 0)) % 2 == 0


def _small(picture: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (SIDE, SIDE, 3) in [0, 1]."""
    return cover(picture[None], SIDE, SIDE)[0].astype(np.float32) / 255
