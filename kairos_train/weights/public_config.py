"""A model's configuration in the words of the public inference code (github.com/kairos-agi/kairos-sensenova).

`dit_config` holds the arguments that it constructs the network of these weights with. That network is always the
wrapper of one or two `KairosDiTV2`: what runs them looks for `video_dit`, and takes every order of layers, window and
dilation. `attn_method` says how windows are counted: "flash" in tokens, "flex" in frames with the history rules. (The
older `KairosDiT` has the same keys; its attention is not the one of the weights in every version of the public code.)
"""

from __future__ import annotations

from typing import Any

from kairos_train.config.schema import ModelConfig
from kairos_train.model.streams import layer_kinds

GATED_SIZES = (256, 512, 4)
"""Key width, value width and convolution of a GATED head, which are fixed there."""

PATCH = [1, 2, 2]
"""Frames, height and width of a patch, by which it counts the tokens of a frame."""

OFF = (
    *("has_image_input", "require_clip_embedding", "require_vae_embedding", "use_first_frame_cond", "use_seq_parallel"),
    *("use_tp_in_getaeddeltanet", "use_tp_in_self_attn", "attend_k0"),
)
"""Switches that are off in every network that is written here; parallel inference is switched on by hand."""


def public_config(model: ModelConfig) -> tuple[dict[str, Any] | None, str]:
    """`dit_config` of a model, and why there is none where the public code has no such network."""
    video = model.video
    if "GATED" in layer_kinds(model) and (video.gdn_key_dim, video.gdn_value_dim, video.gdn_conv_size) != GATED_SIZES:
        found = f"{video.gdn_key_dim}/{video.gdn_value_dim} with convolutions of {video.gdn_conv_size}"
        return None, f"its GATED heads are {found}; the public code has 256/512 with convolutions of 4"
    if video.history_causal:
        return None, "its history frames see earlier ones only; the public code has no such rule"
    if list(video.patch_size) != PATCH:
        return None, f"its patches are {list(video.patch_size)}; the public code counts the tokens of {PATCH}"
    if video.window_semantics == "token" and model.action is not None:
        return None, "its windows are counted in tokens; the public code does so for the video alone"
    streams = {"video_dit": _video(model)} | ({} if model.action is None else {"action_dit": _action(model)})
    return {"dit_type": "Simple_Multi_DIT_Wrapper", **streams}, ""


def _common(model: ModelConfig, *, dim: int, ffn_dim: int, channels: int) -> dict[str, Any]:
    return {
        "dit_type": "KairosDiTV2",
        "patch_size": list(model.video.patch_size),
        "in_dim": channels,
        "out_dim": channels,
        "dim": dim,
        "ffn_dim": ffn_dim,
        "freq_dim": model.freq_dim,
        "text_dim": model.text_dim,
        "num_heads": model.num_heads,
        "num_layers": model.num_layers,
        "eps": model.eps,
        "dilated_lengths": [model.video.dilation],
        "attn_method": "flash" if model.video.window_semantics == "token" else "flex",
        **dict.fromkeys(OFF, False),
    }


def _video(model: ModelConfig) -> dict[str, Any]:
    video = model.video
    return {
        **_common(model, dim=video.dim, ffn_dim=video.ffn_dim, channels=video.latent_channels),
        "layers_settings": layer_kinds(model),
        "window_size": video.window_frames,
        "restrict_history_query_to_history": video.restrict_history_query_to_history,
        "all_atten_history": video.all_attend_history,
        "seperated_timestep": True,
        "fuse_vae_embedding_in_latents": True,
    }


def _action(model: ModelConfig) -> dict[str, Any]:
    action = model.action
    return {
        **_common(model, dim=action.dim, ffn_dim=action.ffn_dim, channels=action.action_dim),
        "attn_hidden_dim": model.video.dim,
        "layers_settings": ["FA"] * model.num_layers,
        "action_head_cfg": {"action_state_dim": action.state_dim, "action_dim": action.action_dim},
        "seperated_timestep": False,
        "fuse_vae_embedding_in_latents": False,
    }
