"""RoboTwin 2.0's three functions, answered by a policy server; runs in the simulator's own environment.

`script/eval_policy.py` of github.com/RoboTwin-Platform/RoboTwin imports its policy by name and calls `get_model(args)`
once, `reset_model(model)` before every episode and `eval(TASK_ENV, model, observation)` until the episode ends. The
observation holds `observation.<camera>.rgb` and `joint_action.vector` (14: six joints and a gripper, left and right);
`TASK_ENV.take_action(action, action_type="qpos")` takes the same 14 numbers. `eval` here executes one action per call:
the script gets an observation before each, as its example policies do after each.

Needs numpy, websockets and msgpack beside the simulator, Python 3.10 or newer, this code on its path, and no torch of
ours. `kairos-train benchmark write robotwin` writes the policy's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.benchmarks.replanning import ActionServer, Replanner
from kairos_train.basics.errors import UserError

DIMENSIONS = 14
CAMERAS = {
    "head_camera": ("head_camera", "head", "cam_high", "top"),
    "left_camera": ("left_camera", "cam_left_wrist", "left_wrist"),
    "right_camera": ("right_camera", "cam_right_wrist", "right_wrist"),
}
"""RoboTwin's camera -> what datasets call it (the last part of their key)."""


class Robotwin:
    """A connected policy, as the evaluation script's `model`.

    Args:
        policy: a connected client.
        args: of the script; see `get_model`.

    Raises:
        UserError: a robot or a policy without 14 dimensions, or cameras that are not RoboTwin's.
    """

    def __init__(self, policy: ActionServer, args: Mapping[str, Any]) -> None:
        arms = [args.get(f"{side}_arm_dim", 6) for side in ("left", "right")]
        told = policy.metadata
        sizes = {"robot": sum(arms) + 2, "policy's state": told["state_dim"], "policy's actions": told["action_dim"]}
        for name, size in sizes.items():
            if size != DIMENSIONS:
                raise UserError(
                    f"{name}: {size} dimensions; this adapter is for two arms of six joints and a gripper, 14"
                )
        states = [key for key in told["observation_keys"]["dataset"] if key not in (*told["cameras"], "prompt")]
        if len(states) != 1:
            raise UserError(f"policy: takes its state as {', '.join(states)}; RoboTwin has one vector of {DIMENSIONS}")
        self._state_key = states[0]
        self._cameras = cameras_of(told["cameras"], _given(args, "cameras") or "")
        steps = _given(args, "replan_steps")
        self._stream = Replanner(
            policy, replan_steps=None if steps is None else int(steps), seed=int(_given(args, "seed") or 0)
        )
        self._name = "/".join(str(args.get(key)) for key in ("task_name", "task_config", "ckpt_setting", "seed"))
        self._episodes = 0

    def begin(self) -> None:
        """Begin the next episode; its noise is its own."""
        self._stream.begin(f"{self._name}/{self._episodes}")
        self._episodes += 1

    def act(self, observation: Mapping[str, Any], instruction: str) -> np.ndarray:
        """The next joint positions, (14,) float32."""
        arrays = {key: observation["observation"][camera]["rgb"] for key, camera in self._cameras.items()}
        arrays[self._state_key] = np.asarray(observation["joint_action"]["vector"], np.float32)
        return self._stream.act(arrays, instruction)


def get_model(args: Mapping[str, Any]) -> Robotwin:
    """Connect.

    Args:
        args: of deploy_policy.yml and its overrides: `policy_url`; `policy_token_file`, `replan_steps` (actions
            executed per chunk), `cameras` (KEY=CAMERA,…: the dataset's key and RoboTwin's name) may be null. The script
            adds task_name, task_config, ckpt_setting, seed, left_arm_dim and right_arm_dim.
    """
    from kairos_train.serving.client import PolicyClient

    url, file = _given(args, "policy_url"), _given(args, "policy_token_file")
    if url is None:
        raise UserError("policy_url: is missing in deploy_policy.yml; say ws://HOST:PORT")
    policy = PolicyClient(url, token=None if file is None else Path(file).read_text().strip())
    try:
        return Robotwin(policy, args)
    except UserError:
        policy.close()
        raise


def reset_model(model: Robotwin) -> None:
    """Begin an episode."""
    model.begin()


def eval(TASK_ENV: Any, model: Robotwin, observation: Mapping[str, Any]) -> None:  # the script wants this name
    """Execute one action."""
    TASK_ENV.take_action(model.act(observation, TASK_ENV.get_instruction()), action_type="qpos")


def cameras_of(keys: list[str], told: str) -> dict[str, str]:
    """The policy's camera keys -> RoboTwin's cameras, told as KEY=CAMERA,… or by what datasets call them.

    Raises:
        UserError: a camera that is not known, or is needed twice.
    """
    pairs = dict(part.split("=", 1) for part in told.split(",") if "=" in part)
    found = {}
    for key in keys:
        last = key.replace("/", ".").rpartition(".")[2]
        known = [camera for camera, names in CAMERAS.items() if last in names]
        found[key] = pairs.pop(key, known[0] if known else "")
    if wrong := [key for key, camera in found.items() if not camera] or list(pairs):
        raise UserError(
            f"cameras: {wrong[0]!r} is not matched; say cameras as KEY=CAMERA,… with the policy's {', '.join(keys)} and"
            f" RoboTwin's {', '.join(CAMERAS)}"
        )
    if len(set(found.values())) < len(found):
        raise UserError(f"cameras: {found} takes one twice; match each to one of {', '.join(CAMERAS)}")
    return found


def _given(args: Mapping[str, Any], key: str) -> Any:
    """A setting, None where it is null: the script passes overrides as text."""
    value = args.get(key)
    return None if value in (None, "", "null", "None") else value
