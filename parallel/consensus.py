"""What all ranks must know of each other between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from kairos_train.operations.preflight.agreement import gather
from parallel.topology import Topology


def any_rank(flags: Sequence[bool], topology: Topology) -> list[bool]:
    """For each flag, whether it is set on any rank: one small all-reduce over the world. Collective."""
    if topology.size == 1:
        return list(flags)
    values = torch.tensor(list(flags), dtype=torch.int32, device=topology.device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def from_first(value: Any, topology: Topology) -> Any:
    """Rank 0's plain value, on all ranks. Collective."""
    if topology.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def from_all(value: Any, topology: Topology) -> list[Any]:
    """The plain values of all ranks, on all ranks. Collective."""
    return gather(value, topology.size)
