"""States of the gated delta rule between context ranks: which rank sends which affine map, and which composes them.

Over the tokens of rank r the recurrence is the map S → A_r S + B_r, so that
    forward     S_in(0) = 0,       S_in(r + 1) = A_r S_in(r) + B_r           (B_0 includes the initial state)
    backward    D(N−1) = 0,        D(r − 1) = A_rᵀ D(r) + C_r                (D(r): gradient of the state after rank r)
Three ways to the same values, per rank and head group:
    serial      the state itself goes from rank to rank, each scans with it: no A, N−1 scans in a row; the reference
    ring        A stays local; N−1 hops of one state, head group after head group so that ranks work at the same time
    all_gather  (N−1)·(A + B) arrive at once, each rank composes them; backward (N−1)·C, with the A of later ranks kept
Maps travel and compose in float32 (float64 for float64), oldest first.

`incoming_state` and `outgoing_state` are operators of torch, so that selective activation checkpointing can keep their
results (`KEPT_OPERATORS`): the replay of a forward pass then makes no second exchange.

Shapes: B batch, H heads, K key width, V value width, N ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.traffic import Traffic

METHODS = ("serial", "ring", "all_gather")

ALL_GATHER_RANKS = 8
"""`auto` gathers up to this many ranks (one NVLink domain): one latency, and still few bytes. Beyond, the ring."""

HEAD_GROUPS = 4
"""Parts of a state on its way round the ring: rank r + 1 composes one while rank r composes the next."""

_traffic: ContextVar[Traffic | None] = ContextVar("traffic", default=None)
"""An operator takes tensors and plain values only; this passes the counter of one call to it."""


def resolve_method(requested: str, ranks: int) -> str:
    """`parallel.state_exchange` for a group of `ranks`: one of METHODS."""
    if requested == "auto":
        return "all_gather" if ranks <= ALL_GATHER_RANKS else "ring"
    if requested not in METHODS:
        raise ValueError(f"state exchange {requested!r}: one of auto, {', '.join(METHODS)}")
    return requested


def carry(transition: Tensor, state: Tensor, own: Tensor) -> Tensor:
    """A S + B: a state (B, H, K, V) over the tokens of one rank."""
    return transition @ state + own


def carry_back(transition: Tensor, gradient: Tensor, own: Tensor) -> Tensor:
    """Aᵀ D + C: the gradient of the state after a rank's tokens → of the state before them."""
    return transition.mT @ gradient + own


def oldest_first(rank: int) -> Iterable[int]:
    """The ranks before `rank`, in the order in which their maps apply."""
    return range(rank)


def newest_first(rank: int, ranks: int) -> Iterable[int]:
    """The ranks after `rank`, in the order in which gradients pass them."""
    return range(ranks - 1, rank, -1)


def receive_state(
    transition: Tensor, own: Tensor, group: dist.ProcessGroup, method: str, traffic: Traffic | None
) -> tuple[Tensor, Tensor]:
    """The state before this rank's tokens, by way of the operator `kairos_parallel::incoming_state`.

    Args:
        transition: A (B, H, K, K); zero on rank 0. `serial` does not read it.
        own: B (B, H, K, V); for `serial` anything of this shape.

    Returns:
        S_in (B, H, K, V), zero on rank 0, and the A of later ranks (ranks after this one, B, H, K, K) for
        `return_gradient`; of 0 ranks unless gathered.
    """
    return _counted(traffic, torch.ops.kairos_parallel.incoming_state, transition, own, group.group_name, method)


def send_state(state: Tensor, group: dist.ProcessGroup) -> None:
    """`serial`: the state after this rank's tokens to the next rank, by `kairos_parallel::outgoing_state`."""
    torch.ops.kairos_parallel.outgoing_state(state, group.group_name)


def return_gradient(
    transition: Tensor, later: Tensor, own: Tensor, group: dist.ProcessGroup, method: str, traffic: Traffic | None
) -> Tensor:
    """D (B, H, K, V), the gradient of the state after this rank's tokens, through all later ranks.

    Args:
        transition: A of this rank.
        later: A of later ranks, as `receive_state` returned them.
        own: C, the gradient of this rank's incoming state from its own outputs (and final state).
        method: "ring" or "all_gather".
    """
    rank, ranks = group.rank(), group.size()
    if method == "ring":
        received = _pass_along(carry_back, transition, own, group, from_rank=rank + 1, to_rank=rank - 1)
        _report(traffic, "states.backward", received if rank + 1 < ranks else None)
        return received
    gathered = _all_gather(own, group, "states.backward", traffic)
    gradient = torch.zeros_like(own)
    for r in newest_first(rank, ranks):
        gradient = carry_back(later[r - rank - 1], gradient, gathered[r])
    return gradient


