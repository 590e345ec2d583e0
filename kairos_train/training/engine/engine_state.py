"""A run's whole state out of an engine and into one, in any parallel layout, ZeRO stage and precision.

Sections "model" (float32 masters, frozen parameters and persistent buffers), "exp_avg" and "exp_avg_sq" (AdamW's
moments of the trainable parameters) and "ema", full-shape under the model's own names, which are the public ones. Each
process writes and reads local shards only. Loading restores every bit, so a run that resumes in the same layout repeats
the losses of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kairos_train.basics.errors import UserError
from kairos_train.checkpoint import boxes
from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.checkpoint.writing import Piece, whole_pieces
from kairos_train.training.engine.deepspeed_engine import TrainingEngine
from kairos_train.training.engine.deepspeed_internals import local_shape


def state_pieces(engine: TrainingEngine, average: Sequence[Tensor] | None = None) -> dict[str, list[Piece]]:
    """What this process writes of weights, moments and moving average.

    Views of the engine's own tensors: copy them before the next step, as `Saver.save` does.

    Args:
        engine: not inside of a step.
        average: float32, sharded as the engine's masters; None: there is no section "ema".
    """
    shards = engine.master_shards
    sections = {"model": shards.masters, **{key: shards.moments(key) for key in shards.moment_names}}
    if average is not None:
        sections["ema"] = list(average)
    pieces = {section: shards.pieces(tensors) for section, tensors in sections.items()}
    for section in pieces.keys() - set(shards.moment_names):
        pieces[section] += _fixed_pieces(engine)
    return pieces


def gather_full_state(
    engine: TrainingEngine, average: Sequence[Tensor] | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Assemble the sections on rank 0, for tests and small tools; a run writes pieces. Collective.

    Returns:
        Sections of whole CPU tensors (an empty dictionary on the other ranks), and the plain state under the key
        "optimizer" of the checkpoint's state.
    """
    mine = {
        section: [(p.name, p.shape, p.offset, p.tensor.detach().cpu()) for p in pieces]
        for section, pieces in state_pieces(engine, average).items()
    }
    ranks: list[Any] = [None] * engine.topology.size
    dist.gather_object(mine, ranks if engine.topology.rank == 0 else None)
    sections: dict[str, dict[str, Tensor]] = {}
    if engine.topology.rank == 0:
        for name in mine:
            sections[name] = _assemble([piece for rank in ranks for piece in rank[name]])
    return sections, {"updates": engine.master_shards.updates}


def load_full_state(engine: TrainingEngine, reader: CheckpointReader) -> None:
    """Restore weights, moments and AdamW's counter from a checkpoint. Collective; every process reads its own shards.

    Raises:
        UserError: the checkpoint's tensors are not this model's, or it has no moments of a parameter that trains. The
            engine is unchanged then.
    """
    shards = engine.master_shards
    for key in shards.moment_names:
        _check(reader, key, shards.shapes)
    optimizer = reader.state.get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("updates"), int):
        raise UserError(f"checkpoint {reader.path}: its state has no optimizer.updates; it can not be resumed")
    load_weights(engine, reader)
    for key in shards.moment_names:
        shards.fill(lambda name, box, section=key: reader.read(section, name, box), shards.moments(key))
    shards.updates = optimizer["updates"]


def load_weights(engine: TrainingEngine, reader: CheckpointReader, *, section: str = "model") -> None:
    """Set all weights and persistent buffers from one section, masters and low-precision copies. Collective.

    Raises:
        UserError: a missing, additional or differently shaped tensor. The engine is unchanged then.
    """
    shards, ownership = engine.master_shards, engine.ownership
    frozen = {name: p for name, p in engine.model.named_parameters() if not p.requires_grad}
    buffers = dict(_persistent_buffers(engine.model))
    shapes = {name: ownership.full_shape(name, local_shape(p)) for name, p in frozen.items()}
    _check(reader, section, shards.shapes | shapes | {name: tuple(b.shape) for name, b in buffers.items()})
    shards.fill(lambda name, box: reader.read(section, name, box), shards.masters)
    shards.refresh()
    for name, parameter in frozen.items():
        value = reader.read(section, name, ownership.slices(name, shapes[name]))
        if name in engine.frozen:
            engine.frozen[name].copy_(value)
        _set_frozen(engine, parameter, value)
    for name, buffer in buffers.items():
        buffer.copy_(reader.read(section, name))


def _fixed_pieces(engine: TrainingEngine) -> list[Piece]:
    """What this process writes of frozen parameters, and of buffers, which are equal on all ranks."""
    pieces = []
    for name, tensor in engine.frozen.items():
        full = engine.ownership.full_shape(name, tuple(tensor.shape))
        pieces.append(Piece(name, full, engine.ownership.offset(name, full), tensor))
    return pieces + (whole_pieces(dict(_persistent_buffers(engine.model))) if engine.topology.rank == 0 else [])


def _assemble(pieces: list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    for name, shape, offset, part in pieces:
        whole = tensors.setdefault(name, torch.empty(shape, dtype=part.dtype))
        whole[boxes.slices_of(boxes.at(offset, part.shape), [0] * len(shape))] = part
        filled[name] = filled.get(name, 0) + part.numel()
    if odd := [name for name, count in filled.items() if count != tensors[name].numel()]:
        raise RuntimeError(f"the pieces of {odd[0]} on all ranks do not make it whole")
    return tensors


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

    # DeepSpeed's setters for partitioned parameters take only trainable ones. This sends what the first rank of the
    # gradient group changes to the whole group.
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if engine.ownership.copy == 0:
            parameter.copy_(value)


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that belong to the model's state dictionary."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer
