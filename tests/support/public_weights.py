"""Public weights as others publish them: reference vectors' weights in a file of their own, and small random ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.tiny_export import random_weights, tiny_config
from torch import Tensor

from kairos_train.config.schema import Config

GOLDEN = (
    *("action_with_video_cache", "joint_all_attend_history", "joint_frame_window", "joint_two_cycles_history3"),
    *("video_frame_window", "video_token_window", "video_token_window_divides"),
)

SIZES = (
    *("model.video.dim=32", "model.num_heads=2", "model.video.ffn_dim=48"),
    *("model.num_layers=4", "model.text_dim=24", "model.freq_dim=16", "model.video.dilation=2"),
    *("model.video.gdn_key_dim=8", "model.video.gdn_value_dim=16"),
    *("model.action.dim=16", "model.action.ffn_dim=32", "model.action.action_dim=3", "model.action.state_dim=2"),
)
"""The command line that describes the tiny model in words."""

SETTINGS = (
    "model.video.layer_cycle=[SWA,SWA,DSWA,GATED]",
    *("model.video.window_frames=3", "model.video.dilation=2", "model.video.window_semantics=frame"),
    *("model.video.restrict_history_query_to_history=true", "model.video.all_attend_history=false", "model.eps=1e-6"),
)
"""What leaves no trace in weights, as words of a command line."""


HEADER = {
    "config": json.dumps(
        {
            "layers": ["SWA", "SWA", "DSWA", "GATED"],
            **{"window_frames": 3, "dilation": 2, "window_semantics": "frame", "eps": 1e-6},
            "restrict_history_query_to_history": True,
        }
    )
}
"""The same in a file's header."""


def golden_weights(shared: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of a reference file, and its header's text."""
    with safe_open(shared / "golden" / f"{name}.safetensors", "pt") as file:
        keys = [key for key in file.keys() if key.startswith("weights.")]  # noqa: SIM118, not a dict
        return {key.removeprefix("weights."): file.get_tensor(key) for key in keys}, file.metadata()


def tiny_weights(*, actions: bool = True, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Random weights of the tiny model under its public keys."""
    weights = random_weights(tiny_config(actions=actions))
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def save(folder: Path, weights: dict[str, Tensor], *, prefix: str = "", metadata: dict[str, str] | None = None) -> Path:
    """One file, `prefix` in front of every key."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "weights.safetensors"
    save_file({prefix + name: tensor for name, tensor in weights.items()}, file, metadata=metadata)
    return file


def save_sharded(folder: Path, weights: dict[str, Tensor], parts: int = 3) -> Path:
    """Several files and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        own = {name: weights[name] for name in sorted(weights)[part::parts]}
        save_file(own, folder / file)
        weight_map |= dict.fromkeys(own, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def same_bytes(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are the same, bit for bit."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(bits(one[key]), bits(other[key])) for key in one
    )


def describe(folder: Path, config: Config) -> None:
    """A config.json beside weights, as a public export has it."""
    (folder / "config.json").write_text(json.dumps({"run": {"model": dataclasses.asdict(config.model)}}))
