"""A stage's initial weights: fresh, or another checkpoint's, with an interpolated action stream if that has none.

A rank of a parallel layout fills its shard of each tensor from the same full-size values as one process does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.adapters import MergedWeights
from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.checkpoint.resolve import resolve_checkpoint
from kairos_train.conditioning.interfaces import identities_match
from kairos_train.config.schema import Config
from kairos_train.model import WorldActionModel
from kairos_train.model.initialise import LocalSlices, initial_value, initialise, whole
from kairos_train.model.layout import empty_model, model_table
from kairos_train.model.lora import is_adapter
from kairos_train.model.trainable import trains
from parallel.topology import Topology

VIDEO, ACTION = "video_dit.", "action_dit."
FRESH_IN_ACTION_STREAM = ("action_encoder.", "proprio_encoder.", "head.")
"""Action tensors without a counterpart in the video stream: they keep their initial values."""


def build_model(
    config: Config, encoders: dict[str, Any] | None = None, topology: Topology | None = None
) -> WorldActionModel:
    """This rank's shard of the model of a stage with its initial weights, float32 on the CPU.

    A video stage has no action stream. Fresh weights depend on `seed` alone. Frozen parameters
    (`kairos_train.model.trainable`) do not require gradients.

    Args:
        encoders: identity of the encoders of this run; a checkpoint trained with others raises.
        topology: the parallel layout; None: all of the model, on one process.

    Raises:
        UserError: `stage.init_from` holds no valid checkpoint, or one of another model or other encoders.
    """
    topology = topology or Topology.single(torch.device("cpu"))
    model = empty_model(config, topology).to_empty(device="cpu")
    table = model_table(config, model)

    def slices(name: str, shape: torch.Size) -> tuple[torch.Size, tuple[slice, ...]]:
        full = torch.Size(table.full_shape(name, shape))
        return full, table.slices(name, full, topology.tensor_rank)

    initialise(model, config.seed, slices)
    given = initial_weights(config, "ema" if config.stage.init_weights == "ema" else "model", encoders)
    if given is not None:
        load_initial(model, given, slices)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name, config.stage))
    return model


@dataclass(frozen=True)
class InitialAverage:
    """A moving average to go on from.

    Attributes:
        read: name and slices → that part of its value.
        updates: number of its updates.
    """

    read: Callable[[str, tuple[slice, ...]], Tensor]
    updates: int


def initial_average(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> InitialAverage | None:
    """The average of `stage.init_from` under `stage.init_weights=both`; None: the average starts from the weights.

    Args:
        shapes: full shapes by name.
    """
    if config.stage.init_weights != "both":
        return None
    given = initial_weights(config, "ema")
    if given is None:
        return None

    def read(name: str, part: tuple[slice, ...]) -> Tensor:
        shape = torch.Size(shapes[name])
        return given.read(name, shape, part) if given.gives(name) else initial_value(name, shape, config.seed)[part]

    return InitialAverage(read, given.average_updates)


def initial_weights(config: Config, section: str, encoders: dict[str, Any] | None = None) -> InitialWeights | None:
    """The weights that `stage.init_from` gives; None without it.

    Args:
        section: "model" | "ema".
        encoders: as for `build_model`.
    """
    if config.stage.init_from is None:
        return None
    reader = CheckpointReader(resolve_checkpoint(Path(config.stage.init_from)))
    trained_with = reader.state.get("encoders")
    if encoders is not None and trained_with is not None:
        identities_match(trained_with, encoders)
    if section not in reader.sections():
        raise UserError(
            f"stage.init_weights={config.stage.init_weights}: {reader.path} has no average; use stage.init_weights=raw"
        )
    weights = MergedWeights(reader) if config.stage.lora.rank is None else reader
    return InitialWeights(weights, section, action_init=config.stage.action_init)


class InitialWeights:
    """A checkpoint's weights as the initial ones of another model.

    A checkpoint without an action stream has the video's weights only. The action stream is then interpolated from
    them, tensor by tensor, linearly along each dimension (*ours*), or starts fresh (`action_init=random`). Gated
    DeltaNet layers have no self-attention: their action layers start from that of the layer before. The action's own
    input and output layers start fresh.

    Args:
        reader: of the checkpoint; its adapters are merged, or those of the model start from them.
        section: "model" | "ema".
        action_init: interpolate | random.
    """

    def __init__(self, reader: CheckpointReader | MergedWeights, section: str, *, action_init: str) -> None:
        self._reader, self._section = reader, section
        self._names = set(reader.names(section))
        self._interpolates = action_init == "interpolate"
        self._has_action = any(name.startswith(ACTION) for name in self._names)
        self._video = {name.removeprefix(VIDEO) for name in self._names if name.startswith(VIDEO)}
        self._last: tuple[str, Tensor] | None = None  # callers read the parts of one tensor one after the other

    @property
    def average_updates(self) -> int:
        """Number of updates of the checkpoint's moving average."""
        return int((self._reader.state.get("ema") or {}).get("updates", 0))

    def gives(self, name: str) -> bool:
        """Whether `read` has a value for a model's tensor."""
        if is_adapter(name):
            return name in self._names
        if not name.startswith(ACTION) or self._has_action:
            return True
        return self._interpolates and not name.removeprefix(ACTION).startswith(FRESH_IN_ACTION_STREAM)

    def read(self, name: str, shape: torch.Size, part: tuple[slice, ...] = ()) -> Tensor:
        """A part of a tensor whose full shape is `shape`, float32 on the CPU.

        Raises:
            UserError: the checkpoint has no such tensor, or one of another shape.
        """
        if name.startswith(ACTION) and not self._has_action:
            return self._interpolated(name.removeprefix(ACTION), shape)[part]
        if name not in self._names or self._reader.shape(self._section, name) != tuple(shape):
            found = list(self._reader.shape(self._section, name)) if name in self._names else "nothing"
            raise UserError(
                f"stage.init_from={self._reader.path}: {name} is {found} there, {list(shape)} in this model"
            )
        return self._reader.read(self._section, name, part)

    def _interpolated(self, name: str, shape: torch.Size) -> Tensor:
        if self._last is None or self._last[0] != name:
            source = self._reader.read(self._section, VIDEO + _source(name, self._video)).float()
            self._last = name, interpolate(name, source, shape)
        return self._last[1]


@torch.no_grad()
def load_initial(model: WorldActionModel, given: InitialWeights, slices: LocalSlices = whole) -> None:
    """Fill `model` in place from `given`; tensors that it does not have keep their values.

    Args:
        slices: of each tensor that the model holds.
    """
    for name, parameter in model.named_parameters():
        if given.gives(name):
            parameter.copy_(given.read(name, *slices(name, parameter.shape)))


def interpolate(name: str, source: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of the video stream in the action stream's shape.

    Args:
        name: in the action stream.
    """
    resize = _resize_sixfold if name.startswith("time_projection") else _resize
    return resize(source, shape)


def _source(name: str, video: Collection[str]) -> str:
    """The video tensor that an action tensor is interpolated from."""
    if ".self_attn." not in name:
        return name
    layer = int(name.split(".")[1])
    while f"blocks.{layer}.self_attn.q.weight" not in video:
        layer -= 1
        if layer < 0:
            raise UserError(
                "stage.action_init=interpolate: the first layer is GATED and has no self-attention; use random"
            )
    return ".".join(["blocks", str(layer), *name.split(".")[2:]])


def _resize_sixfold(source: Tensor, shape: torch.Size) -> Tensor:
    """The time projection is six outputs of width D in a row, each interpolated by itself."""
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
