"""Encoders from their configuration. The heavy libraries are imported only by the kinds that need them."""

from __future__ import annotations

import torch

from kairos_train.basics.errors import UserError
from kairos_train.conditioning.interfaces import Encoders, TextEncoder, VideoEncoder
from kairos_train.config.schema import EncodersConfig, TextEncoderConfig, VideoEncoderConfig


def build_encoders(config: EncodersConfig, device: str | torch.device = "cpu") -> Encoders:
    """The frozen pair that `config` names; real weights are read from local paths only.

    Raises:
        UserError: unknown kind, or weights that are missing, unreadable or of another model.
    """
    return Encoders(video=_video(config.video, device), text=_text(config.text, device))


def _video(config: VideoEncoderConfig, device: str | torch.device) -> VideoEncoder:
    if config.kind == "block_dct":
        from kairos_train.conditioning.block_dct import BlockDCT

        return BlockDCT(device)
    if config.kind == "tiny_vae":
        from kairos_train.conditioning.tiny_vae import TinyVAE

        return TinyVAE(config.path, device)
    if config.kind == "wan":
        from kairos_train.conditioning.wan_vae import WanVAE

        return WanVAE(config.path, sample_posterior=config.sample_posterior, device=device)
    raise UserError(f"encoders.video.kind: {config.kind!r} is not a video encoder; choose wan, tiny_vae or block_dct")


def _text(config: TextEncoderConfig, device: str | torch.device) -> TextEncoder:
    if config.kind == "hashed_ngrams":
        from kairos_train.conditioning.hashed_ngrams import HashedNgrams

        return HashedNgrams(config.text_dim, config.max_tokens, device)
    if config.kind == "qwen":
        from kairos_train.conditioning.qwen_vlm import QwenVLM

        return QwenVLM(
            config.path,
            text_dim=config.text_dim,
            max_tokens=config.max_tokens,
            image=config.image,
            system_message=config.system_message,
            device=device,
        )
    raise UserError(f"encoders.text.kind: {config.kind!r} is not a text encoder; choose qwen or hashed_ngrams")