def send_to(x: Tensor, group: dist.ProcessGroup, rank: int) -> None:
    """x to one rank of the group."""
    _wait([dist.P2POp(dist.isend, x.contiguous(), group=group, group_peer=rank)])


def receive_from(like: Tensor, group: dist.ProcessGroup, rank: int, kind: str, traffic: Traffic | None) -> Tensor:
    """A tensor of `like`'s shape and dtype from one rank of the group."""
    received = torch.empty_like(like, memory_format=torch.contiguous_format)
    _wait([dist.P2POp(dist.irecv, received, group=group, group_peer=rank)])
    _report(traffic, kind, received)
    return received


@torch.library.custom_op("kairos_parallel::incoming_state", mutates_args=())
def _incoming_state(transition: Tensor, own: Tensor, group_name: str, method: str) -> tuple[Tensor, Tensor]:
    group, traffic = _group(group_name), _traffic.get()
    rank = group.rank()
    none_later = own.new_empty(0, *own.shape[:3], own.shape[2])
    if method == "serial":
        state = receive_from(own, group, rank - 1, "states", traffic) if rank else torch.zeros_like(own)
        return state, none_later
    if method == "ring":
        state = _pass_along(carry, transition, own, group, from_rank=rank - 1, to_rank=rank + 1)
        _report(traffic, "states", state if rank else None)
        return state, none_later
    gathered = _all_gather(torch.cat([transition, own], dim=-1), group, "states", traffic)
    transitions, states = gathered.split([own.shape[2], own.shape[3]], dim=-1)
    state = torch.zeros_like(own)
    for r in oldest_first(rank):
        state = carry(transitions[r], state, states[r])
    return state, transitions[rank + 1 :].clone(memory_format=torch.contiguous_format)


@_incoming_state.register_fake
def _(transition: Tensor, own: Tensor, group_name: str, method: str) -> tuple[Tensor, Tensor]:
    group = _group(group_name)
    later = group.size() - 1 - group.rank() if method == "all_gather" else 0
    return torch.empty_like(own), own.new_empty(later, *own.shape[:3], own.shape[2])


@torch.library.custom_op("kairos_parallel::outgoing_state", mutates_args=())
def _outgoing_state(state: Tensor, group_name: str) -> Tensor:
    group = _group(group_name)
    send_to(state, group, group.rank() + 1)
    return state.new_empty(0)  # an operator has a result


@_outgoing_state.register_fake
def _(state: Tensor, group_name: str) -> Tensor:
    return state.new_empty(0)


KEPT_OPERATORS = (
    torch.ops.kairos_parallel.incoming_state.default,
    torch.ops.kairos_parallel.outgoing_state.default,
)
"""Operators whose results a selective checkpoint must keep, so that its replay does not communicate again."""


def _counted(traffic: Traffic | None, operator: Callable[..., tuple[Tensor, Tensor]], *args) -> tuple[Tensor, Tensor]:
    token = _traffic.set(traffic)
    try:
        return operator(*args)
    finally:
        _traffic.reset(token)


def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)


def _pass_along(
    compose: Callable[[Tensor, Tensor, Tensor], Tensor],
    transition: Tensor,
    own: Tensor,
    group: dist.ProcessGroup,
    *,
    from_rank: int,
    to_rank: int,
) -> Tensor:
    """Receive a state from one neighbour, apply this rank's map, send it to the other neighbour; by head groups."""
    parts = min(HEAD_GROUPS, own.shape[1])
    transitions, owns = transition.tensor_split(parts, dim=1), own.tensor_split(parts, dim=1)
    first, last = not 0 <= from_rank < group.size(), not 0 <= to_rank < group.size()
    received = [x.new_zeros(x.shape) for x in owns]
    if not first:
        _wait([dist.P2POp(dist.irecv, received[0], group=group, group_peer=from_rank)])
    for i in range(parts):
        operations = []
        if not last:
            sent = owns[i] if first else compose(transitions[i], received[i], owns[i])
            operations.append(dist.P2POp(dist.isend, sent.contiguous(), group=group, group_peer=to_rank))
        if not first and i + 1 < parts:
            operations.append(dist.P2POp(dist.irecv, received[i + 1], group=group, group_peer=from_rank))
        _wait(operations)
    return torch.cat(received, dim=1)


def _all_gather(x: Tensor, group: dist.ProcessGroup, kind: str, traffic: Traffic | None) -> Tensor:
    """x of every rank, (N, ...)."""
    gathered = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(gathered.unbind(0)), x.contiguous(), group=group)
    _report(traffic, kind, gathered[1:])  # all but this rank's own
    return gathered


def _wait(operations: list[dist.P2POp]) -> None:
    """Start together, then wait for all (on CUDA: the current stream waits, not the process)."""
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def _report(traffic: Traffic | None, kind: str, received: Tensor | None) -> None:
    if traffic is not None:
        traffic.add(kind, 0 if received is None else received.numel() * received.element_size())
