"""The audit of a sharded model before training: it finds what would otherwise go wrong in silence.

A parameter without an entry in the sharding table would count wrongly in the gradient norm, and nobody would complete
its gradient; replicas that start out different stay different, since only their gradients are averaged.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.sharding import Shape, ShardingError, ShardingTable
from parallel.topology import Topology

CHUNK = 1 << 24
"""Elements that a checksum converts to 64 bits at once."""

NOWHERE = 1 << 62
"""The index of no parameter."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def audit(model: nn.Module, table: ShardingTable, topology: Topology, *, full_shapes: Mapping[str, Shape]) -> None:
    """Check a model against its table and against the other ranks. Collective over the world.

    Every parameter has an entry, and its local shape is a shard of the full one; all ranks hold the same names, dtypes
    and choice of trainable parameters; parameters are equal, bit by bit, over the gradient group, and replicated ones
    over the tensor group as well.

    Args:
        model: with its initial weights, before an engine partitions them.
        full_shapes: name → shape of the unsharded parameter, from a model on the meta device.

    Raises:
        ShardingError: on every rank, naming the first parameter in the model's order; the rank that finds the fault
            describes it.
    """
    parameters = dict(model.named_parameters())
    faults = [_fault(name, p, table, full_shapes) for name, p in parameters.items()]
    first = next((i for i, fault in enumerate(faults) if fault is not None), NOWHERE)
    described = "\n".join(f"{name} {p.dtype} {p.requires_grad}" for name, p in parameters.items())
    names = torch.tensor([zlib.crc32(described.encode()), len(parameters)])
    # A fault on any rank has to end the audit on all of them: all exchange first, and raise after that.
    earliest = -int(_world_max(torch.tensor([-first]), topology))
    alike = _equal(names, topology.tensor_group) & _equal(names, topology.gradient_group)
    alike = not _world_max((~alike).long(), topology).any()
    if first == earliest < NOWHERE:
        raise ShardingError(faults[first])
    if not alike:
        raise ShardingError("ranks hold different lists of parameters (names, dtypes, or which of them are trainable)")
    if earliest < NOWHERE:
        name = list(parameters)[earliest]
        raise ShardingError(f"parameter {name} does not fit its entry in the sharding table on another rank")
    _check_copies(parameters, table, topology)


def _fault(name: str, parameter: Tensor, table: ShardingTable, full: Mapping[str, Shape]) -> str | None:
    """What is wrong with one parameter on this rank alone."""
    if name not in table.entries:
        return f"parameter {name} has no entry in the sharding table; give it a sharding rule"
    if name not in full:
        return f"parameter {name} is not in the unsharded model"
    local, expected = tuple(parameter.shape), table.local_shape(name, tuple(full[name]))
    if local != expected:
        return (
            f"parameter {name} is {local} on this rank; a {table[name].kind} shard over {table.tensor} tensor ranks of "
            f"{tuple(full[name])} is {expected}"
        )
    return None


def _check_copies(parameters: Mapping[str, nn.Parameter], table: ShardingTable, topology: Topology) -> None:
    sums = torch.stack([checksum(p).cpu() for p in parameters.values()])
    whole = torch.tensor([table[name].dim is None for name in parameters])
    differs = ~_equal(sums, topology.gradient_group) | (whole & ~_equal(sums, topology.tensor_group))
    differs = _world_max(differs.long(), topology)
    if differs.any():
        name = list(parameters)[int(differs.nonzero()[0])]
        raise ShardingError(f"the copies of parameter {name} differ between ranks; give all ranks the same weights")


@torch.no_grad()
def checksum(x: Tensor) -> Tensor:
    """A number for the exact bits of a tensor and their order: Σ bits_i · (2i + 1) modulo 2⁶⁴, an int64 scalar."""
    bits = x.detach().contiguous().view(-1).view(_BITS[x.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].long()
        weights = torch.arange(start, start + part.numel(), device=x.device) * 2 + 1
        total += (part * weights).sum()
    return total


def _equal(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Elementwise: are the integers x the same on all ranks of the group? A bool tensor, equal on all of them."""
    if group is None:
        return torch.ones_like(x, dtype=torch.bool)
    most = _max(torch.stack([x, ~x]), group)  # ~x = −x − 1 turns the order round: its maximum is the minimum of x
    return most[0] == ~most[1]


def _world_max(x: Tensor, topology: Topology) -> Tensor:
    """Elementwise maximum over the whole world."""
    return _max(_max(x, topology.tensor_group), topology.gradient_group)


def _max(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return x
    device = torch.device("cuda") if "nccl" in dist.get_backend(group) else x.device
    out = x.to(device, copy=True)
    dist.all_reduce(out, dist.ReduceOp.MAX, group=group)
    return out.to(x.device)
