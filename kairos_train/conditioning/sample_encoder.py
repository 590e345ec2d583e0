"""The frozen encoders as packing calls them: one sample at a time, numpy in and out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kairos_train.conditioning.build import build_encoders
from kairos_train.conditioning.interfaces import Encoders
from kairos_train.config.schema import EncodersConfig


class SampleEncoder:
    """Latents and contexts of single samples.

    Attributes:
        identity: of both encoders.
        sees_pictures: whether a context depends on the first frame.
    """

    def __init__(self, encoders: Encoders) -> None:
        self._encoders = encoders
        self.identity: dict[str, Any] = encoders.identity
        self.sees_pictures = bool(encoders.text.identity.get("image", False))

    def latents(self, frames: np.ndarray) -> np.ndarray:
        """uint8 (T, H, W, 3) -> float32 (16, F, H/8, W/8)."""
        return self._encoders.video.encode(torch.from_numpy(frames)[None])[0].cpu().numpy()

    def context(self, text: str, picture: np.ndarray | None) -> np.ndarray:
        """A prompt, and the first frame uint8 (H, W, 3) or None -> float32 (N, C)."""
        image = None if picture is None else torch.from_numpy(np.ascontiguousarray(picture))[None]
        context, mask = self._encoders.text.encode([text], image)
        return context[0][mask[0]].cpu().numpy()


def load_sample_encoder(config: EncodersConfig, device: str, worker: int = 0) -> SampleEncoder:
    """The encoders of process `worker`: on "cuda", processes take the GPUs in turn."""
    if device == "cuda":
        device = f"cuda:{worker % torch.cuda.device_count()}"
    return SampleEncoder(build_encoders(config, device))
