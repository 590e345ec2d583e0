"""A pushing task on a plane, numpy alone: the instruction names one of two blocks, which belongs on the green ring.

The table is the square [-1, 1]², x to the right and y up. A round agent moves by its action; contacts are quasi-static:
what is overlapped is moved out of the way along the line of centres, the agent moves blocks, blocks move blocks, walls
stop everything. The agent is rough: by Coulomb's law what it pushes goes its way, and slides off where that way is
farther aside of the line of centres than `FRICTION` allows (blocks are smooth and do not turn). Both tasks have the
same layouts, so a policy that ignores the instruction pushes the wrong block half of the time. Lengths are in table
units, of which the table is 2 wide.

Made so that a model of the demo's size learns it in minutes. The layouts vary within bounds. The table's colour tells
where on it one looks, as a real scene does. Red is mostly on the left: with sides drawn evenly neither the picture nor
the instruction says anything without the other, an exclusive or, which small models do not find in thousands of steps.
There is no velocity in the state: an imitator that knows the last movement repeats it. Smooth discs roll off each
other, so that an error of a pixel loses the block: that is what the friction is for.
"""

from __future__ import annotations

import math

import numpy as np

from dataloaders.simulators.base import CAMERA_KEY, TASKS, SimulatorObservation
from dataloaders.simulators.push2d_expert import expert_action

AGENT_RADIUS = 0.07
BLOCK_RADIUS = 0.12
GOAL_RADIUS = 0.13
STEP = 0.04  # way of the agent in one step at full action
FRICTION = 0.7  # coefficient between agent and blocks: 35 degrees either way
SUCCESS_DISTANCE = 0.06
_SUBSTEPS = 4  # small against the radii, so that nothing is jumped over
_RING = 0.035  # thickness of the goal's ring

_TABLE = (226, 222, 214)
_SHADE = 24  # red from left to right and blue from top to bottom differ from the middle by up to this much
_AGENT = (45, 45, 50)
_GOAL = (40, 160, 75)
_BLOCKS = ((212, 62, 50), (52, 92, 212))
# Corners of the rectangles in which the agent, the block on the left, the one on the right and the goal start.
_PLACES = (
    ((-0.15, -0.8), (-0.6, -0.25), (0.3, -0.25), (-0.2, 0.5)),
    ((0.15, -0.65), (-0.3, 0.05), (0.6, 0.05), (0.2, 0.7)),
)
_RED_LEFT = 0.8  # how often
_NAMED = {"push-red": 0, "push-blue": 1}


