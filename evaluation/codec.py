"""How well a video codec reconstructs recorded windows, beside another one.

Shapes: B batch, T frames, H W pixels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.shards import read_index
from evaluation.held_out import spread_batches
from kairos_train.conditioning.interfaces import VideoEncoder

MOVED = 10
"""Of 255: a pixel of a window is a moving one where any colour differs by more from the window's first frame."""


def reconstruction(codec: VideoEncoder, shards: Path, *, windows: int = 64, batch_size: int = 4) -> dict[str, Any]:
    """PSNR in dB of windows through a codec and back.

    Args:
        codec: encodes and decodes.
        shards: folder of windows.
        windows: how many, spread evenly over the shards.

    Returns:
        {"windows", "db", "moving_db"}: PSNR of the mean squared error over all pixels, and over those that move (None
        where none does).

    Raises:
        UserError: the shards are damaged.
    """
    index, total, moving = read_index(shards), [0.0, 0], [0.0, 0]
    count = 0
    for batch in spread_batches(index, count=windows, batch_size=batch_size, with_frames=True):
        recorded = batch.frames.numpy()
        error = squared_error(codec.decode(codec.encode(batch.frames)).cpu().numpy(), recorded)
        mask = moving_pixels(recorded)
        for sums, chosen in ((total, error), (moving, error[mask])):
            sums[0] += float(chosen.sum(dtype=np.float64))
            sums[1] += chosen.size
        count += len(batch.keys)
    return {"windows": count, "db": psnr_of(*total), "moving_db": psnr_of(*moving)}


def squared_error(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of uint8 (..., 3), the mean over colours: float32 (...)."""
    return np.square(a.astype(np.float32) - b).mean(-1)


def moving_pixels(frames: np.ndarray) -> np.ndarray:
    """uint8 (B,T,H,W,3) -> bool (B,T,H,W): which differ from the first frame."""
    return (np.abs(frames.astype(np.int16) - frames[:, :1]) > MOVED).any(-1)


def psnr_of(squared_errors: float, count: int) -> float | None:
    """dB of the mean of `count` squared errors; None of none."""
    return None if count == 0 else 10 * math.log10(255**2 / max(squared_errors / count, 1e-5))
