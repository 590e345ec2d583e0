"""How pixels become latents and tokens: the geometry of the Wan2.1 VAE, and of the weight-free codec after it.

latent frames    F = (T - 1) / 4 + 1, the first video frame alone, then four at a time; so T is 4k + 1
latent sides     H / 8, W / 8
a token          one frame of 2 × 2 latents by the default patch, 16 × 16 pixels
"""

from __future__ import annotations

LATENT_CHANNELS = 16
TIME_STRIDE = 4
SPACE_STRIDE = 8
TOKEN_PIXELS = 16
PIXEL_MULTIPLE = 32
"""Recipe: both sides of a picture are multiples of this many pixels."""


def latent_frames(frames: int) -> int:
    """Latent frames of a clip of 4k + 1 video frames; of others, those of as much of it as can be encoded."""
    return (frames - 1) // TIME_STRIDE + 1


def video_frames(latents: int) -> int:
    """Video frames that `latents` latent frames from the start of a clip stand for, at least one."""
    return TIME_STRIDE * (latents - 1) + 1


def whole_frames(frames: int) -> int:
    """The largest 4k + 1 that is not above `frames`, at least one."""
    return video_frames(latent_frames(frames))


def latent_sides(height: int, width: int) -> tuple[int, int]:
    """Latent height and width of a picture in pixels."""
    return height // SPACE_STRIDE, width // SPACE_STRIDE
