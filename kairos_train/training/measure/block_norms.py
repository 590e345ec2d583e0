"""Norm of the gradient of each kind of block, out of the parts of the gradient that ranks hold after its reduction.

    norm of a kind = sqrt(Σ_ranks Σ g²), over the elements that the rank counts

Each element counts on one rank, the one that would write it into a checkpoint
(`kairos_train.training.engine.ownership`), so that the root of the sum of the squares of all kinds is the norm of the
whole gradient, before clipping. Nothing is gathered: one all-reduce of a number per kind.

Reduced gradients are there between the last `backward` of a step and its `engine.step()`, and only there:

    stage 0               `.grad` of each parameter, whole on every rank
    stage 1 in bf16       float32 buffers of DeepSpeed's BF16 optimiser, whole on every rank, of which the partition
    stage 1, 2 otherwise  the fragments in this rank's partition (`averaged_gradients`)
    stage 3               this rank's part of each parameter, its padding zero
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kairos_train.training.engine.deepspeed_engine import TrainingEngine
from kairos_train.training.engine.deepspeed_internals import gradient_fragment
from parallel.topology import Topology

PARTS = {
    "cross_attn": "cross_attention",
    "cross_attn_norm": "cross_attention",
    "ffn": "ffn",
    "modulation": "modulation",
}
"""Part of a video block → what it counts as. Self-attention and Gated DeltaNet count as their layer's kind."""


@dataclass(frozen=True)
class BlockSquares:
    """Sums of squares on this rank.

    Attributes:
        kinds: names, the same on all ranks.
        squares: float64 (kinds,), on the rank's device.
    """

    kinds: tuple[str, ...]
    squares: Tensor

    def norms(self, topology: Topology) -> dict[str, float]:
        """Norm by kind, equal on all ranks, as "grad_norm/KIND". Collective."""
        total = self.squares.clone()
        if topology.size > 1:
            dist.all_reduce(total)
        return {f"grad_norm/{kind}": value for kind, value in zip(self.kinds, total.sqrt().tolist(), strict=True)}


def block_kind(name: str, layers: Sequence[str]) -> str:
    """What a parameter counts as: SWA, DSWA, FA, GATED, cross_attention, ffn, modulation, action (all of that stream)
    or embeddings_and_heads.

    Args:
        name: of the parameter.
        layers: kind of each layer of the video stream.
    """
    stream, *path = name.split(".")
    if stream == "action_dit":
        return "action"
    if path[0] != "blocks":
        return "embeddings_and_heads"
    return layers[int(path[1])] if path[2] in ("self_attn", "gated_delta") else PARTS[path[2]]


@torch.no_grad()
def block_squares(engine: TrainingEngine) -> BlockSquares:
    """Sums of squares of the gradient that this rank counts. Not collective.

    Args:
        engine: between the last `backward` of a step and `step`; its model knows the kinds of its layers.
    """
    kind_of = {name: block_kind(name, engine.model.kinds) for name in engine.master_shards.parameters}
    kinds = tuple(sorted(set(kind_of.values())))
    parts: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    for name, part in _counted(engine):
        parts[kind_of[name]].append(part)
    norms = [
        torch.nn.utils.get_total_norm(found).double()
        if (found := parts[kind])
        else torch.zeros((), dtype=torch.float64, device=engine.topology.device)
        for kind in kinds
    ]
    return BlockSquares(kinds, torch.stack(norms).to(engine.topology.device) ** 2)


def _counted(engine: TrainingEngine) -> Iterator[tuple[str, Tensor]]:
    """The float32 gradients that this rank counts, by name of the parameter. Views."""
    counted = engine.ownership.copies if engine.stage == 0 else engine.ownership.partitions
    for name, parameter in engine.master_shards.parameters.items():
        if name not in counted:
            continue
        if engine.stage == 0:
            part = parameter.grad
        elif engine.stage == 3:
            from deepspeed.utils import safe_get_local_grad

            part = safe_get_local_grad(parameter)
        else:
            part = gradient_fragment(parameter)
        if part is not None:
            yield name, part
