"""Training windows cut from an episode: which raw frames, which actions, and how cameras become one picture.

Shapes: L raw frames of an episode, T video frames of a window, A actions of a window, H W height and width, C cameras.

A window that starts at raw frame s shows the raw frames s, s + r, …, s + (T-1)·r with r = `action_video_freq_ratio`,
and carries the actions of the raw frames s … s + (T-1)·r - 1, so A = (T-1)·r (training recipe: 33 raw frames, 32
actions, 9 video frames). Its one state x is that of raw frame s. With `action_values=minus_state` dimension d of the
i-th action is a[s+i, d] - x[d] unless d is one of `absolute_dims`: a policy that is given x gets the command back.

Past the end of the episode a window shows its last frame again. Actions there are 0 (a delta of nothing), and the last
recorded value in `absolute_dims`; they carry no loss either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dataloaders.config import WindowConfig
from kairos_train.basics.errors import UserError
from kairos_train.basics.geometry import PIXEL_MULTIPLE, TIME_STRIDE, whole_frames

LAYOUTS = ("side_by_side", "head_over_wrists")
ACTION_VALUES = ("recorded", "minus_state")
POLICY_FIELDS = (
    *("frames", "action_video_freq_ratio", "height", "width", "layout", "state_key", "action_key"),
    *("action_values", "absolute_dims"),
)
"""Fields of a window that decide what a policy sees and what its actions mean."""


@dataclass(frozen=True, slots=True)
class Window:
    """One window of an episode: first raw frame, and how much of it lies inside the episode."""

    start: int
    valid_actions: int  # of A; the rest is padding (zeros, masked)
    valid_frames: int  # of T; the rest repeats the episode's last frame


def check_window(window: WindowConfig) -> None:
    """Raise UserError unless the window's numbers are usable (the VAE wants 4k + 1 frames, the patches sides of 32)."""
    frames, least = window.frames, 5 if window.action_key else 1  # without actions, a window may be an image
    low = whole_frames(frames)
    if frames < least or low != frames:
        legal = str(least) if low < least else f"{low} or {low + TIME_STRIDE}"
        raise UserError(
            f"data.window.frames={frames}: must be 4k+1 and at least {least}; the nearest legal value is {legal}"
        )
    for name in ("action_video_freq_ratio", "stride"):
        if getattr(window, name) < 1:
            raise UserError(f"data.window.{name}={getattr(window, name)}: must be at least 1")
    for name in ("height", "width"):
        value = getattr(window, name)
        if value < PIXEL_MULTIPLE or value % PIXEL_MULTIPLE:
            low = value // PIXEL_MULTIPLE * PIXEL_MULTIPLE
            legal = f"{low} or {low + PIXEL_MULTIPLE}" if low > 0 else str(PIXEL_MULTIPLE)
            rule = f"must be a multiple of {PIXEL_MULTIPLE}; the nearest legal value is {legal}"
            raise UserError(f"data.window.{name}={value}: {rule}")
    if window.layout not in LAYOUTS:
        raise UserError(f"data.window.layout={window.layout}: must be one of {', '.join(LAYOUTS)}")
    if window.layout == "head_over_wrists" and window.height % 96:
        legal = f"{max(window.height // 96 * 96, 96)} or {(window.height // 96 + 1) * 96}"
        raise UserError(
            f"data.window.height={window.height}: must be a multiple of 96 (the head takes two thirds); use {legal}"
        )
    if window.action_values not in ACTION_VALUES:
        raise UserError(f"data.window.action_values={window.action_values}: must be one of {', '.join(ACTION_VALUES)}")


def check_dimensions(window: WindowConfig, action_dim: int, state_dim: int) -> None:
    """Raise UserError unless the window's action options fit vectors of these sizes."""
    if out := [d for d in window.absolute_dims if not 0 <= d < action_dim]:
        raise UserError(f"data.window.absolute_dims names {out[0]}, but actions have {action_dim} dimensions, from 0")
    if window.action_values == "minus_state":
        deltas = [d for d in range(action_dim) if d not in window.absolute_dims]
        if deltas and deltas[-1] >= state_dim:
            raise UserError(
                f"data.window.action_values=minus_state: action dimension {deltas[-1]} has no state to subtract (the "
                f"state has {state_dim}); name it in data.window.absolute_dims or use action_values=recorded"
            )


def action_count(window: WindowConfig) -> int:
    """A, actions of one window."""
    return (window.frames - 1) * window.action_video_freq_ratio


