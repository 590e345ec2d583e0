"""Noise schedules of flow matching (model specification, "Objective and schedule").

σ runs from 1 (noise) towards 0 (data) over `linspace(1, 0, steps + 1)` without its last value, then is shifted towards
noise, σ' = s·σ / (1 + (s − 1)·σ). The video's s grows with frames and resolution, the action's is constant.
All tables are float64.
"""

import math

import torch
from torch import Tensor

TRAINING_STEPS = 1000
"""Length of the shifted table that training draws its σ from."""

DISTILLED_TIMES = (1000.0, 800.0, 500.0, 100.0)
"""Timesteps of the distilled 4-step model before the shift."""

DISTILLED_SHIFT = 5.0
"""Constant shift of the distilled model in the public sampler."""


def video_shift(latent_frames: int, tokens_per_frame: int) -> float:
    """Shape-aware shift s = exp(μ)·√F of the video stream.

    Args:
        latent_frames: F, history frames included.
        tokens_per_frame: L after patchifying; μ is linear in it through (256, 0.5) and (8192, 0.9), not clamped.
    """
    mu = 0.5 + (0.9 - 0.5) * (tokens_per_frame - 256) / (8192 - 256)
    return math.exp(mu) * math.sqrt(latent_frames)


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """σ' = s·σ / (1 + (s − 1)·σ)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def shifted_sigmas(steps: int, shift: float) -> Tensor:
    """The σ of a `steps`-step schedule, descending from 1, float64 (steps,)."""
    return shift_sigmas(torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1], shift)


def distilled_sigmas(shift: float = DISTILLED_SHIFT) -> Tensor:
    """The four σ of the distilled model, float64 (4,)."""
    return shift_sigmas(torch.tensor(DISTILLED_TIMES, dtype=torch.float64) / 1000, shift)


def bell_weights(sigmas: Tensor) -> Tensor:
    """Loss weight of each entry of a shifted table: a bell around t = 500, lowest 0, mean 1; float64."""
    bell = torch.exp(-2 * ((sigmas * 1000 - 500) / 1000) ** 2)
    bell = bell - bell.min()
    return bell / bell.mean()
