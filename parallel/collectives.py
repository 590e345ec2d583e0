"""Collectives with gradients, at the borders of what tensor ranks split: the width, and the tokens between layers.

Each is one collective forward and its transpose backward, on any device, backend and dimension. "Width shard" is the
rank's part of heads or channels, "token shard" its part of the tokens:

    function        forward          backward         from → to
    copy_to         identity         all-reduce       replicated → into a width shard
    reduce_from     all-reduce       identity         partial sums → replicated
    reduce_both     all-reduce       all-reduce       partial sums → replicated, into a width shard
    gather_tokens   all-gather       reduce-scatter   token shard → all tokens, into a width shard
    scatter_sums    reduce-scatter   all-gather       partial sums of all tokens → token shard
    split_tokens    local shard      all-gather       replicated → token shard
    join_tokens     all-gather       local shard      token shard → replicated, with the same consumers on every rank

Group None: there is one rank, and x is returned. Sums run in x's dtype; in bfloat16 that costs one rounding per
addition, as a matrix product split over ranks does anyway. Tensors without elements are not sent: group members agree
on shapes. Groups are along the tensor axis; token shards are equal, so that each function is a single collective.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def copy_to(x: Tensor, group: Group) -> Tensor:
    """Enter a width shard: x of any shape, unchanged; backward sums its gradients over the group."""
    return x if group is None else _Collective.apply(x, _same, _sum, group)


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """Leave a width shard: the sum of x over the group; the gradient, equal on every rank, stays as it is."""
    return x if group is None else _Collective.apply(x, _sum, _same, group)


def reduce_both(x: Tensor, group: Group) -> Tensor:
    """The sum of x over the group, which every rank then uses for its width shard.

    Forward and backward sum, because the loss reaches x by every rank: sums of squares for a norm over the full width.
    """
    return x if group is None else _Collective.apply(x, _sum, _sum, group)


def gather_tokens(x: Tensor, dim: int, group: Group) -> Tensor:
    """Token shard, l along `dim`, → all L = l·ranks tokens in rank order; gradients are summed and scattered.

    For inputs of layers that compute a width shard from all tokens.
    """
    return x if group is None else _Collective.apply(x, _along(_gather, x, dim), _along(_scatter_sums, x, dim), group)


def scatter_sums(x: Tensor, dim: int, group: Group) -> Tensor:
    """Partial sums of all L tokens along `dim` → complete sums of the local l = L/ranks tokens.

    Raises:
        ValueError: the tokens do not divide.
    """
    return x if group is None else _Collective.apply(x, _along(_scatter_sums, x, dim), _along(_gather, x, dim), group)


def split_tokens(x: Tensor, dim: int, group: Group) -> Tensor:
    """All L tokens along `dim`, equal on every rank, → the local l = L/ranks; gradients are gathered.

    Raises:
        ValueError: the tokens do not divide.
    """
    return x if group is None else _Collective.apply(x, _along(_local, x, dim), _along(_gather, x, dim), group)


def join_tokens(x: Tensor, dim: int, group: Group) -> Tensor:
    """The local l tokens along `dim` → all L = l·ranks; of the gradient, equal on every rank, the local shard."""
    return x if group is None else _Collective.apply(x, _along(_gather, x, dim), _along(_local, x, dim), group)


class _Collective(torch.autograd.Function):
    """`forward_with` forward, `backward_with` backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_with: Any, backward_with: Any, group: dist.ProcessGroup) -> Tensor:
        ctx.backward_with, ctx.group = backward_with, group
        return forward_with(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.backward_with(gradient, ctx.group), None, None, None


def _along(function: Any, x: Tensor, dim: int) -> Any:
    """A token collective with its dimension, counted from the front."""
    return functools.partial(function, dim=dim % x.ndim)


def _same(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.view_as(x)  # a Function that returns its input itself would mark it as changed in place


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    if out.numel():
        dist.all_reduce(out, group=group)
    return out


def _local(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    return _shards(x, group, dim).select(dim, group.rank()).contiguous()


def _gather(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    parts = x.new_empty(group.size(), *x.shape)
    if x.numel():
        _all_gather(parts, x.contiguous(), group)
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def _scatter_sums(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    parts = _shards(x, group, dim).movedim(dim, 0).contiguous()
    out = torch.empty_like(parts[0])
    if out.numel():
        _reduce_scatter(out, parts, group)
    return out


def _shards(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """(…, L, …) → (…, ranks, l, …)."""
    if x.shape[dim] % group.size():
        raise ValueError(f"{x.shape[dim]} tokens do not divide into {group.size()} equal shards")
    return x.unflatten(dim, (group.size(), x.shape[dim] // group.size()))


# torch 2.13 renamed the collectives on one tensor; older versions know the old names only. The tensors are contiguous
# and flattened, because backends differ in the shapes that they take.


def _all_gather(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out.view(-1), x.view(-1), group=group)


def _reduce_scatter(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(out.view(-1), x.view(-1), group=group)