def windows_of(length: int, window: WindowConfig) -> list[Window]:
    """All windows of an episode of `length` raw frames, in order of their start.

    Every `stride`-th raw frame starts one, as long as at least one more video frame of the episode follows: a window
    whose only real frame is the first would teach that the world stands still. An episode too short for that gives the
    one window at 0.
    """
    last_start = max(length - 1 - window.action_video_freq_ratio, 0)
    return [
        Window(
            start=start,
            valid_actions=min(action_count(window), length - start),
            valid_frames=min(window.frames, (length - 1 - start) // window.action_video_freq_ratio + 1),
        )
        for start in range(0, last_start + 1, window.stride)
    ]


def windows_of_runs(runs: Sequence[tuple[int, int]], window: WindowConfig) -> list[tuple[Window, int]]:
    """(window, end of its run) of an episode whose raw frames follow each other inside (first, end) runs alone.

    To windows a run is an episode. One of several that is too short for a second video frame gives none.
    """
    found = []
    for first, end in runs:
        if len(runs) == 1 or end - first > window.action_video_freq_ratio:
            found += [(replace(w, start=first + w.start), end) for w in windows_of(end - first, window)]
    return found


def frame_indices(start: int, length: int, window: WindowConfig) -> np.ndarray:
    """Raw frame index of each video frame, int64 (T,); past the end of the episode the last frame repeats."""
    return np.minimum(start + np.arange(window.frames) * window.action_video_freq_ratio, length - 1)


def cut_actions(
    actions: np.ndarray, start: int, window: WindowConfig, *, states: np.ndarray | None = None
) -> np.ndarray:
    """Actions (L, da) -> float32 (A, da) of the window at `start`, as the window's options want them.

    Differences are taken in the precision of what is given, and rounded then.

    Args:
        states: (L, ds), needed with `action_values=minus_state`.
    """
    out = np.zeros((action_count(window), actions.shape[1]), dtype=np.float32)
    inside = actions[start : start + len(out)]
    out[: len(inside)] = inside - action_offset(actions.shape[1], states, start, window)
    out[len(inside) :, window.absolute_dims] = inside[-1, window.absolute_dims]
    return out


def action_offset(action_dim: int, states: np.ndarray | None, start: int | np.ndarray, window: WindowConfig):
    """What is subtracted from the actions of the windows at `start`: (da,) or, for n starts, (n, da); float32, or of
    the states' type."""
    offset = np.zeros((*np.shape(start), action_dim), dtype=np.float32 if states is None else states.dtype)
    if window.action_values == "minus_state":
        deltas = [d for d in range(action_dim) if d not in window.absolute_dims]
        offset[..., deltas] = states[start][..., deltas]
    return offset


def choose_cameras(window: WindowConfig, available: Sequence[str]) -> list[str]:
    """Cameras of a window in the order of its layout; none named means all of `available` in name order.

    Raises:
        UserError: the dataset has no camera with files, or lacks a wanted one; not the three that the layout needs.
    """
    wanted = window.cameras
    if not available:
        raise UserError("dataset: has no camera with files; a window needs at least one")
    if window.layout == "head_over_wrists" and len(wanted) != 3:
        raise UserError(
            f"data.window.cameras={list(wanted)}: layout=head_over_wrists needs three, named in the order head, left "
            f"wrist, right wrist; this dataset has {', '.join(available)}"
        )
    if twice := next((camera for camera in wanted if wanted.count(camera) > 1), None):
        raise UserError(
            f"data.window.cameras={list(wanted)}: names {twice} twice, and a policy is given each camera once; name "
            f"each once, of {', '.join(available)}"
        )
    for camera in wanted:
        if camera not in available:
            raise UserError(f"data.window.cameras: {camera!r} has no files; this dataset has {', '.join(available)}")
    return list(wanted) or sorted(available)


def cover(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (n, h, w, 3) -> (n, height, width, 3): scaled to cover the target, centre cropped, never stretched.

    Crop and scale are one resampling step (bicubic with antialiasing over the centred box of the target's aspect), so
    that both axes get exactly the same scale.
    """
    from PIL import Image

    h, w = frames.shape[1:3]
    if (h, w) == (height, width):
        return frames
    scale = max(height / h, width / w)
    box_h, box_w = min(height / scale, h), min(width / scale, w)
    left, top = (w - box_w) / 2, (h - box_h) / 2
    box = (left, top, left + box_w, top + box_h)
    out = np.empty((len(frames), height, width, 3), dtype=np.uint8)
    for i, frame in enumerate(frames):
        image = Image.fromarray(np.ascontiguousarray(frame))
        out[i] = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))
    return out


def picture_size(window: WindowConfig, cameras: int) -> tuple[int, int]:
    """(height, width) in pixels of a window's picture of `cameras` cameras."""
    return (window.height, window.width * (cameras if window.layout == "side_by_side" else 1))


def camera_places(window: WindowConfig, cameras: int) -> list[tuple[int, int]]:
    """(height, width) in pixels of each camera's part of a window's picture, in the order of the layout."""
    if window.layout == "side_by_side":
        return [(window.height, window.width)] * cameras
    third, half = window.height // 3, window.width // 2
    return [(2 * third, window.width)] + [(third, half)] * (cameras - 1)


def compose(pictures: Sequence[np.ndarray], window: WindowConfig) -> np.ndarray:
    """One uint8 (n, h, w, 3) array per camera (sizes may differ) -> (n, *picture_size, 3), in the order given.

    `side_by_side`: H×W each, from left to right. `head_over_wrists`: 2H/3×W over two of H/3×W/2.
    """
    parts = [cover(p, *place) for p, place in zip(pictures, camera_places(window, len(pictures)))]
    if window.layout == "side_by_side":
        return np.concatenate(parts, axis=2)
    return np.concatenate([parts[0], np.concatenate(parts[1:], axis=2)], axis=1)
