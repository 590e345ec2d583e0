"""A model's configuration in the words of the public inference code (github.com/kairos-agi/kairos-sensenova).

`dit_config` holds the arguments that it constructs the network of these weights with.
"""

from __future__ import annotations

from typing import Any

from kairos_train.config.schema import ModelConfig
from kairos_train.model.streams import layer_kinds

GATED_SIZES = (256, 512, 4)
"""Key width, value width and convolution of a GATED head, which are fixed there."""

WINDOW = 3
"""Frames of a window; fixed in the token reading."""


def public_config(model: ModelConfig) -> tuple[dict[str, Any] | None, str]:
    """`dit_config` of a model, and why there is none where the public code has no such network."""
    video = model.video
    if "GATED" in layer_kinds(model) and (video.gdn_key_dim, video.gdn_value_dim, video.gdn_conv_size) != GATED_SIZES:
        found = f"{video.gdn_key_dim}/{video.gdn_value_dim} with convolutions of {video.gdn_conv_size}"
        return None, f"its GATED heads are {found}; the public code has 256/512 with convolutions of 4"
    if video.history_causal:
        return None, "its history frames see earlier ones only; the public code has no such rule"
    if video.window_semantics == "token":
        return _token_windows(model)
    if model.action is None:
        return _stream(model), ""
    return {"dit_type": "Simple_Multi_DIT_Wrapper", "video_dit": _stream(model), "action_dit": _action(model)}, ""


def _common(model: ModelConfig, *, dim: int, ffn_dim: int) -> dict[str, Any]:
    return {
        "has_image_input": False,
        "patch_size": list(model.video.patch_size),
        "dim": dim,
        "ffn_dim": ffn_dim,
        "freq_dim": model.freq_dim,
        "text_dim": model.text_dim,
        "num_heads": model.num_heads,
        "num_layers": model.num_layers,
        "eps": model.eps,
        "require_clip_embedding": False,
        "require_vae_embedding": False,
    }


def _stream(model: ModelConfig) -> dict[str, Any]:
    video = model.video
    return {
        "dit_type": "KairosDiTV2",
        **_common(model, dim=video.dim, ffn_dim=video.ffn_dim),
        "in_dim": video.latent_channels,
        "out_dim": video.latent_channels,
        "layers_settings": layer_kinds(model),
        "window_size": video.window_frames,
        "dilated_lengths": [video.dilation],
        "restrict_history_query_to_history": video.restrict_history_query_to_history,
        "all_atten_history": video.all_attend_history,
        "seperated_timestep": True,
        "fuse_vae_embedding_in_latents": True,
        "attn_method": "flex",
    }


def _action(model: ModelConfig) -> dict[str, Any]:
    action = model.action
    return {
        "dit_type": "KairosDiTV2",
        **_common(model, dim=action.dim, ffn_dim=action.ffn_dim),
        "attn_hidden_dim": model.video.dim,
        "in_dim": action.action_dim,
        "out_dim": action.action_dim,
        "layers_settings": ["FA"] * model.num_layers,
        "action_head_cfg": {"action_state_dim": action.state_dim, "action_dim": action.action_dim},
        "dilated_lengths": [model.video.dilation],
        "seperated_timestep": False,
        "fuse_vae_embedding_in_latents": False,
        "attn_method": "flex",
    }


def _token_windows(model: ModelConfig) -> tuple[dict[str, Any] | None, str]:
    """The older network, whose fourth layers are GATED and whose windows are three frames' tokens."""
    video = model.video
    if (
        model.action is not None
        or video.layer_cycle != ["SWA", "SWA", "DSWA", "GATED"]
        or video.window_frames != WINDOW
    ):
        return None, "the public code reads windows in tokens for the video alone, in layers SWA/SWA/DSWA/GATED of 3"
    return {
        "dit_type": "KairosDiT",
        **_common(model, dim=video.dim, ffn_dim=video.ffn_dim),
        "in_dim": video.latent_channels,
        "out_dim": video.latent_channels,
        "dilated_lengths": [1, 1, video.dilation, 1],
        "seperated_timestep": True,
        "fuse_vae_embedding_in_latents": True,
    }, ""
