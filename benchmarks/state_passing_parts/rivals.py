"""The Gated DeltaNet layer over context ranks in three ways: state passing, head all-to-all, chunk broadcast; and their
bytes.

`StatePassing` and `HeadAllToAll` are parallel hooks of the same `GatedDeltaNet`, differentiable. `broadcast_chunks` is
what the public Kairos v1 code does, forward only as there: every rank computes its heads of all tokens, chunk by chunk.

Shapes: B batch, S tokens of this rank, T of all, H heads, h of them on a rank, K key width, V value width, D width, N
ranks. Chunk: the tokens of one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kairos_train.model.gated_delta_net import GatedDeltaNet
from kairos_train.model.hooks import Recurrence, SingleDevice
from kairos_train.model.kernels.delta_rule import gated_delta_rule
from parallel.exchange import halo, state_passing
from parallel.traffic import Traffic

GATE_BY_HEADS_FROM = 5
"""Kairos v1 computes the output gate by heads, and moves it too, in groups of more than 4."""


@dataclass(frozen=True)
class Sizes:
    """Of a Gated DeltaNet layer; `item` bytes per number of activations. States, decays and write strengths take 4."""

    dim: int = 2560
    heads: int = 20
    key_dim: int = 256
    value_dim: int = 512
    conv_size: int = 4
    item: int = 2

    def build(self, hooks: SingleDevice) -> GatedDeltaNet:
        return GatedDeltaNet(
            dim=self.dim,
            heads=self.heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            conv_size=self.conv_size,
            eps=1e-6,
            hooks=hooks,
            backend="torch",
        )


# ---------------------------------------------------------------- bytes received per rank, layer and direction


def state_bytes(sizes: Sizes) -> int:
    """B, and so C, S or D: H·K·V numbers."""
    return 4 * sizes.heads * sizes.key_dim * sizes.value_dim


def transition_bytes(sizes: Sizes) -> int:
    """A: H·K·K numbers."""
    return 4 * sizes.heads * sizes.key_dim**2


def ring_bytes(sizes: Sizes, ranks: int) -> int:
    """One state, either direction; nothing on the rank where the ring begins."""
    return state_bytes(sizes)


def all_gather_bytes(sizes: Sizes, ranks: int) -> int:
    """(N − 1)·(A + B) forward."""
    return (ranks - 1) * (transition_bytes(sizes) + state_bytes(sizes))


def all_gather_backward_bytes(sizes: Sizes, ranks: int) -> int:
    """(N − 1)·C: every A is known."""
    return (ranks - 1) * state_bytes(sizes)


def all_to_all_bytes(sizes: Sizes, tokens: int, ranks: int) -> float:
    """q, k, v, o in activations and g, β in float32 of T/N tokens, but for the own share of the heads."""
    per_token = sizes.heads * (sizes.item * 2 * (sizes.key_dim + sizes.value_dim) + 4 * 2)
    return tokens / ranks * (ranks - 1) / ranks * per_token


def broadcast_bytes(sizes: Sizes, tokens: int, ranks: int) -> float:
    """Others' hidden chunks; o (and the gate, beyond 4 ranks) by heads of T/N tokens; the output of its chunk."""
    by_heads = sizes.heads * sizes.value_dim * (1 if ranks < GATE_BY_HEADS_FROM else 2)
    numbers = tokens * (ranks - 1) / ranks * (2 * sizes.dim + by_heads / ranks)
    return sizes.item * numbers


# ---------------------------------------------------------------- state passing


