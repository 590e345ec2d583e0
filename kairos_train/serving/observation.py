"""Which keys an observation has, and from a decoded message to arrays that fit the model, or an error naming the field.

A model knows its cameras by the dataset's keys, in the order in which they were put together for training. A message
may name them so, or as openpi's clients for LIBERO and DROID do: EMBODIMENTS says which of their keys stands for which
camera. A layout is offered only when all of the model's cameras are in it and the sizes of the state agree.

Shapes: n frames of one message, oldest first; H W pixels as the camera gives them; D state dimensions.
"""

from __future__ import annotations

import difflib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kairos_train.basics.errors import UserError

PROMPT, SEED = "prompt", "seed"
MAX_PROMPT = 4096  # characters
MAX_SIDE = 4096  # pixels


@dataclass(frozen=True)
class Embodiment:
    """Keys of openpi's clients for one robot.

    Attributes:
        cameras: key -> what datasets call this camera (the last part of their key).
        state: key -> dimensions, in the order in which they make up the state.
    """

    name: str
    cameras: dict[str, tuple[str, ...]]
    state: dict[str, int]


EMBODIMENTS = (
    Embodiment(
        "libero",
        cameras={
            "observation/image": ("image", "agentview_image", "agentview_rgb"),
            "observation/wrist_image": ("wrist_image", "image2", "robot0_eye_in_hand_image", "eye_in_hand_rgb"),
        },
        state={"observation/state": 8},
    ),
    Embodiment(
        "droid",
        cameras={
            "observation/exterior_image_1_left": ("exterior_image_1_left", "exterior_1_left"),
            "observation/wrist_image_left": ("wrist_image_left", "wrist_left"),
        },
        state={"observation/joint_position": 7, "observation/gripper_position": 1},
    ),
)


@dataclass(frozen=True)
class KeyLayout:
    """Keys of one form of observation: cameras in the model's order; state keys with their sizes (None: not known)."""

    name: str
    cameras: tuple[str, ...]
    state: dict[str, int | None]

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.cameras, *self.state)


@dataclass(frozen=True)
class Observation:
    """One checked request.

    Attributes:
        pictures: one per camera, uint8 (n, H, W, 3), in the model's order.
        states: float32 (n, D), raw.
        prompt: the instruction.
        seed: of the noise; drawn from the system's randomness when the message has none.
    """

    pictures: tuple[np.ndarray, ...]
    states: np.ndarray
    prompt: str
    seed: int


def layouts_of(cameras: Sequence[str], state_key: str, state_dim: int) -> tuple[KeyLayout, ...]:
    """The forms of observation that a model accepts, its dataset's own keys first.

    Args:
        cameras: the dataset's keys in the model's order.
        state_key: `data.window.state_key`; columns joined by `+` are keys of their own.
        state_dim: D.
    """
    parts = state_key.split("+")
    sizes = {part: state_dim if len(parts) == 1 else None for part in parts}
    layouts = [KeyLayout("dataset", tuple(cameras), sizes)]
    for embodiment in EMBODIMENTS:
        names = [re.split(r"[./]", camera)[-1] for camera in cameras]
        keys = [key for name in names for key, known in embodiment.cameras.items() if name in known]
        one_to_one = len(names) == len(keys) and sorted(keys) == sorted(embodiment.cameras)
        if one_to_one and sum(embodiment.state.values()) == state_dim:
            layouts.append(KeyLayout(embodiment.name, tuple(keys), dict(embodiment.state)))
    return tuple(layouts)


