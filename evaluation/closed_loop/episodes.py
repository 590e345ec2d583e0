"""One episode of the protocol: what is played, how, and what came of it.

Shapes: n actions of a plan, da action dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dataloaders.simulators.base import Simulator
from evaluation.closed_loop.episode import Episode, EpisodeOutcome
from kairos_train.basics.errors import one_line

if TYPE_CHECKING:
    from evaluation.closed_loop.policies import EpisodePolicy


Game = Generator[Callable[[], np.ndarray], np.ndarray, EpisodeOutcome]
"""An episode in progress: gives what is to be computed next, takes its result, returns the outcome."""


def play(simulator: Simulator, policy: EpisodePolicy, episode: Episode, *, replan_every: int) -> Game:
    """Play one episode, to success or to the simulator's `max_steps`.

    It stops where a plan is needed, so that the caller may compute several plans at a time; an exception that
    is thrown into it there is the policy's.

    Args:
        replan_every: actions executed of each plan; of a shorter plan all.
    """
    steps = 0
    try:
        seen = [simulator.reset(episode.seed)]
        policy.begin(simulator, episode, seen[0])
        while True:
            plan = yield partial(policy.plan, seen)
            seen = []
            for action in _checked(plan, simulator.action_dim)[:replan_every]:
                solved = simulator.advance(action)
                steps += 1
                if solved or steps == simulator.max_steps:
                    return EpisodeOutcome(solved, steps)
                if policy.looks_every is not None and steps % policy.looks_every == 0:
                    seen.append(simulator.observe())
    except Exception as error:  # whatever it is: the episode was not solved
        return EpisodeOutcome(False, steps, f"{type(error).__name__}: {one_line(error)}")


def _checked(plan: np.ndarray, action_dim: int) -> np.ndarray:
    """The plan, float (n, da); ValueError when it is none, which a simulator would take without a word."""
    if np.ndim(plan) != 2 or len(plan) < 1 or np.shape(plan)[1] != action_dim:
        raise ValueError(f"a plan of shape {list(np.shape(plan))}; the simulator takes (n, {action_dim})")
    if not np.isfinite(plan).all():
        raise ValueError("a plan that is not finite")
    return plan