class StatePassing(SingleDevice):
    """Shards of `tokens` per rank; S of this rank is among them."""

    def __init__(self, tokens: list[int], group: dist.ProcessGroup, method: str, traffic: Traffic | None) -> None:
        self.tokens, self.group, self.method, self.traffic = tokens, group, method, traffic

    def previous_tokens(self, x: Tensor, count: int, tokens_per_frame: int, frames: int) -> Tensor:
        return halo.previous_tokens(x, count, tokens=self.tokens, group=self.group, traffic=self.traffic)

    def start_recurrence(
        self, recurrence_fn: Recurrence, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        named: dict[str, Any] = {"group": self.group, "method": self.method, "traffic": self.traffic}
        return state_passing.start(recurrence_fn, q, k, v, g, beta, initial_state=state, **named)


# ---------------------------------------------------------------- head all-to-all (Ulysses)


class HeadAllToAll(StatePassing):
    """All tokens of H/N heads on every rank: q, k, v, g, β there, o back. Even shards; N divides H."""

    def start_recurrence(
        self, recurrence_fn: Recurrence, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        inputs = (q, k, v, g[..., None], beta[..., None])
        q, k, v, g, beta = (_ToHeads.apply(x, self.group, self.traffic) for x in inputs)
        outputs, state = recurrence_fn(q, k, v, g.squeeze(-1), beta.squeeze(-1), state)
        outputs = _ToTokens.apply(outputs, self.group, self.traffic)
        return lambda: (outputs, state)


class _ToHeads(torch.autograd.Function):
    """(B, S, H, ·) → (B, T, H/N, ·); backward the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, traffic: Traffic | None) -> Tensor:
        ctx.group, ctx.traffic = group, traffic
        return to_heads(x, group, "heads", traffic)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return to_tokens(gradient, ctx.group, "heads.backward", ctx.traffic), None, None


class _ToTokens(torch.autograd.Function):
    """(B, T, H/N, ·) → (B, S, H, ·); backward the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, traffic: Traffic | None) -> Tensor:
        ctx.group, ctx.traffic = group, traffic
        return to_tokens(x, group, "heads", traffic)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return to_heads(gradient, ctx.group, "heads.backward", ctx.traffic), None, None


def to_heads(x: Tensor, group: dist.ProcessGroup, kind: str, traffic: Traffic | None) -> Tensor:
    """(B, S, H, ·) → (B, T, H/N, ·)."""
    parts = x.unflatten(2, (group.size(), -1)).movedim(2, 0).contiguous()  # N B S h ·
    return _all_to_all(parts, group, kind, traffic).movedim(0, 1).flatten(1, 2)


def to_tokens(x: Tensor, group: dist.ProcessGroup, kind: str, traffic: Traffic | None) -> Tensor:
    """(B, T, H/N, ·) → (B, S, H, ·)."""
    parts = x.unflatten(1, (group.size(), -1)).movedim(1, 0).contiguous()  # N B S h ·
    return _all_to_all(parts, group, kind, traffic).movedim(0, 2).flatten(2, 3)


def _all_to_all(parts: Tensor, group: dist.ProcessGroup, kind: str, traffic: Traffic | None) -> Tensor:
    received, even = torch.empty_like(parts), [1] * group.size()
    dist.all_to_all_single(received, parts, even, even, group=group)
    if traffic is not None:
        traffic.add(kind, received[1:].numel() * received.element_size())  # but for the part that stayed
    return received


# ---------------------------------------------------------------- chunk broadcast (public Kairos v1)


@torch.no_grad()
def broadcast_chunks(layer: GatedDeltaNet, x: Tensor, group: dist.ProcessGroup, traffic: Traffic | None) -> Tensor:
    """The layer's output (B, S, D) for x (B, S, D): every rank's chunk in turn goes through the heads of all ranks.

    Even shards; N divides H and S. `layer` is whole on every rank.
    """
    heads = layer.heads // group.size()
    mine = slice(group.rank() * heads, (group.rank() + 1) * heads)
    carried, state, output = {}, None, None
    for owner in range(group.size()):
        chunk = x.clone() if owner == group.rank() else torch.empty_like(x)
        dist.broadcast(chunk, group=group, group_src=owner)
        if owner != group.rank():
            _report(traffic, "chunks", chunk)
        q = layer._unit(_project(layer, "q", chunk, carried, mine, layer.key_dim)) * layer.key_dim**-0.5
        k = layer._unit(_project(layer, "k", chunk, carried, mine, layer.key_dim))
        v = _project(layer, "v", chunk, carried, mine, layer.value_dim)
        g, beta = layer.log_decay(chunk)[..., mine], layer.b_proj(chunk).sigmoid()[..., mine]
        o, state = gated_delta_rule(q, k, v, g, beta, state)
        o = to_tokens(o, group, "chunks", traffic)  # B S/N H V
        piece = chunk.shape[1] // group.size()
        part = chunk[:, group.rank() * piece : (group.rank() + 1) * piece]
        gate = F.silu(layer.g_proj(part)).unflatten(-1, (layer.heads, layer.value_dim))
        done = layer.o_proj((layer.o_norm(o) * gate).flatten(2)).contiguous()
        pieces = [torch.empty_like(done) for _ in range(group.size())]
        dist.all_gather(pieces, done, group=group)  # every rank gets it, as there; its owner needs it
        _report(traffic, "chunks", *pieces[1:])
        if owner == group.rank():
            output = torch.cat(pieces, dim=1)
    return output


def _project(
    layer: GatedDeltaNet, name: str, chunk: Tensor, carried: dict[str, Tensor], heads: slice, width: int
) -> Tensor:
    """Projection and convolution of some heads; `carried` keeps the last projected tokens for the next chunk."""
    channels = slice(heads.start * width, heads.stop * width)
    projected = F.linear(chunk, getattr(layer, f"{name}_proj").weight[channels])
    taps = getattr(layer, f"{name}_conv1d").weight[channels, 0]
    size = taps.shape[-1]
    before = carried.get(name, projected.new_zeros(chunk.shape[0], size - 1, projected.shape[-1]))
    padded = torch.cat([before, projected], dim=1)
    carried[name] = padded[:, -(size - 1) :]
    y = sum(padded[:, i : i + chunk.shape[1]] * taps[:, i] for i in range(size))
    return F.silu(y).unflatten(-1, (-1, width))


def _report(traffic: Traffic | None, kind: str, *received: Tensor) -> None:
    if traffic is not None:
        traffic.add(kind, sum(x.numel() * x.element_size() for x in received))
