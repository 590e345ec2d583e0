"""What every simulator offers, and how one is made by name.

Shapes: H height and width of the square picture, ds state dimensions, da action dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kairos_train.basics.errors import UserError

CAMERA_KEY = "observation.images.top"

# Instruction by task, task by environment. Those of Meta-World are worded as LeRobot words them.
TASKS: dict[str, dict[str, str]] = {
    "metaworld": {
        "button-press-topdown-v3": "Press a button from the top",
        "drawer-open-v3": "Open a drawer",
        "window-open-v3": "Push and open a window",
        "reach-v3": "Reach a goal position",
    },
    "push2d": {
        "push-red": "Push the red block to the green ring",
        "push-blue": "Push the blue block to the green ring",
    },
}
# Without reach: its goal is too small a mark for the picture sizes of the demonstrations.
DEFAULT_TASKS: dict[str, list[str]] = {
    "metaworld": ["button-press-topdown-v3", "drawer-open-v3", "window-open-v3"],
    "push2d": ["push-red", "push-blue"],
}


@dataclass(frozen=True)
class SimulatorObservation:
    """What the policy gets: `frame` uint8 RGB (H, H, 3), `state` float32 (ds,)."""

    frame: np.ndarray
    state: np.ndarray


class Simulator(Protocol):
    """One task of one environment. `fps` is the number of actions per second, `max_steps` the length of an episode."""

    fps: float
    robot_type: str
    camera_key: str
    action_dim: int
    state_dim: int
    action_names: list[str]
    state_names: list[str]
    max_steps: int
    instruction: str

    def reset(self, seed: int) -> SimulatorObservation:
        """Start the episode that is a pure function of `seed`."""
        ...

    def step(self, action: np.ndarray) -> tuple[SimulatorObservation, bool]:
        """Execute (da,) in [-1, 1], larger values are clipped; the next observation, and whether the task is solved."""
        ...

    def advance(self, action: np.ndarray) -> bool:
        """As `step`, without the observation: pictures take most of a step's time, and not everybody looks at all."""
        ...

    def observe(self) -> SimulatorObservation:
        """The scene as it is now."""
        ...

    def expert_action(self) -> np.ndarray:
        """What the scripted expert does now, float32 (da,) in [-1, 1]. It sees the scene itself, not the picture."""
        ...

    def close(self) -> None:
        """Give the renderer back; nothing may be called afterwards."""
        ...


def check_task(env: str, task: str | None) -> str:
    """The task's name, the environment's first default task for None.

    Raises:
        UserError: unknown environment or task.
    """
    if env not in TASKS:
        raise UserError(f"env is {env!r}; it must be one of {', '.join(TASKS)}")
    if task is None:
        return DEFAULT_TASKS[env][0]
    if task not in TASKS[env]:
        raise UserError(f"task is {task!r}; {env} has {', '.join(TASKS[env])}")
    return task
