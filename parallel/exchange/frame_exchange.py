"""Frames between the ranks of a context group, as a `parallel.exchange.frame_plan.FramePlan` says.

    exchange = FrameExchange(plan, group, rank)
    h = exchange.move(h)              # (B, owned, L, D) → (B, queries, L, D)
    k, v = exchange.collect(k, v)     # (B, queries, L, H, E) → (B, keys, L, H, E), both in one exchange
    o = exchange.restore(o)           # (B, queries, L, D) → (B, owned, L, D)

Each is one all-to-all of uneven parts. The backward pass sends gradients along the same lists the other way and adds
them at the owner, in float32 or wider: its own first, then in the order of the ranks, whenever they arrive.

Every rank of the group must make every call, with or without frames, and must run the backward pass of each: its loss
has to depend on the outputs, if only by an empty sum.

Shapes: B batch, n frames of a rank, L tokens per frame, H heads, E head width, D width, T tensors that travel together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.exchange.frame_plan import FramePlan, Frames, Route
from parallel.traffic import Traffic


class FrameExchange:
    """The exchanges of one layer on one rank. Cheap to make: a layer makes one per forward pass.

    Args:
        plan: the same on every rank.
        group: the context group; None with one rank.
        rank: of this process within the group.
        traffic: counts the bytes received, as kinds "frames.hidden" and "frames.keys", with ".backward" for gradients.

    Attributes:
        query_frames: the frames for which this rank computes attention.
        key_frames: the frames whose keys and values it has after `collect`.
    """

    def __init__(
        self, plan: FramePlan, group: dist.ProcessGroup | None, rank: int, traffic: Traffic | None = None
    ) -> None:
        if plan.ranks != (1 if group is None else group.size()):
            raise ValueError(f"a plan for {plan.ranks} ranks in a group of {1 if group is None else group.size()}")
        self.plan, self.group, self.rank, self.traffic = plan, group, rank, traffic
        self.query_frames: Frames = plan.queries[rank]
        self.key_frames: Frames = plan.keys[rank]

    def move(self, x: Tensor) -> Tensor:
        """Hidden states (B, owned frames, ...) to the ranks that compute them: (B, query frames, ...)."""
        (moved,) = self._exchange(self.plan.moving, "frames.hidden", x)
        return moved

    def collect(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, query frames, ...), of one shape and dtype, to their readers: (B, key frames, ...)."""
        if k.shape != v.shape or k.dtype != v.dtype:
            raise ValueError(f"keys {k.dtype} {tuple(k.shape)} and values {v.dtype} {tuple(v.shape)} travel together")
        k, v = self._exchange(self.plan.collecting, "frames.keys", k, v)
        return k, v

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `move`, for attention outputs: (B, query frames, ...) → (B, owned frames, ...)."""
        (restored,) = self._exchange(self.plan.restoring, "frames.hidden", x)
        return restored

    def _exchange(self, route: Route, kind: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        held = len(route.source[self.rank])
        if any(x.shape[1] != held for x in tensors):
            raise ValueError(f"{[tuple(x.shape) for x in tensors]}: rank {self.rank} holds {held} frames (dimension 1)")
        if route.stays:  # on all ranks alike, so no rank waits
            return tensors
        return _Exchange.apply(_Leg(route, self.group, self.rank, self.traffic, kind), *tensors)


class _Exchange(torch.autograd.Function):
    """Tensors (B, n, ...) along a route; gradients back along it."""

    @staticmethod
    def forward(ctx: Any, leg: _Leg, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.leg = leg
        return leg.deliver(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.leg.give_back(gradients))


@dataclass(frozen=True)
class _Leg:
    """One rank's part in one exchange."""

    route: Route
    group: dist.ProcessGroup
    rank: int
    traffic: Traffic | None
    kind: str

    def deliver(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(B, held, ...) → (B, needed, ...)."""
        send, receive = self.route.send[self.rank], self.route.receive[self.rank]
        arrived = self._all_to_all(tensors, send, receive, self.kind)
        source, target = self.route.kept[self.rank]
        needed = len(self.route.target[self.rank])
        outputs = tuple(x.new_empty(x.shape[0], needed, *x.shape[2:]) for x in tensors)
        for t, (x, out) in enumerate(zip(tensors, outputs, strict=True)):
            if source:
                out[:, _index(target, x.device)] = x[:, _index(source, x.device)]
            for part, index in _parts(receive, x.device):
                out[:, index] = arrived[part, t].transpose(0, 1)
        return outputs

    def give_back(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(B, needed, ...) → (B, held, ...)."""
        send, receive = self.route.send[self.rank], self.route.receive[self.rank]
        returned = self._all_to_all(gradients, receive, send, f"{self.kind}.backward")
        source, target = self.route.kept[self.rank]
        held = len(self.route.source[self.rank])
        sums = []
        for t, gradient in enumerate(gradients):
            wide = torch.promote_types(gradient.dtype, torch.float32) if self.route.replicates else gradient.dtype
            total = gradient.new_zeros(gradient.shape[0], held, *gradient.shape[2:], dtype=wide)
            if source:
                total[:, _index(source, total.device)] = gradient[:, _index(target, total.device)].to(wide)
            add_returned(total, returned[:, t], send)
            sums.append(total.to(gradient.dtype))
        return tuple(sums)

    def _all_to_all(
        self, tensors: tuple[Tensor, ...], send: tuple[Frames, ...], receive: tuple[Frames, ...], kind: str
    ) -> Tensor:
        """Frames at positions send[peer] to each peer; returns (all received, T, B, ...), peer after peer."""
        first = tensors[0]
        counts_out, counts_in = [len(p) for p in send], [len(p) for p in receive]
        outgoing = first.new_empty(sum(counts_out), len(tensors), first.shape[0], *first.shape[2:])
        for t, x in enumerate(tensors):
            for part, index in _parts(send, x.device):
                outgoing[part, t] = x[:, index].transpose(0, 1)
        incoming = outgoing.new_empty(sum(counts_in), *outgoing.shape[1:])
        dist.all_to_all_single(incoming, outgoing, counts_in, counts_out, group=self.group)
        if self.traffic is not None:
            self.traffic.add(kind, incoming.numel() * incoming.element_size())
        return incoming


def add_returned(total: Tensor, returned: Tensor, send: tuple[Frames, ...]) -> None:
    """Add returned gradients (n, B, ...) of frames send[peer] to total (B, held, ...), in the order of the peers."""
    for part, index in _parts(send, total.device):
        total[:, index] += returned[part].transpose(0, 1)


def _parts(lists: tuple[Frames, ...], device: torch.device) -> Iterator[tuple[slice, slice | Tensor]]:
    """Of each peer that has any: where its frames are in the buffer, and their positions in a rank's own frames."""
    begin = 0
    for frames in lists:
        if frames:
            yield slice(begin, begin + len(frames)), _index(frames, device)
        begin += len(frames)


@lru_cache(maxsize=4096)
def _index(frames: Frames, device: torch.device) -> slice | Tensor:
    """Evenly spaced positions as a slice: a plain copy, and no index tensor on the device."""
    step = frames[1] - frames[0] if len(frames) > 1 else 1
    if frames == tuple(range(frames[0], frames[-1] + 1, step)):
        return slice(frames[0], frames[-1] + 1, step)
    return torch.tensor(frames, device=device)
