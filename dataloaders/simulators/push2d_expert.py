"""The scripted expert of the pushing task: round the block to the point behind it, then push; the rough block follows.

Positions are float (2,) arrays in table units. The expert is a function of the scene alone, so it recovers from noise
on its actions.
"""

from __future__ import annotations

import numpy as np

_BEHIND = 0.92  # cosine of the angle, 23 degrees, within which the agent is behind the block; the contact bears 35


def expert_action(
    agent: np.ndarray,
    block: np.ndarray,
    other: np.ndarray,
    goal: np.ndarray,
    *,
    reach: float,
    block_gap: float,
    step: float,
    limit: float,
) -> np.ndarray:
    """Movement of the agent, float32 (2,) in [-1, 1].

    Args:
        reach: distance of agent and block that touch.
        block_gap: distance of two blocks that touch.
        step: way of the agent in one step at full action.
        limit: largest coordinate of the agent.
    """
    target = _way_point(block, other, goal, block_gap)
    to_target = target - block
    remaining = float(np.hypot(*to_target))
    if np.hypot(*(goal - block)) < 0.01:
        return np.zeros(2, np.float32)
    ahead = to_target / max(remaining, 1e-9)
    offset = agent - block
    distance = float(np.hypot(*offset))
    if offset @ ahead < -_BEHIND * distance and distance < reach + 1.5 * step:
        move = ahead * min(remaining + max(distance - reach, 0.0), step)
    else:
        behind = np.clip(block - ahead * (reach + 0.25 * step), -limit, limit)
        move = _towards(agent, behind, (block, other), reach + 0.01, step)
    return np.clip(move / step, -1, 1).astype(np.float32)


def _way_point(block: np.ndarray, other: np.ndarray, goal: np.ndarray, block_gap: float) -> np.ndarray:
    """Where to push to now: the goal, or a point beside the other block where that one is in the way."""
    line = goal - block
    length = float(np.hypot(*line))
    if length < 1e-6:
        return goal
    along = line / length
    to_other = other - block
    ahead = float(to_other @ along)
    aside = to_other - ahead * along
    miss = float(np.hypot(*aside))
    if not 0 < ahead < length or miss > block_gap + 0.02:
        return goal
    away = -aside / miss if miss > 1e-6 else np.array([-along[1], along[0]])
    return np.clip(other + away * (block_gap + 0.08), -0.8, 0.8)


def _towards(
    agent: np.ndarray, target: np.ndarray, obstacles: tuple[np.ndarray, ...], clearance: float, step: float
) -> np.ndarray:
    """Movement of at most `step` towards the target, round the nearest disc of radius `clearance` in the way."""
    line = target - agent
    length = float(np.hypot(*line))
    if length < 1e-9:
        return line
    move = line * min(1.0, step / length)
    for centre in sorted(obstacles, key=lambda c: float(np.hypot(*(c - agent)))):
        to_centre = centre - agent
        distance = float(np.hypot(*to_centre))
        ahead = float(to_centre @ line) / length
        nearest = agent + line / length * min(max(ahead, 0.0), length)
        if ahead <= 0 or np.hypot(*(centre - nearest)) >= clearance or np.hypot(*(target - centre)) < clearance - 0.02:
            continue
        outward = -to_centre / max(distance, 1e-9)
        round_it = np.array([-outward[1], outward[0]])
        if round_it @ (target - agent) < 0:
            round_it = -round_it
        # Along the tangent from outside, along the circle on it, and outwards inside of it.
        sine = min(clearance / max(distance, 1e-9), 1.0)
        return step * (round_it * sine - outward * np.sqrt(1 - sine**2)) + outward * max(clearance - distance, 0.0)
    return move
