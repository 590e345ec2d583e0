"""A model configuration in numbers: parameters per stream, keys, FLOPs. Allocates nothing (meta device)."""

from typing import Any

import torch

from kairos_train.basics.errors import UserError
from kairos_train.config.schema import Config, ModelConfig
from kairos_train.model.flops import forward_flops
from kairos_train.model.public_keys import Shapes, public_keys
from kairos_train.model.world_action import WorldActionModel


def meta_model(config: ModelConfig) -> WorldActionModel:
    """The model on the meta device: names, shapes and dtypes without memory."""
    with torch.device("meta"):
        return WorldActionModel(config)


def parameter_counts(model: torch.nn.Module) -> dict[str, int]:
    """Parameters per stream, "video_dit" and "action_dit"."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        stream = name.partition(".")[0]
        counts[stream] = counts.get(stream, 0) + parameter.numel()
    return counts


def check_keys(model: torch.nn.Module, expected: Shapes) -> int:
    """Compare a model's names and shapes with a table of them; returns the number of keys.

    Raises:
        UserError: the first key that is missing, surplus or of another shape.
    """
    given = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    for key in sorted(expected.keys() | given.keys()):
        if expected.get(key) != given.get(key):
            raise UserError(f"checkpoint key {key}: shape {given.get(key)} in the model, expected {expected.get(key)}")
    return len(given)


def numbers(config: Config) -> dict[str, Any]:
    """The sizes of `config.model`, every key checked against the public checkpoint layout.

    Returns:
        "model", its "layers" and "layer_cycle", "parameters" by stream, checkpoint "keys", and "video_forward_tflop":
        per sample, by the shape of its latents.

    Raises:
        UserError: a key that is missing, surplus or of another shape.
    """
    model, video = meta_model(config.model), config.model.video
    flops = {}
    for frames, height, width in ((3, 16, 16), (21, 60, 104)):
        tokens = height // video.patch_size[1] * width // video.patch_size[2]
        flops[f"{frames}×{height}×{width}"] = forward_flops(config.model, frames, tokens, 128) / 1e12
    return {
        "model": config.model.name,
        "layers": config.model.num_layers,
        "layer_cycle": video.layer_cycle,
        "parameters": parameter_counts(model),
        "keys": check_keys(model, public_keys(config.model)),
        "video_forward_tflop": flops,
    }


def table(found: dict[str, Any]) -> str:
    """What `numbers` gives, for people."""
    counts = {**found["parameters"], "total": sum(found["parameters"].values())}
    lines = [f"model {found['model']}: {found['layers']} layers of {'/'.join(found['layer_cycle'])}"]
    lines += [f"  {stream:<11} {count / 1e9:8.3f} B parameters ({count:,})" for stream, count in counts.items()]
    lines.append(f"  {found['keys']:,} checkpoint keys, names and shapes as in the public layout")
    for shape, tflop in found["video_forward_tflop"].items():
        lines.append(f"  video forward, {shape} latents: {tflop:.4g} TFLOP per sample")
    return "\n".join(lines)
