"""A model configuration in numbers: parameters per stream, keys, FLOPs. Allocates nothing (meta device)."""

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


def summarize(config: Config) -> str:
    """A table of sizes of `config.model`, every key checked against the public checkpoint layout."""
    model = meta_model(config.model)
    counts = parameter_counts(model)
    lines = [
        f"model {config.model.name}: {config.model.num_layers} layers of {'/'.join(config.model.video.layer_cycle)}"
    ]
    for stream, count in counts.items():
        lines.append(f"  {stream:<11} {count / 1e9:8.3f} B parameters ({count:,})")
    lines.append(f"  {'total':<11} {sum(counts.values()) / 1e9:8.3f} B parameters")
    keys = check_keys(model, public_keys(config.model))
    lines.append(f"  {keys:,} checkpoint keys, names and shapes as in the public layout")
    video = config.model.video
    for frames, height, width in ((3, 16, 16), (21, 60, 104)):
        flops = forward_flops(config.model, frames, height // video.patch_size[1] * width // video.patch_size[2], 128)
        lines.append(f"  video forward, {frames}×{height}×{width} latents: {flops / 1e12:.4g} TFLOP per sample")
    return "\n".join(lines)
