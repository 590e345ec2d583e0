"""The robots that a policy was trained on: each with its own sizes, window and statistics.

A run of several sources with actions trains one model of the largest sizes; smaller robots' states and actions are
padded with zeros. An export of such a run holds them all in `robots.json`, the policy's own first; one of them is
loaded at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from kairos_train.basics.errors import UserError

ROBOTS_FILE = "robots.json"


@dataclass(frozen=True)
class Robot:
    """One source with actions.

    Attributes:
        name: of its dataset; unique among the robots of a run.
        action_dim, state_dim: its own sizes.
        fps: of raw frames and actions.
        cameras: in the order of the picture.
        window: the settings of its windows that decide what a policy sees and does.
        statistics: the content of its dataset_stats.json.
    """

    name: str
    action_dim: int
    state_dim: int
    fps: float
    cameras: list[str]
    window: dict[str, Any]
    statistics: dict[str, Any]

    def fits(self, window: Mapping[str, Any], action_dim: int, state_dim: int) -> bool:
        """Whether windows with these settings and sizes are this robot's."""
        own = {name: window.get(name) for name in self.window}
        return own == self.window and (self.action_dim, self.state_dim) == (action_dim, state_dim)


def to_json(robots: Sequence[Robot]) -> str:
    """The content of robots.json."""
    return json.dumps({"robots": [asdict(robot) for robot in robots]}, sort_keys=True) + "\n"


def robots_in(content: Mapping[str, Any], where: str) -> list[Robot]:
    """The robots of a robots.json.

    Raises:
        UserError: it is not what an export holds.
    """
    names = {field.name for field in fields(Robot)}
    entries = content.get("robots")
    if (
        not isinstance(entries, list)
        or not all(isinstance(e, dict) and set(e) == names for e in entries)
        or not entries
    ):
        raise UserError(f"{where}: is no list of robots with {', '.join(sorted(names))}; export again")
    return [Robot(**entry) for entry in entries]


def named(robots: Sequence[Robot], name: str | None, where: str) -> Robot:
    """The robot of this name; None: the first, whose the policy is by default.

    Raises:
        UserError: there is none of that name.
    """
    found = [robot for robot in robots if name in (None, robot.name)]
    if not found:
        there = ", ".join(robot.name for robot in robots) or "one that has no name"
        raise UserError(f"robot={name}: {where} was trained on {there}; name one of these, or none")
    return found[0]


def matching(
    robots: Sequence[Robot], name: str | None, *, window: Mapping[str, Any], action_dim: int, state_dim: int
) -> list[Robot]:
    """The robots that windows can be of: the one of the same dataset, else all whose settings and sizes they have."""
    fitting = [robot for robot in robots if robot.fits(window, action_dim, state_dim)]
    return [robot for robot in fitting if robot.name == name] or fitting
