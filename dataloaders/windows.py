"""Training windows cut from an episode: which raw frames, which actions, and how cameras become one picture.

Shapes: L raw frames of an episode, T video frames of a window, A actions of a window, H W height and width, C cameras.

A window that starts at raw frame s shows the raw frames s, s + r, …, s + (T-1)·r with r = `action_video_freq_ratio`,
and carries the actions of the raw frames s … s + (T-1)·r - 1, so A = (T-1)·r (training recipe: 33 raw frames, 32
actions, 9 video frames).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kairos_train.config.schema import WindowConfig
from kairos_train.errors import UserError


@dataclass(frozen=True)
class Window:
    """One window of an episode: first raw frame, and how much of it lies inside the episode."""

    start: int
    valid_actions: int  # of A; the rest is padding (zeros, masked)
    valid_frames: int  # of T; the rest repeats the episode's last frame


def check_window(window: WindowConfig) -> None:
    """Raise UserError unless the window's numbers are usable (the VAE wants 4k + 1 frames, the patches sides of 32)."""
    frames = window.frames
    if frames < 5 or (frames - 1) % 4:
        low = (frames - 1) // 4 * 4 + 1
        legal = "5" if frames < 5 else f"{low} or {low + 4}"
        raise UserError(f"data.window.frames={frames}: must be 4k+1 and at least 5; the nearest legal value is {legal}")
    for name in ("action_video_freq_ratio", "stride"):
        if getattr(window, name) < 1:
            raise UserError(f"data.window.{name}={getattr(window, name)}: must be at least 1")
    for name in ("height", "width"):
        value = getattr(window, name)
        if value < 32 or value % 32:
            low = max(value // 32 * 32, 32)
            legal = "32" if value < 32 else f"{low} or {low + 32}"
            raise UserError(f"data.window.{name}={value}: must be a multiple of 32; the nearest legal value is {legal}")


def action_count(window: WindowConfig) -> int:
    """A, actions of one window."""
    return (window.frames - 1) * window.action_video_freq_ratio


def raw_span(window: WindowConfig) -> int:
    """Raw frames that one window spans, first and last included."""
    return action_count(window) + 1


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


def frame_indices(start: int, length: int, window: WindowConfig) -> np.ndarray:
    """Raw frame index of each video frame, int64 (T,); past the end of the episode the last frame repeats."""
    return np.minimum(start + np.arange(window.frames) * window.action_video_freq_ratio, length - 1)


def cut_actions(actions: np.ndarray, start: int, window: WindowConfig) -> np.ndarray:
    """Actions (L, da) -> float32 (A, da) of the window at `start`; those past the end of the episode are 0."""
    out = np.zeros((action_count(window), actions.shape[1]), dtype=np.float32)
    inside = actions[start : start + len(out)]
    out[: len(inside)] = inside
    return out


def choose_cameras(wanted: Sequence[str], available: Sequence[str]) -> list[str]:
    """Cameras of a window in the order they stand side by side; empty `wanted` means all of `available`.

    Raises:
        UserError: the dataset has no camera with files, or lacks a wanted one.
    """
    if not available:
        raise UserError("dataset: has no camera with files; a window needs at least one")
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


def side_by_side(pictures: Sequence[np.ndarray], window: WindowConfig) -> np.ndarray:
    """One uint8 (n, h, w, 3) array per camera (sizes may differ) -> (n, H, C·W, 3), in the order given."""
    return np.concatenate([cover(p, window.height, window.width) for p in pictures], axis=2)
