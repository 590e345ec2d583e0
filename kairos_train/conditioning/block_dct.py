"""A video codec without weights, in the geometry of the Wan2.1 VAE, for machines that have no VAE.

Definition (conditioning specification, "The weight-free pair"; the divisors are *ours*):

1. Time: the first frame alone, then the mean of every 4 frames.
2. Colour: RGB in [-1, 1] -> full-range BT.601 luma and chroma (JFIF), each in [-1, 1].
3. Space: orthonormal 8x8 DCT-II of each plane; coefficient (u, v) has vertical frequency u, horizontal v.
4. Channels: the 10 lowest luma coefficients in JPEG's zigzag order (0,0) (0,1) (1,0) (2,0) (1,1) (0,2) (0,3) (1,2)
   (2,1) (3,0), then the 3 lowest of Cb, then of Cr; each divided by its entry of DIVISORS.

Everything after step 1 is one linear map from 192 numbers to 16. Decoding is the inverse with the dropped coefficients
at zero, each latent frame after the first shown 4 times: pictures are soft, and motion within 4 frames is lost.

DIVISORS were chosen once, so that each channel has a standard deviation of 0.3 to 0.8 over robot, simulator and street
pictures together (before division: 4.3 for the luma mean, 0.67, 0.33, 0.21 for luma of order 1, 2, 3, 0.6 for the mean
of chroma, 0.1 for its order 1, but 0.3 in small synthetic pictures with sharp colours): flow matching mixes latents
with unit noise. They are part of the codec's identity and must never follow the data.

Shapes: B batch, T frames, F latent frames, H W pixels, h = H/8, w = W/8.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kairos_train.basics.geometry import LATENT_CHANNELS, SPACE_STRIDE, TIME_STRIDE
from kairos_train.conditioning.interfaces import latent_shape

BLOCK = SPACE_STRIDE
ZIGZAG = ((0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0))
COEFFICIENTS = (10, 3, 3)  # kept of luma, Cb, Cr
DIVISORS = (6.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.3, 0.3, 0.3, 0.3, 0.8, 0.2, 0.2, 0.8, 0.2, 0.2)
LUMA_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green, blue (BT.601)


class BlockDCT:
    """VideoEncoder without weights. Deterministic; nothing to load."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        forward, inverse = _matrices()
        self._forward = forward.to(device, torch.float32)
        self._inverse = inverse.to(device, torch.float32)
        # Pixels enter as 0..255; what 1 -> [-1, 1] subtracts is one constant per channel.
        self._offset = -127.5 * self._forward.sum(0)

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "block_dct", "version": 1, "divisors": list(DIVISORS)}

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """uint8 (B,T,H,W,3) -> float32 (B,16,F,h,w). Raises UserError as VideoEncoder.encode does."""
        latent_frames, rows, columns = latent_shape(frames)
        frames = frames.to(self._forward.device)
        batch = frames.shape[0]
        pixels = torch.empty((batch, latent_frames, *frames.shape[2:]), device=frames.device)  # B,F,H,W,3
        pixels[:, 0] = frames[:, 0]
        later = frames[:, 1:].unflatten(1, (latent_frames - 1, TIME_STRIDE))  # B,F-1,4,H,W,3
        # A sum of four bytes fits in 16 bits, and integers add several times faster than they convert.
        pixels[:, 1:] = later.sum(2, dtype=torch.int16)
        pixels[:, 1:] /= TIME_STRIDE
        blocks = pixels.reshape(batch * latent_frames, rows, BLOCK, columns, BLOCK * 3).transpose(2, 3)
        latents = torch.addmm(self._offset, blocks.reshape(-1, BLOCK * BLOCK * 3), self._forward)  # BFhw,16
        return latents.view(batch, latent_frames, rows, columns, LATENT_CHANNELS).permute(0, 4, 1, 2, 3).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B,16,F,h,w) -> uint8 (B,T,H,W,3), T = 4 (F - 1) + 1."""
        batch, channels, latent_frames, rows, columns = latents.shape
        if channels != LATENT_CHANNELS:
            raise ValueError(f"latents have {channels} channels, the codec {LATENT_CHANNELS}")
        flat = latents.to(self._inverse).permute(0, 2, 3, 4, 1).reshape(-1, LATENT_CHANNELS)
        blocks = (flat @ self._inverse).add_(127.5).round_().clamp_(0, 255).to(torch.uint8)  # BFhw,192
        pictures = blocks.view(batch * latent_frames, rows, columns, BLOCK, BLOCK * 3).transpose(2, 3)
        pictures = pictures.reshape(batch, latent_frames, rows * BLOCK, columns * BLOCK, 3)
        later = pictures[:, 1:].repeat_interleave(TIME_STRIDE, dim=1)
        return torch.cat([pictures[:, :1], later], dim=1)


def _matrices() -> tuple[Tensor, Tensor]:
    """float64 (192,16) from pixels 0..255 (row, column, colour) to channels, and (16,192) back."""
    positions = torch.arange(BLOCK, dtype=torch.float64)
    dct = torch.cos(math.pi * positions[:, None] * (positions + 0.5) / BLOCK) * math.sqrt(2 / BLOCK)  # frequency, pixel
    dct[0] /= math.sqrt(2)
    red, _, blue = luma = torch.tensor(LUMA_WEIGHTS, dtype=torch.float64)
    axis = torch.eye(3, dtype=torch.float64)
    # Blue (red) less luma spans twice (1 - weight) each way when RGB is in [-1, 1]: over that, chroma is in [-1, 1].
    colour = torch.stack([luma, (axis[2] - luma) / (2 - 2 * blue), (axis[0] - luma) / (2 - 2 * red)])
    back = torch.linalg.inv(colour)
    forward, inverse = [], []
    for plane, kept in enumerate(COEFFICIENTS):
        for u, v in ZIGZAG[:kept]:
            wave = dct[u][:, None] * dct[v][None, :]  # 8,8: orthonormal, so its own inverse transposed
            forward.append(wave[..., None] * colour[plane])
            inverse.append(wave[..., None] * back[:, plane])
    divisors = torch.tensor(DIVISORS, dtype=torch.float64)
    forward_matrix = torch.stack(forward).flatten(1) / divisors[:, None] / 127.5
    inverse_matrix = torch.stack(inverse).flatten(1) * divisors[:, None] * 127.5
    return forward_matrix.T.contiguous(), inverse_matrix.contiguous()
