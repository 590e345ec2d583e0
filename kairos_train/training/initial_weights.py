"""Where a stage's weights come from: fresh, or another checkpoint's, the action stream interpolated if it has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.checkpoint.resolve import resolve_checkpoint
from kairos_train.conditioning.interfaces import identities_match
from kairos_train.config.schema import Config, stage_model
from kairos_train.errors import UserError
from kairos_train.model import WorldActionModel

FRESH_IN_ACTION_STREAM = ("action_encoder.", "proprio_encoder.", "head.")
"""Action tensors without a counterpart in the video stream: they keep their initial values."""


def build_model(config: Config, encoders: dict[str, Any] | None = None) -> WorldActionModel:
    """The model of a stage with its initial weights, float32 on the CPU.

    A video stage has no action stream. Fresh weights depend on `seed` alone. With `stage.train_video=false` the video
    stream does not require gradients.

    Args:
        encoders: identity of the encoders that this run is conditioned with; a checkpoint that was trained with others
            is refused.

    Raises:
        UserError: `stage.init_from` holds no valid checkpoint, or one of another model or other encoders.
    """
    torch.manual_seed(config.seed)
    model = WorldActionModel(stage_model(config), config.kernels)
    if config.stage.init_from is not None:
        reader = CheckpointReader(resolve_checkpoint(Path(config.stage.init_from)))
        trained_with = reader.state.get("encoders")
        if encoders is not None and trained_with is not None:
            identities_match(trained_with, encoders)
        load_initial(model, reader, weights=config.stage.init_weights, action_init=config.stage.action_init)
    if not config.stage.train_video:
        model.video_dit.requires_grad_(False)
    return model


def load_initial(model: WorldActionModel, reader: CheckpointReader, *, weights: str, action_init: str) -> None:
    """Fill `model` in place from a checkpoint's `weights` (ema | raw).

    A checkpoint without an action stream gives only the video's; the action stream is then interpolated from it, or
    left as initialised (`action_init`).

    Raises:
        UserError: the section is missing, or a tensor of the model is missing or of another shape.
    """
    section = "ema" if weights == "ema" else "model"
    if section not in reader.sections():
        raise UserError(f"stage.init_weights={weights}: {reader.path} has none; use stage.init_weights=raw")
    names, parameters = set(reader.names(section)), model.state_dict()
    has_action = any(name.startswith("action_dit.") for name in names)
    for name, parameter in parameters.items():
        if name.startswith("action_dit.") and not has_action:
            continue
        if name not in names or reader.shape(section, name) != tuple(parameter.shape):
            found = list(reader.shape(section, name)) if name in names else "nothing"
            raise UserError(f"stage.init_from={reader.path}: {name} is {found} there, {list(parameter.shape)} here")
        parameter.copy_(reader.read(section, name))
    if model.action_dit is not None and not has_action and action_init == "interpolate":
        interpolate_action_stream(model)


@torch.no_grad()
def interpolate_action_stream(model: WorldActionModel) -> None:
    """Set the action stream from the video stream, tensor by tensor, linearly along each dimension (*ours*).

    GATED layers have no self-attention: that of the layer before them is taken. The action's own input and output
    layers keep their initial values.
    """
    video = model.video_dit.state_dict()
    for name, parameter in model.action_dit.state_dict().items():
        if name.startswith(FRESH_IN_ACTION_STREAM):
            continue
        source = name
        if ".self_attn." in name:
            layer = int(name.split(".")[1])
            while f"blocks.{layer}.self_attn.q.weight" not in video:
                layer -= 1
                if layer < 0:
                    raise UserError("stage.action_init=interpolate: the first layer is GATED; use random")
            source = ".".join(["blocks", str(layer), *name.split(".")[2:]])
        resize = _resize_sixfold if name.startswith("time_projection") else _resize
        parameter.copy_(resize(video[source], parameter.shape))


def _resize_sixfold(source: Tensor, shape: torch.Size) -> Tensor:
    """The time projection is six outputs of width D in a row: each is interpolated by itself."""
    return _resize(source.unflatten(0, (6, -1)), torch.Size((6, shape[0] // 6, *shape[1:]))).flatten(0, 1)


def _resize(source: Tensor, shape: torch.Size) -> Tensor:
    """Linear interpolation along every dimension whose size differs, end points kept."""
    for dim, size in enumerate(shape):
        if source.shape[dim] != size:
            moved = source.movedim(dim, -1)
            flat = moved.reshape(1, -1, moved.shape[-1])
            resized = F.interpolate(flat, size=size, mode="linear", align_corners=True)
            source = resized.view(*moved.shape[:-1], size).movedim(-1, dim)
    return source
