"""The halo of the short convolutions: a context rank needs the last tokens of the rank before it.

They travel as hidden states, before projection, where they are fewest bytes; each rank projects them again. The halo
skips ranks without tokens, which join the exchange all the same.

Shapes: B batch, S tokens of this rank, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kairos_train.basics.errors import UserError
from parallel.traffic import Traffic


def previous_tokens(
    x: Tensor, count: int, *, tokens: Sequence[int], group: dist.ProcessGroup, traffic: Traffic | None = None
) -> Tensor:
    """The `count` tokens before this rank's first, from the rank before that has any.

    Args:
        x: hidden tokens (B, S, D), before projection: there they are fewest bytes.
        tokens: S of every rank of the group, in sequence order.
        traffic: counts the bytes received, as "halo" and "halo.backward".

    Returns:
        (B, count, D); zeros before the first tokens of the sequence and on ranks without tokens. Backward adds its
        gradient to those tokens on their own rank.

    Raises:
        UserError: a rank has tokens, but fewer than `count`. All ranks raise alike, before they send anything.
    """
    if short := [n for n in tokens if 0 < n < count]:
        raise UserError(
            f"parallel.context={len(tokens)}: a rank would hold {short[0]} tokens, but a convolution of size "
            f"{count + 1} reads {count} from one rank; use fewer context ranks or larger frames"
        )
    before, after = neighbours(tokens, group.rank())
    end = x[:, x.shape[1] - count :] if x.shape[1] else x
    return _Halo.apply(end, count, before, after, group, traffic)


def neighbours(tokens: Sequence[int], rank: int) -> tuple[int | None, int | None]:
    """The nearest ranks before and after that have tokens; None for a rank that has none itself."""
    if not tokens[rank]:
        return None, None
    before = [r for r in range(rank) if tokens[r]]
    after = [r for r in range(rank + 1, len(tokens)) if tokens[r]]
    return (before[-1] if before else None), (after[0] if after else None)


class _Halo(torch.autograd.Function):
    """Last tokens (B, count or 0, D) → those of the rank before (B, count, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        end: Tensor,
        count: int,
        before: int | None,
        after: int | None,
        group: dist.ProcessGroup,
        traffic: Traffic | None,
    ) -> Tensor:
        ctx.before, ctx.after, ctx.group, ctx.traffic, ctx.shape = before, after, group, traffic, end.shape
        shape = (end.shape[0], count, end.shape[2])
        return shift(end, shape, after, before, group, "halo", traffic)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        returned = shift(gradient, ctx.shape, ctx.before, ctx.after, ctx.group, "halo.backward", ctx.traffic)
        return returned, None, None, None, None, None


def shift(
    x: Tensor,
    shape: tuple[int, ...],
    to_rank: int | None,
    from_rank: int | None,
    group: dist.ProcessGroup,
    kind: str,
    traffic: Traffic | None,
) -> Tensor:
    """Send x to one rank and receive `shape` from another, or zeros: one all-to-all, so that every rank joins."""
    received = x.new_zeros(shape)
    send, receive = ([0] * group.size() for _ in range(2))
    if to_rank is not None:
        send[to_rank] = x.numel()
    if from_rank is not None:
        receive[from_rank] = received.numel()
    arriving = x.new_empty(sum(receive))
    leaving = x.reshape(-1) if to_rank is not None else x.new_empty(0)
    dist.all_to_all_single(arriving, leaving, receive, send, group=group)
    if traffic is not None:
        traffic.add(kind, arriving.numel() * arriving.element_size())
    return arriving.view(shape) if from_rank is not None else received
