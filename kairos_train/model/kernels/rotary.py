"""Rotary position embedding on adjacent channel pairs (2i, 2i+1), angles in float64.

Video: of a head's half = E/2 pairs, half − 2·(half // 3) rotate by frame, half // 3 by height, half // 3 by width, in
that order. Action: one axis. Pair i of an axis with n pairs rotates by position · 10000^(−i/n).
"""

import torch
from torch import Tensor

BASE = 10000.0


def _axis_angles(positions: Tensor, pairs: int) -> Tensor:
    """(P,) float64 positions → (P, pairs) angles."""
    return positions[:, None] * BASE ** (-torch.arange(pairs, dtype=torch.float64, device=positions.device) / pairs)


def sequence_angles(length: int, head_dim: int, device: torch.device) -> Tensor:
    """Angles of action tokens, float64 (A, E/2)."""
    return _axis_angles(torch.arange(length, dtype=torch.float64, device=device), head_dim // 2)


def grid_angles(frames: Tensor, height: int, width: int, head_dim: int) -> Tensor:
    """Angles of video tokens in raster order, float64 (F, L, E/2).

    Args:
        frames: global numbers of the local frames, (F,).
        height: h, patches per column.
        width: w, patches per row.
    """
    half = head_dim // 2
    side = half // 3
    device = frames.device
    f = _axis_angles(frames.double(), half - 2 * side)
    h = _axis_angles(torch.arange(height, dtype=torch.float64, device=device), side)
    w = _axis_angles(torch.arange(width, dtype=torch.float64, device=device), side)
    shape = (len(f), height, width)
    parts = [
        f[:, None, None].expand(*shape, -1),
        h[None, :, None].expand(*shape, -1),
        w[None, None, :].expand(*shape, -1),
    ]
    return torch.cat(parts, dim=-1).flatten(1, 2)


def rotation(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) of angles in `dtype`, with a heads axis: (..., 1, E/2)."""
    return angles.cos().to(dtype).unsqueeze(-2), angles.sin().to(dtype).unsqueeze(-2)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the channel pairs of x (..., H, E), which is float32 or wider, by `rotation` (broadcast over H)."""
    cos, sin = rotation
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