class Push2D:
    """State: the agent's x and y. Action: its movement, in units of `STEP` per step, in [-1, 1]². The blocks and the
    goal are in the picture only."""

    fps = 20.0
    robot_type = "disc"
    camera_key = CAMERA_KEY
    action_dim = 2
    state_dim = 2
    action_names = ["dx", "dy"]  # noqa: RUF012 - the interface's constant
    state_names = ["x", "y"]  # noqa: RUF012
    max_steps = 120

    def __init__(self, task: str, size: int) -> None:
        self.task, self.instruction = task, TASKS["push2d"][task]
        self._named = _NAMED[task]
        self._size = size
        self.agent: list[float] = [0.0, 0.0]
        self.blocks: list[list[float]] = [[-0.5, 0.0], [0.5, 0.0]]
        self.goal: tuple[float, float] = (0.0, 0.5)
        self._ground = self._draw_ground()

    def reset(self, seed: int) -> SimulatorObservation:
        """Lay the table for this seed; the task has no part in it."""
        rng = np.random.default_rng(seed)
        agent, left, right, goal = rng.uniform(*_PLACES).tolist()
        red, blue = (left, right) if rng.random() < _RED_LEFT else (right, left)
        self.agent, self.blocks, self.goal = agent, [red, blue], tuple(goal)
        self._ground = self._draw_ground()
        return self.observe()

    def step(self, action: np.ndarray) -> tuple[SimulatorObservation, bool]:
        """Execute (2,) in [-1, 1]; what is seen then, and whether the task is solved."""
        solved = self.advance(action)
        return self.observe(), solved

    def advance(self, action: np.ndarray) -> bool:
        """As `step`, without a picture."""
        dx, dy = (min(max(float(value), -1.0), 1.0) * STEP / _SUBSTEPS for value in action)
        for _ in range(_SUBSTEPS):
            before = tuple(self.agent)
            self.agent[0] += dx
            self.agent[1] += dy
            _keep_inside(self.agent, AGENT_RADIUS)
            self._resolve_contacts((self.agent[0] - before[0], self.agent[1] - before[1]))
        return math.dist(self.blocks[self._named], self.goal) < SUCCESS_DISTANCE

    def observe(self) -> SimulatorObservation:
        """The scene as it is now."""
        frame = self._ground.copy()
        for block, colour in zip(self.blocks, _BLOCKS):
            _draw(frame, block, BLOCK_RADIUS, colour)
        _draw(frame, self.agent, AGENT_RADIUS, _AGENT)
        return SimulatorObservation(frame, np.array(self.agent, np.float32))

    def expert_action(self) -> np.ndarray:
        """The scripted expert's movement, float32 (2,)."""
        block, other = self.blocks[self._named], self.blocks[1 - self._named]
        return expert_action(
            np.array(self.agent),
            np.array(block),
            np.array(other),
            np.array(self.goal),
            reach=AGENT_RADIUS + BLOCK_RADIUS,
            block_gap=2 * BLOCK_RADIUS,
            step=STEP,
            limit=1 - AGENT_RADIUS,
        )

    def close(self) -> None:
        """Nothing to give back."""

    def _resolve_contacts(self, way: tuple[float, float]) -> None:
        """Make room where the agent has come by `way`."""
        first, second = sorted(self.blocks, key=lambda block: math.dist(block, self.agent))
        for block in (first, second):
            _push_out(block, self.agent, AGENT_RADIUS + BLOCK_RADIUS, way)
            _keep_inside(block, BLOCK_RADIUS)
        _push_out(second, first, 2 * BLOCK_RADIUS)
        _keep_inside(second, BLOCK_RADIUS)
        # What stands against a wall yields no further: it holds up the one that pushes it, and that one the agent.
        _push_out(first, second, 2 * BLOCK_RADIUS)
        _keep_inside(first, BLOCK_RADIUS)
        for block in (first, second):
            _push_out(self.agent, block, AGENT_RADIUS + BLOCK_RADIUS)
        _keep_inside(self.agent, AGENT_RADIUS)

    def _draw_ground(self) -> np.ndarray:
        slope = (np.arange(self._size) + 0.5) * 2 / self._size - 1
        ground = np.empty((self._size, self._size, 3), np.uint8)
        ground[:] = _TABLE
        ground[..., 0] = np.rint(_TABLE[0] + _SHADE * slope)[None, :]
        ground[..., 2] = np.rint(_TABLE[2] - _SHADE * slope)[:, None]
        _draw(ground, self.goal, GOAL_RADIUS, _GOAL, hole=GOAL_RADIUS - _RING)
        return ground


def _keep_inside(point: list[float], radius: float) -> None:
    limit = 1.0 - radius
    point[0] = min(max(point[0], -limit), limit)
    point[1] = min(max(point[1], -limit), limit)


def _push_out(moved: list[float], by: list[float], distance: float, way: tuple[float, float] = (0.0, 0.0)) -> None:
    """Move one disc along the line of centres until it only touches the other, and as far aside as the `way` of a rough
    one takes it: at most `FRICTION` times as far as along the line."""
    dx, dy = moved[0] - by[0], moved[1] - by[1]
    now = math.hypot(dx, dy)
    if now >= distance:
        return
    if now < 1e-9:  # the centres coincide: any direction is as good
        dx, dy, now = 1e-9, 0.0, 1e-9
    dx, dy = dx / now, dy / now
    bound = FRICTION * (distance - now)
    aside = min(max(dx * way[1] - dy * way[0], -bound), bound)
    moved[0], moved[1] = by[0] + dx * distance - dy * aside, by[1] + dy * distance + dx * aside


def _draw(
    picture: np.ndarray,
    centre: list[float] | tuple[float, float],
    radius: float,
    colour: tuple[int, int, int],
    *,
    hole=0.0,
) -> None:
    """Blend a disc, or a ring when `hole` > 0, into a uint8 (H, H, 3) picture; edges are smooth over one pixel."""
    size = picture.shape[0]
    scale = size / 2
    column, row = (centre[0] + 1) * scale - 0.5, (1 - centre[1]) * scale - 0.5
    reach = radius * scale + 1
    top, bottom = max(math.floor(row - reach), 0), min(math.ceil(row + reach) + 1, size)
    left, right = max(math.floor(column - reach), 0), min(math.ceil(column + reach) + 1, size)
    rows, columns = np.arange(top, bottom)[:, None] - row, np.arange(left, right)[None] - column
    distance = np.sqrt(rows * rows + columns * columns)
    cover = np.clip(radius * scale - distance + 0.5, 0, 1)
    if hole > 0:
        cover *= np.clip(distance - hole * scale + 0.5, 0, 1)
    patch = picture[top:bottom, left:right]
    patch += np.rint(cover[..., None] * (np.array(colour) - patch.astype(np.float64))).astype(np.int16).astype(np.uint8)
