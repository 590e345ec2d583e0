"""What ranks agree on between two steps: flags, plain values, and whether rank 0 succeeded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from kairos_train.basics.errors import EXIT_CODES, MachineFault
from parallel.topology import Topology


def any_rank(flags: Sequence[bool], topology: Topology) -> list[bool]:
    """For each flag, whether it is set on any rank: one small all-reduce over the world. Collective."""
    if topology.size == 1:
        return list(flags)
    values = torch.tensor(list(flags), dtype=torch.int32, device=topology.device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def from_first(value: Any, size: int) -> Any:
    """Rank 0's plain value, on all ranks. Collective; `size` as for `from_all`."""
    if size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def from_all(value: Any, size: int) -> list[Any]:
    """The plain values of all ranks, by rank, on all ranks. Collective.

    Args:
        value: this rank's, picklable.
        size: of the world; 1 needs no process group.
    """
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value)
    return values


Result = TypeVar("Result")


def first_does(action: Callable[[], Result], *, rank: int, size: int) -> Result | None:
    """Let rank 0 do something that may fail. Collective: all ranks return when it is done, or all raise.

    Args:
        action: what rank 0 does; its result stays there.
        rank, size: of this process in the world.

    Returns:
        The result on rank 0, None elsewhere.

    Raises:
        UserError, RunStopped, MachineFault, Interrupted: on every rank what `action` raised on rank 0.
        MachineFault: on the others, when it raised another error, which keeps its traceback on rank 0.
    """
    result, error = None, None
    if rank == 0:
        try:
            result = action()
        except Exception as raised:
            error = raised
    reported = from_first(None if error is None else (_kind_of(error), str(error)), size)
    if error is not None:
        raise error
    if reported is not None:
        kind, text = reported
        raise next(known for known in EXIT_CODES if known.__name__ == kind)(text)
    return result


def _kind_of(error: Exception) -> str:
    return next((kind.__name__ for kind in EXIT_CODES if isinstance(error, kind)), MachineFault.__name__)
