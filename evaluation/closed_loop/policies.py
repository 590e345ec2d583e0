"""Who plays: the policy behind a server, and references that know nothing of it.

    model    the served policy
    wrong    the served policy, told another task's instruction
    random   an action drawn evenly from [-1, 1] at every step
    hold     the action 0 at every step, which is to stand still in these simulators
    replay   the actions of the demonstration that began most alike, open loop
    expert   the simulator's scripted expert, which sees the scene itself

Shapes: n actions of a plan, da action dimensions, H side of the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dataloaders.simulators.base import DEFAULT_TASKS, TASKS, Simulator, SimulatorObservation
from evaluation.closed_loop.demonstrations import Demonstrations
from evaluation.closed_loop.episode import Episode, noise_seed
from kairos_train.basics.errors import UserError
from kairos_train.serving.client import PolicyClient

SERVED = ("model", "wrong")
POLICIES = (*SERVED, "random", "hold", "replay", "expert")


class EpisodePolicy(Protocol):
    """Plays one episode at a time.

    Attributes:
        looks_every: steps of the episode between the observations that it is given; None: it needs none but the first.
        waits: whether a plan takes time elsewhere, in which other episodes can go on.
    """

    looks_every: int | None
    waits: bool

    def begin(self, simulator: Simulator, episode: Episode, first: SimulatorObservation) -> None:
        """An episode begins."""
        ...

    def plan(self, seen: Sequence[SimulatorObservation]) -> np.ndarray:
        """Actions from now on, (n, da), n at least 1; `seen` since the last plan, oldest first."""
        ...


class RandomPolicy:
    """Another action at every step."""

    looks_every, waits = None, False

    def begin(self, simulator: Simulator, episode: Episode, first: SimulatorObservation) -> None:
        """Draw from the episode's own generator."""
        self._rng = np.random.default_rng([episode.seed, *f"random:{episode.task}".encode()])
        self._size = (1, simulator.action_dim)

    def plan(self, seen: Sequence[SimulatorObservation]) -> np.ndarray:
        """(1, da)."""
        return self._rng.uniform(-1, 1, self._size)


class HoldPolicy:
    """Stands still: actions of these simulators are movements."""

    looks_every, waits = None, False

    def begin(self, simulator: Simulator, episode: Episode, first: SimulatorObservation) -> None:
        """Nothing to remember."""
        self._still = np.zeros((1, simulator.action_dim))

    def plan(self, seen: Sequence[SimulatorObservation]) -> np.ndarray:
        """(1, da)."""
        return self._still


class ReplayPolicy:
    """Plays the nearest demonstration of the task from its first action on, then stands still."""

    looks_every, waits = None, False

    def __init__(self, demonstrations: Demonstrations) -> None:
        self._demonstrations = demonstrations

    def begin(self, simulator: Simulator, episode: Episode, first: SimulatorObservation) -> None:
        """Choose the demonstration by what is seen first."""
        self._actions = self._demonstrations.nearest(episode.task, first)
        self._next = 0

    def plan(self, seen: Sequence[SimulatorObservation]) -> np.ndarray:
        """(1, da)."""
        actions = self._actions[self._next : self._next + 1]
        self._next += 1
        return actions if len(actions) else np.zeros_like(self._actions[:1])


class ExpertPolicy:
    """The scripted expert, asked at every step."""

    looks_every, waits = None, False

    def begin(self, simulator: Simulator, episode: Episode, first: SimulatorObservation) -> None:
        """Remember whose expert it is."""
        self._simulator = simulator

    def plan(self, seen: Sequence[SimulatorObservation]) -> np.ndarray:
        """(1, da)."""
        return self._simulator.expert_action()[None]


@dataclass(frozen=True)
class ServedKeys:
    """How a server wants to be asked.

    Attributes:
        camera, state: keys of an observation.
        given_frames: frames that the model looks at; with more than one, every frame must be shown to the server.
        looks_every: steps between two frames.
    """

    camera: str
    state: str
    given_frames: int
    looks_every: int


class RemotePolicy:
    """A policy behind a server.

    Args:
        client: used by one episode at a time.
        keys: from `served_keys`.
        wrong: tell it another task's instruction.
    """

    waits = True

    def __init__(self, client: PolicyClient, keys: ServedKeys, *, wrong: bool = False) -> None:
        self._client, self._keys, self._wrong = client, keys, wrong
        self.looks_every = keys.looks_every

    def begin(self, simulator: Simulator, episode: Episode, first: SimulatorObservation) -> None:
        """The server forgets the episode before with the first plan."""
        self._episode, self._replan = episode, 0
        tasks = TASKS[episode.env]
        self._prompt = tasks[another_task(episode.env, episode.task) if self._wrong else episode.task]

    def plan(self, seen: Sequence[SimulatorObservation]) -> np.ndarray:
        """(n, da), in the server's own length."""
        if self._replan == 0:
            self._client.reset()
        keys, latest = self._keys, seen[-self._keys.given_frames :]
        message = {
            keys.camera: np.stack([observation.frame for observation in latest]),
            keys.state: np.stack([observation.state for observation in latest]),
            "prompt": self._prompt,
            "seed": noise_seed(self._episode, self._replan),
        }
        self._replan += 1
        return self._client.infer(message)["actions"]


def another_task(env: str, task: str) -> str:
    """The task whose instruction is the wrong one for `task`: the next of the environment's default ones."""
    tasks = DEFAULT_TASKS[env]
    return tasks[(tasks.index(task) + 1) % len(tasks)] if task in tasks else tasks[0]


def served_keys(metadata: Mapping[str, Any], simulator: Simulator, *, replan_every: int) -> ServedKeys:
    """How the server with this metadata is asked about a simulator.

    Raises:
        UserError: its policy is not one for this simulator, or plans less than is executed.
    """
    for name, wanted in (
        ("cameras", [simulator.camera_key]),
        ("action_dim", simulator.action_dim),
        ("state_dim", simulator.state_dim),
        ("fps", simulator.fps),
    ):
        told = metadata.get(name)
        if told != wanted and not (name == "fps" and told is None):
            raise UserError(f"server: its policy has {name} {told}, the simulator has {wanted}; give the env it is for")
    if replan_every > metadata["horizon"]:
        raise UserError(
            f"replan_every={replan_every}: the policy plans {metadata['horizon']} actions at a time; execute as many"
            " at most"
        )
    states = [key for key in metadata["observation_keys"]["dataset"] if key not in (simulator.camera_key, "prompt")]
    if len(states) != 1:
        raise UserError(f"server: its policy takes the state in {len(states)} parts ({', '.join(states)}), not one")
    given, ratio = metadata["given_frames"], metadata["action_video_freq_ratio"]
    if given > 1 and replan_every % ratio:
        raise UserError(
            f"replan_every={replan_every}: the policy looks at {given} frames, {ratio} actions apart; give a multiple"
        )
    return ServedKeys(simulator.camera_key, states[0], given, replan_every if given == 1 else ratio)