class ObservationReader:
    """Checks decoded messages.

    Args:
        layouts: from `layouts_of`.
        state_dim: D.
        most_frames: frames of one camera that the model is given at most.
    """

    def __init__(self, layouts: Sequence[KeyLayout], *, state_dim: int, most_frames: int) -> None:
        self.layouts, self.state_dim, self.most_frames = tuple(layouts), state_dim, most_frames

    def read(self, message: Any) -> Observation:
        """The observation of a decoded message.

        Raises:
            UserError: naming the first field that is missing, unknown or unfit.
        """
        if not isinstance(message, dict):
            raise UserError(f"message: is a {type(message).__name__}; send a map from keys to arrays")
        layout = self._layout(message)
        pictures = tuple(self._pictures(key, message[key]) for key in layout.cameras)
        states = self._states(layout, message)
        frames = {key: len(picture) for key, picture in zip(layout.cameras, pictures)} | {"the state": len(states)}
        if len(set(frames.values())) > 1:
            told = ", ".join(f"{count} of {key}" for key, count in frames.items())
            raise UserError(f"frames: {told}; send as many of each")
        return Observation(pictures, states, _prompt(message[PROMPT]), _seed(message.get(SEED)))

    def _layout(self, message: dict[Any, Any]) -> KeyLayout:
        """The layout that has most of the message's keys; all of its keys must be there, and no others."""
        layout = max(self.layouts, key=lambda one: len(message.keys() & set(one.keys)))
        wanted = (*layout.keys, PROMPT)
        for key in message:
            if key not in (*wanted, SEED):
                shown = repr(key[:80])
                near = difflib.get_close_matches(key[:80], wanted, n=1) if isinstance(key, str) else []
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise UserError(f"{shown}: is no key of this policy; {hint}send {self.told()}")
        for key in wanted:
            if key not in message:
                raise UserError(f"{key!r}: is missing; send {self.told()}")
        return layout

    def told(self) -> str:
        """The accepted keys in words."""
        return " or ".join(", ".join((*layout.keys, PROMPT)) for layout in self.layouts)

    def _pictures(self, key: str, value: Any) -> np.ndarray:
        """uint8 (n, H, W, 3)."""
        if not isinstance(value, np.ndarray):
            raise UserError(f"{key!r}: is a {type(value).__name__}; send a uint8 array (H, W, 3)")
        if value.dtype != np.uint8:
            raise UserError(f"{key!r}: has dtype {value.dtype}; send uint8")
        clip = value[None] if value.ndim == 3 else value
        if clip.ndim != 4 or clip.shape[-1] != 3 or not all(1 <= side <= MAX_SIDE for side in clip.shape[1:3]):
            raise UserError(
                f"{key!r}: has shape {list(value.shape)}; send (H, W, 3) or (n, H, W, 3) with sides of 1 to {MAX_SIDE}"
            )
        self._check_count(key, len(clip))
        return clip

    def _states(self, layout: KeyLayout, message: dict[Any, Any]) -> np.ndarray:
        """float32 (n, D)."""
        parts = []
        for key, size in layout.state.items():
            value = message[key]
            if not isinstance(value, np.ndarray | np.generic | float | int) or isinstance(value, bool):
                raise UserError(f"{key!r}: is a {type(value).__name__}; send an array of numbers")
            array = np.atleast_1d(value)
            if array.dtype.kind not in "fiu":
                raise UserError(f"{key!r}: has dtype {array.dtype}; send float32")
            array = array[None] if array.ndim == 1 else array
            if array.ndim != 2 or (size is not None and array.shape[1] != size):
                shape = "(D,)" if size is None else f"({size},)"
                raise UserError(f"{key!r}: has shape {list(np.shape(value))}; send {shape}")
            self._check_count(key, len(array))
            with np.errstate(over="ignore"):  # found below, as infinity
                array = array.astype(np.float32)
            if (bad := np.argwhere(~np.isfinite(array))).size:
                raise UserError(f"{key!r}: dimension {int(bad[0, 1])} is not a finite float32; send finite numbers")
            parts.append(array)
        if len({len(part) for part in parts}) > 1:
            told = ", ".join(f"{len(part)} of {key}" for key, part in zip(layout.state, parts))
            raise UserError(f"frames: {told}; send as many of each")
        states = np.concatenate(parts, axis=1)
        if states.shape[1] != self.state_dim:
            keys = ", ".join(layout.state)
            raise UserError(f"{keys}: {states.shape[1]} dimensions; the model takes {self.state_dim}")
        return states

    def _check_count(self, key: str, count: int) -> None:
        if not 1 <= count <= self.most_frames:
            raise UserError(f"{key!r}: has {count} frames; the model is given 1 to {self.most_frames}")


def _prompt(value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{PROMPT!r}: is a {type(value).__name__}; send the instruction as text")
    if len(value) > MAX_PROMPT:
        raise UserError(f"{PROMPT!r}: has {len(value)} characters; send at most {MAX_PROMPT}")
    return str(value)


def _seed(value: Any) -> int:
    if value is None:
        return secrets.randbits(48)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < 2**63:
        raise UserError(f"{SEED!r}: must be a whole number from 0 to 2^63 - 1")
    return int(value)
