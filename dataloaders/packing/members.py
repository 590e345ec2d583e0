"""One clip -> the members of its sample in a shard.

mp4                             H.264, a key frame every 8 frames
json                            text, captions, scores, frames, height, width, and what the source says
action.npy, state.npy           with a robot: float32 (A, da), (1, ds)
latents.npy                     encoded: float16 (16, F, h, w)
context.npy                     encoded: float16 (N, C), the primary caption with the first frame
context_text.npy                the same caption alone; absent where the text encoder looks at no pictures
context_VARIANT.npy, context_VARIANT_text.npy    the same of the other caption variants
"""

from __future__ import annotations

import io
import json
from typing import Any, Protocol

import numpy as np

from dataloaders.files.video_encoder import encode_mp4
from dataloaders.sources.base import Clip
from kairos_train.basics.errors import UserError

CLIP_GOP = 8  # best balance of size and seeking for training clips
_TEXTS_KEPT = 256  # contexts of captions alone that are kept: the windows of an episode share theirs


class MemberEncoder(Protocol):
    """The frozen encoders, as packing calls them: one sample at a time, numpy in and out."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the output: JSON values."""

    @property
    def sees_pictures(self) -> bool:
        """Whether a context depends on the first frame."""

    def latents(self, frames: np.ndarray) -> np.ndarray:
        """uint8 (T, H, W, 3) -> float (16, F, h, w)."""

    def context(self, text: str, picture: np.ndarray | None) -> np.ndarray:
        """A prompt, and the first frame uint8 (H, W, 3) or None -> float (N, C)."""


class MemberWriter:
    """Makes the members of clips; with an encoder, the encoded ones too."""

    def __init__(self, encoder: MemberEncoder | None) -> None:
        self._encoder = encoder
        self._texts: dict[str, bytes] = {}

    def members(self, clip: Clip) -> dict[str, bytes]:
        """Member by extension.

        Raises:
            UserError: an encoding that float16 cannot hold.
        """
        file = io.BytesIO()
        encode_mp4(file, clip.frames, clip.fps, codec="h264", gop=CLIP_GOP)
        out = {"mp4": file.getvalue(), "json": json.dumps(_meta(clip), sort_keys=True).encode()}
        if clip.actions is not None:
            out |= {"action.npy": npy(clip.actions), "state.npy": npy(clip.state)}
        if self._encoder is not None:
            out["latents.npy"] = npy(half("latents", self._encoder.latents(clip.frames)))
            out |= self._contexts(clip)
        return out

    def _contexts(self, clip: Clip) -> dict[str, bytes]:
        out = {}
        for number, (variant, text) in enumerate(clip.captions.items() or [("", "")]):
            stem = f"context_{variant}" if number else "context"
            if self._encoder.sees_pictures:
                out[f"{stem}.npy"] = npy(half("context", self._encoder.context(text, clip.frames[0])))
                stem += "_text"
            out[f"{stem}.npy"] = self._text_alone(text)
        return out

    def _text_alone(self, text: str) -> bytes:
        if text not in self._texts:
            while len(self._texts) >= _TEXTS_KEPT:
                self._texts.pop(next(iter(self._texts)))
            self._texts[text] = npy(half("context", self._encoder.context(text, None)))
        return self._texts[text]


def npy(value: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(value), allow_pickle=False)
    return file.getvalue()


def half(name: str, value: Any) -> np.ndarray:
    """float16; UserError when it cannot hold the values."""
    out = np.asarray(value).astype(np.float16)
    if not np.isfinite(out).all():
        raise UserError(f"{name}: the encoder gave values that float16 cannot hold (up to {np.abs(value).max()})")
    return out


def _meta(clip: Clip) -> dict[str, Any]:
    frames, height, width = clip.frames.shape[:3]
    primary = next(iter(clip.captions), None)
    return {
        "fps": float(clip.fps),  # of raw frames where the source says so
        **clip.meta,
        "text": clip.captions.get(primary, ""),
        "captions": clip.captions,
        "primary_caption": primary,
        "scores": clip.scores,
        "frames": frames,
        "height": height,
        "width": width,
    }
