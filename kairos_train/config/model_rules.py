"""The rules of `kairos_train.config.validate` on the model's own sizes, and on those it shares with the encoders."""

from __future__ import annotations

import math

from kairos_train.basics.errors import UserError
from kairos_train.basics.geometry import LATENT_CHANNELS, PIXEL_MULTIPLE, SPACE_STRIDE
from kairos_train.config.schema import ATTENTION_KINDS, Config


def layers_are_whole_cycles(config: Config) -> None:
    layers, cycle = config.model.num_layers, config.model.video.layer_cycle
    if not cycle:
        raise UserError(f"model.video.layer_cycle=[] is empty; list kinds out of {', '.join(ATTENTION_KINDS)}")
    if layers % len(cycle):
        below = max(layers // len(cycle), 1) * len(cycle)
        raise UserError(
            f"model.num_layers={layers} is no multiple of the {len(cycle)} layers of model.video.layer_cycle; "
            f"use {below} or {below + len(cycle)}"
        )


def layer_kinds_are_known(config: Config) -> None:
    for kind in config.model.video.layer_cycle:
        if kind not in ATTENTION_KINDS:
            raise UserError(f"model.video.layer_cycle holds {kind!r}; use {', '.join(ATTENTION_KINDS)}")


def heads_divide_the_width(config: Config) -> None:
    dim, heads = config.model.video.dim, config.model.num_heads
    if dim % heads:
        raise UserError(
            f"heads not divisible: model.video.dim={dim} is no multiple of model.num_heads={heads}; "
            f"use model.video.dim={math.ceil(dim / heads) * heads} or other heads"
        )


def rotary_splits_the_head(config: Config) -> None:
    """Half of a head is shared out to frames (half - 2·(half // 3)), height and width (half // 3 each)."""
    head = config.model.video.dim // config.model.num_heads
    if head % 2 or head // 2 // 3 < 1:
        raise UserError(
            f"model.video.dim={config.model.video.dim} over model.num_heads={config.model.num_heads} gives heads of "
            f"{head} channels; the rotary embedding needs an even number of at least 6"
        )


def timestep_embedding_is_even(config: Config) -> None:
    if config.model.freq_dim % 2:
        raise UserError(f"model.freq_dim={config.model.freq_dim} is odd; half of it is cosines: use an even number")


def latents_fit_the_encoders(config: Config) -> None:
    channels = config.model.video.latent_channels
    if channels != LATENT_CHANNELS:
        raise UserError(f"model.video.latent_channels={channels}; the video encoders give {LATENT_CHANNELS}: use that")


def patches_tile_the_latents(config: Config) -> None:
    patch = config.model.video.patch_size
    sides = PIXEL_MULTIPLE // SPACE_STRIDE
    if len(patch) != 3 or patch[0] != 1 or any(p < 1 or sides % p for p in patch[1:]):
        raise UserError(
            f"model.video.patch_size={patch} does not tile the latents; use [1, 2, 2] (frames, height, width)"
        )


def token_windows_have_no_history_rule(config: Config) -> None:
    video = config.model.video
    for name in ("restrict_history_query_to_history", "all_attend_history"):
        if video.window_semantics == "token" and getattr(video, name):
            raise UserError(
                f"model.video.{name}=true with model.video.window_semantics=token; token windows know no history: "
                "set it to false or use window_semantics=frame"
            )


def causal_history_is_restricted(config: Config) -> None:
    video = config.model.video
    if not video.history_causal:
        return
    wanted = {"window_semantics": "frame", "restrict_history_query_to_history": True, "all_attend_history": False}
    for name, value in wanted.items():
        if getattr(video, name) != value:
            found, use = (str(v).lower() for v in (getattr(video, name), value))
            raise UserError(
                f"model.video.history_causal=true with model.video.{name}={found}: what a history frame keeps must not "
                f"depend on later frames; use model.video.{name}={use} or model.video.history_causal=false"
            )


def text_widths_agree(config: Config) -> None:
    model, encoder = config.model.text_dim, config.encoders.text.text_dim
    if model != encoder:
        raise UserError(
            f"encoders.text.text_dim={encoder} but model.text_dim={model}; "
            "choose encoders=... and model=... of one width (weight_free takes any)"
        )
