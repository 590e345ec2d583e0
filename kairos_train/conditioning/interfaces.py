"""What training and inference ask of a frozen encoder, and how two encoders are told apart.

An encoder is frozen: the same input gives the same output for as long as its `identity` is the same. A checkpoint and a
set of shards record the identities they were made with; `identities_match` refuses any other.

Shapes: B batch, T frames, F = (T - 1) / 4 + 1 latent frames, H W height and width, N context tokens, C text_dim.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kairos_train.basics.errors import UserError
from kairos_train.basics.geometry import SPACE_STRIDE, TIME_STRIDE, latent_frames, latent_sides


@runtime_checkable
class VideoEncoder(Protocol):
    """Frames to latents and back, in the geometry of the Wan2.1 VAE (model specification, Inputs)."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the output: kind, parameters, hash of the weights. Plain JSON values, no paths."""

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 RGB (B,T,H,W,3) -> float32 (B,16,F,H/8,W/8), roughly zero mean and unit spread.

        Raises:
            UserError: T is not 4k + 1, or H or W is not a multiple of 8.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """float32 (B,16,F,H/8,W/8) -> uint8 RGB (B,T,H,W,3), T = 4 (F - 1) + 1."""


@runtime_checkable
class TextEncoder(Protocol):
    """Prompts, and the first frame where the encoder looks at it, to context tokens."""

    text_dim: int

    @property
    def identity(self) -> dict[str, Any]:
        """As for VideoEncoder; `image` says whether pictures change the output."""

    def encode(self, prompts: list[str], images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Prompts and uint8 RGB (B,H,W,3) -> context float32 (B,N,C), mask bool (B,N), both right-padded.

        Every row of the mask has at least one true token. Padding is zero. A negative prompt is encoded with
        `images=None`.
        """


@dataclass(frozen=True)
class Encoders:
    """The pair a run is conditioned with."""

    video: VideoEncoder
    text: TextEncoder

    @property
    def identity(self) -> dict[str, dict[str, Any]]:
        """What checkpoints and shards record."""
        return {"video": self.video.identity, "text": self.text.identity}


def identities_match(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse encoders that are not the ones something was made with.

    Args:
        saved: `Encoders.identity` as recorded in a checkpoint or beside shards (also after a round trip through JSON).
        current: `Encoders.identity` of this run.

    Raises:
        UserError: they differ; names the first differing field, hashes last, and both values.
    """
    before, now = dict(_leaves(saved)), dict(_leaves(current))
    # `kind` first: once the kinds differ every other difference is noise. Hashes last: a setting says more.
    for key in sorted(before.keys() | now.keys(), key=lambda k: (not k.endswith(".kind"), k.endswith("_sha256"), k)):
        old, new = before.get(key, "nothing"), now.get(key, "nothing")
        if old != new:
            raise UserError(
                f"encoders.{key}: made with {old!r}, this run has {new!r}; latents and context mean something else "
                "under other encoders: use the encoders of the checkpoint or shards, or encode and train again"
            )


def latent_shape(frames: Tensor) -> tuple[int, int, int]:
    """(F, H/8, W/8) of uint8 frames (B,T,H,W,3).

    Raises:
        UserError: T is not 4k + 1, or H or W is not a multiple of 8.
    """
    if frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise TypeError(f"frames must be uint8 (B,T,H,W,3), got {frames.dtype} {tuple(frames.shape)}")
    count, height, width = frames.shape[1:4]
    if count % TIME_STRIDE != 1:
        raise UserError(f"frames: {count} video frames cannot be encoded; the number must be 4k + 1, like 1, 5 or 9")
    for name, size in (("height", height), ("width", width)):
        if size < SPACE_STRIDE or size % SPACE_STRIDE:
            raise UserError(f"{name}: {size} pixels cannot be encoded; it must be a multiple of {SPACE_STRIDE}; resize")
    return latent_frames(count), *latent_sides(height, width)


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of tensors by name, dtype, shape and content: the same whichever file format they were read from."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def config_sha256(config: Mapping[str, Any]) -> str:
    """Hash of a configuration of JSON values, without the entries, at any depth, of which library wrote it and how."""
    return hashlib.sha256(json.dumps(_without_bookkeeping(config), sort_keys=True).encode()).hexdigest()


def _without_bookkeeping(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    dropped = ("transformers_version", "dtype", "torch_dtype", "architectures")
    return {k: _without_bookkeeping(v) for k, v in value.items() if not k.startswith("_") and k not in dropped}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf; tuples become lists, as they do in JSON."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
