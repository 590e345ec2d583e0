"""A run's whole state out of an engine and into one, whatever its ZeRO stage, precision and number of processes.

Sections "model" (float32 masters, frozen parameters and persistent buffers), "exp_avg" and "exp_avg_sq" (AdamW's
moments of the trainable parameters), all full-shape under the model's own names, which are the public ones. Loading
restores every bit, so a run continued in the same layout repeats the numbers of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.errors import UserError
from kairos_train.training.engine import TrainingEngine

MOMENTS = ("exp_avg", "exp_avg_sq")


def gather_full_state(engine: TrainingEngine) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Collect weights and moments on rank 0. Collective.

    Needs 12 bytes per trainable parameter of host memory on rank 0, and on every device one whole parameter at a time.

    Returns:
        Sections for `write_checkpoint` (CPU tensors; an empty dictionary on the other ranks), and plain state that
        belongs under the key "optimizer" of the checkpoint's state.
    """
    layout = engine.layout
    sections = {"model": gather_weights(engine, layout.masters)}
    for key in MOMENTS:
        moments = layout.moments(key)
        gathered = {name: layout.gather(name, moments) for name in layout.parameters}
        sections[key] = gathered if engine.world.rank == 0 else {}
    return (sections if engine.world.rank == 0 else {}), {"updates": layout.updates}


def gather_weights(engine: TrainingEngine, tensors: list[Tensor]) -> dict[str, Tensor]:
    """A complete state dictionary on rank 0, {} elsewhere, with the trainable parameters out of `tensors`. Collective.

    Args:
        engine: whose frozen parameters and persistent buffers complete it.
        tensors: float32, in the layout of the engine's masters: the masters themselves, or a moving average of them.
    """
    trained = {name: engine.layout.gather(name, tensors) for name in engine.layout.parameters}
    if engine.world.rank != 0:
        return {}
    buffers = {name: buffer.detach().cpu().clone() for name, buffer in _persistent_buffers(engine.model)}
    return {**trained, **{name: tensor.clone() for name, tensor in engine.frozen.items()}, **buffers}


def load_full_state(engine: TrainingEngine, reader: CheckpointReader) -> None:
    """Restore weights, moments and AdamW's counter from a checkpoint. Collective; every process reads its own parts.

    Raises:
        UserError: the checkpoint's tensors are not this model's, or it has no moments of a parameter that trains. The
            engine is unchanged then.
    """
    shapes = engine.layout.shapes
    for key in MOMENTS:
        _check(reader, key, shapes)
    optimizer = reader.state.get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("updates"), int):
        raise UserError(f"checkpoint {reader.path}: its state has no optimizer.updates; it can not be resumed")
    load_weights(engine, reader)
    for key in MOMENTS:
        moments = engine.layout.moments(key)
        for name in shapes:
            engine.layout.scatter(name, reader.read(key, name), moments)
    engine.layout.updates = optimizer["updates"]


def load_weights(engine: TrainingEngine, reader: CheckpointReader, *, section: str = "model") -> None:
    """Set all weights and persistent buffers from one section, masters and low-precision copies. Collective.

    Raises:
        UserError: a missing, additional or differently shaped tensor. The engine is unchanged then.
    """
    layout = engine.layout
    frozen = {name: p for name, p in engine.model.named_parameters() if not p.requires_grad}
    buffers = dict(_persistent_buffers(engine.model))
    shapes = {name: _full_shape(p) for name, p in frozen.items()}
    shapes |= {name: tuple(buffer.shape) for name, buffer in buffers.items()}
    _check(reader, section, layout.shapes | shapes)
    masters = layout.masters
    for name in layout.shapes:
        layout.scatter(name, reader.read(section, name), masters)
    layout.refresh()
    for name, parameter in frozen.items():
        value = reader.read(section, name)
        if engine.world.rank == 0:
            engine.frozen[name].copy_(value)
        _set_frozen(engine, parameter, value)
    for name, buffer in buffers.items():
        buffer.copy_(reader.read(section, name))


def _check(reader: CheckpointReader, section: str, shapes: dict[str, tuple[int, ...]]) -> None:
    there = set(reader.names(section))
    if missing := sorted(set(shapes) - there):
        raise UserError(
            f"checkpoint {reader.path}: section {section!r} lacks {missing[0]!r} and {len(missing) - 1} more;"
            " resume with the model and the stage that wrote it"
        )
    if unknown := sorted(there - set(shapes)):
        raise UserError(
            f"checkpoint {reader.path}: section {section!r} has {unknown[0]!r} and {len(unknown) - 1} more that this"
            " model does not train; resume with the model and the stage that wrote it"
        )
    for name, shape in shapes.items():
        if reader.shape(section, name) != shape:
            raise UserError(
                f"checkpoint {reader.path}: {section}/{name} has shape {list(reader.shape(section, name))},"
                f" this model's is {list(shape)}; resume with the model that wrote it"
            )


@torch.no_grad()
def _set_frozen(engine: TrainingEngine, parameter: nn.Parameter, value: Tensor) -> None:
    if engine.stage != 3:
        parameter.copy_(value)
        return
    import deepspeed

    # DeepSpeed's setters for partitioned parameters know only trainable ones; this broadcasts rank 0's change.
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if dist.get_rank() == 0:
            parameter.copy_(value)


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that belong to the model's state dictionary."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer
