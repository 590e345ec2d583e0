"""Timestep embedding: sinusoids in float64, MLP in float32 (model specification, "One stream")."""

import torch
from torch import Tensor, nn

from kairos_train.model.precision import UpcastLinear


def sinusoid(timesteps: Tensor, freq_dim: int) -> Tensor:
    """[cos | sin] of t·10000^(−i/(freq_dim/2)), float64 (..., freq_dim). Timesteps σ·1000, any shape."""
    half = freq_dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)
    angles = timesteps.double().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def time_embedding(freq_dim: int, dim: int) -> nn.Sequential:
    """Linear, SiLU, Linear: freq_dim → D, in float32 or wider."""
    return nn.Sequential(UpcastLinear(freq_dim, dim), nn.SiLU(), UpcastLinear(dim, dim))


def time_projection(dim: int) -> nn.Sequential:
    """SiLU, Linear: D → 6·D, in float32 or wider."""
    return nn.Sequential(nn.SiLU(), UpcastLinear(dim, 6 * dim))
