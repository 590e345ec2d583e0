"""What the public inference code needs of an export, as data: written down from its own configurations and signatures.

`RELEASES` are the networks of the four published families under the arguments of `KairosDiTV2`; where a configuration
leaves an argument out, its default stands here. `V2_ARGUMENTS` are all the arguments that this network takes, and
`PIPELINE_ARGUMENTS` those of the pipelines' `from_pretrained`: one more is a TypeError there.
"""

from __future__ import annotations

CYCLE = ["SWA", "SWA", "DSWA", "GATED"]

VIDEO = {
    "dit_type": "KairosDiTV2",
    "patch_size": [1, 2, 2],
    "in_dim": 16,
    "out_dim": 16,
    "dim": 2560,
    "ffn_dim": 10240,
    "freq_dim": 256,
    "num_heads": 20,
    "num_layers": 32,
    "eps": 1e-6,
    "layers_settings": CYCLE * 8,
    "window_size": 3,
    "dilated_lengths": [4],
    "all_atten_history": False,
    "seperated_timestep": True,
    "fuse_vae_embedding_in_latents": True,
    "has_image_input": False,
    "require_clip_embedding": False,
    "require_vae_embedding": False,
    "use_first_frame_cond": False,
    "use_seq_parallel": False,
    "use_tp_in_getaeddeltanet": False,
    "use_tp_in_self_attn": False,
    "attend_k0": False,
}
ACTION = {
    "dit_type": "KairosDiTV2",
    "patch_size": [1, 2, 2],
    "attn_hidden_dim": 2560,
    "dim": 1024,
    "ffn_dim": 4096,
    "freq_dim": 256,
    "num_heads": 20,
    "num_layers": 32,
    "eps": 1e-6,
    "layers_settings": ["FA"] * 32,
    "dilated_lengths": [4],
    "attn_method": "flex",
    "seperated_timestep": False,
    "fuse_vae_embedding_in_latents": False,
    **{name: False for name in VIDEO if name.startswith(("has_", "require_", "use_", "attend_"))},
}
TOKENS = {"attn_method": "flash", "restrict_history_query_to_history": False}
FRAMES = {"attn_method": "flex", "restrict_history_query_to_history": True}


def head(state: int, action: int) -> dict:
    """The sizes of a robot; the channels are not read beside them."""
    return {"in_dim": action, "out_dim": action, "action_head_cfg": {"action_state_dim": state, "action_dim": action}}


def wrapper(video: dict, action: dict | None = None) -> dict:
    streams = {"video_dit": video} | ({} if action is None else {"action_dit": action})
    return {"dit_type": "Simple_Multi_DIT_Wrapper", **streams}


RELEASES = {
    "kairos_4b_video": wrapper({**VIDEO, **TOKENS, "text_dim": 3584}),
    "kairos_4b_robot_480p": wrapper({**VIDEO, **TOKENS, "text_dim": 2048}),
    "kairos_4b": wrapper({**VIDEO, **FRAMES, "text_dim": 2048}, {**ACTION, **head(14, 14), "text_dim": 2048}),
    "kairos_4b_libero": wrapper({**VIDEO, **FRAMES, "text_dim": 3584}, {**ACTION, **head(8, 7), "text_dim": 3584}),
}
"""Named model -> `dit_config`: 3.0 video, 3.1 robot-480P, RoboTwin, LIBERO-Plus."""

ENCODERS = {2048: "Qwen3_5_TextEncoder", 3584: "QwenVLTextEncoder"}

V2_ARGUMENTS = {
    *("dim", "in_dim", "ffn_dim", "out_dim", "text_dim", "freq_dim", "eps", "patch_size", "num_heads", "num_layers"),
    *("attn_hidden_dim", "layers_settings", "has_image_input", "has_image_pos_emb", "has_ref_conv"),
    *("add_control_adapter", "in_dim_control_adapter", "window_size", "seperated_timestep", "require_vae_embedding"),
    *("require_clip_embedding", "fuse_vae_embedding_in_latents", "dilated_lengths", "gated_delta_chunk_size"),
    *("flex_block_size", "attn_method", "all_atten_history", "restrict_history_query_to_history", "action_head_cfg"),
    *("double_patch_embeding_cfg", "use_first_frame_cond", "use_seq_parallel", "use_tp_in_getaeddeltanet"),
    *("use_tp_in_self_attn", "attend_k0", "attend_k0_with_module", "tp_chunk_list"),
}
WRAPPER_ARGUMENTS = {"dit_type", "pretrained_path"}
"""What the wrapper takes out of a stream's configuration before the network sees it."""

PIPELINE_ARGUMENTS = {"vae_path", "text_encoder_config", "vram_management_enabled", "load_dit_fn", "dit_config"}
"""Of `KairosEmbodiedWAMPipeline`, with the two that the API takes out before."""
