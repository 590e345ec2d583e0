"""Where a stage's weights come from: fresh, or another checkpoint's, the action stream interpolated if it has none.

A rank of a sharded layout fills its part of each tensor from the same full-size values as one process does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.checkpoint.resolve import resolve_checkpoint
from kairos_train.conditioning.interfaces import identities_match
from kairos_train.config.schema import Config
from kairos_train.errors import UserError
from kairos_train.model import WorldActionModel
from kairos_train.model.initialise import Place, initialise, whole
from kairos_train.model.layout import empty_model, model_table
from parallel.topology import Topology

FRESH_IN_ACTION_STREAM = ("action_encoder.", "proprio_encoder.", "head.")
"""Action tensors without a counterpart in the video stream: they keep their initial values."""


def build_model(
    config: Config, encoders: dict[str, Any] | None = None, topology: Topology | None = None
) -> WorldActionModel:
    """This rank's part of the model of a stage with its initial weights, float32 on the CPU.

    A video stage has no action stream. Fresh weights depend on `seed` alone. With `stage.train_video=false` the video
    stream does not require gradients.

    Args:
        encoders: identity of the encoders that this run is conditioned with; a checkpoint that was trained with others
            is refused.
        topology: the layout; None: all of the model, on one process.

    Raises:
        UserError: `stage.init_from` holds no valid checkpoint, or one of another model or other encoders.
    """
    topology = topology or Topology.single(torch.device("cpu"))
    model = empty_model(config, topology).to_empty(device="cpu")
    table = model_table(config, model)

    def place(name: str, shape: torch.Size) -> tuple[torch.Size, tuple[slice, ...]]:
        full = torch.Size(table.full_shape(name, shape))
        return full, table.slices(name, full, topology.tensor_rank)

    initialise(model, config.seed, place)
    if config.stage.init_from is not None:
        reader = CheckpointReader(resolve_checkpoint(Path(config.stage.init_from)))
        trained_with = reader.state.get("encoders")
        if encoders is not None and trained_with is not None:
            identities_match(trained_with, encoders)
        stage = config.stage
        load_initial(model, reader, weights=stage.init_weights, action_init=stage.action_init, place=place)
    if not config.stage.train_video:
        model.video_dit.requires_grad_(False)
    return model


@torch.no_grad()
def load_initial(
    model: WorldActionModel, reader: CheckpointReader, *, weights: str, action_init: str, place: Place = whole
) -> None:
    """Fill `model` in place from a checkpoint's `weights` (ema | raw).

    A checkpoint without an action stream gives only the video's; the action stream is then interpolated from it, or
    left as initialised (`action_init`).

    Args:
        place: which part of each tensor the model holds.

    Raises:
        UserError: the section is missing, or a tensor of the model is missing or of another shape.
    """
    section = "ema" if weights == "ema" else "model"
    if section not in reader.sections():
        raise UserError(f"stage.init_weights={weights}: {reader.path} has none; use stage.init_weights=raw")
    names = set(reader.names(section))
    has_action = any(name.startswith("action_dit.") for name in names)
    for name, parameter in model.named_parameters():
        if name.startswith("action_dit.") and not has_action:
            continue
        shape, part = place(name, parameter.shape)
        if name not in names or reader.shape(section, name) != tuple(shape):
            found = list(reader.shape(section, name)) if name in names else "nothing"
            raise UserError(f"stage.init_from={reader.path}: {name} is {found} there, {list(shape)} here")
        parameter.copy_(reader.read(section, name, part))
    if model.action_dit is not None and not has_action and action_init == "interpolate":
        interpolate_action_stream(model, lambda name: reader.read(section, f"video_dit.{name}"), place)


@torch.no_grad()
def interpolate_action_stream(model: WorldActionModel, video: Callable[[str], Tensor], place: Place = whole) -> None:
    """Set the action stream from a video stream, tensor by tensor, linearly along each dimension (*ours*).

    GATED layers have no self-attention: that of the layer before them is taken. The action's own input and output
    layers keep their initial values.

    Args:
        video: the video stream's tensors by their names in it, full-size.
        place: which part of each tensor the model holds.
    """
    names = {name for name, _ in model.video_dit.named_parameters()}
    for name, parameter in model.action_dit.named_parameters():
        if name.startswith(FRESH_IN_ACTION_STREAM):
            continue
        shape, part = place(f"action_dit.{name}", parameter.shape)
        resize = _resize_sixfold if name.startswith("time_projection") else _resize
        parameter.copy_(resize(video(_source(name, names)), shape)[part])


def _source(name: str, video: Collection[str]) -> str:
    """The video tensor that an action tensor is interpolated from."""
    if ".self_attn." not in name:
        return name
    layer = int(name.split(".")[1])
    while f"blocks.{layer}.self_attn.q.weight" not in video:
        layer -= 1
        if layer < 0:
            raise UserError("stage.action_init=interpolate: the first layer is GATED; use random")
    return ".".join(["blocks", str(layer), *name.split(".")[2:]])


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
