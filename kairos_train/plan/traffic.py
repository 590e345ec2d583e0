"""Bytes that a rank receives in one optimiser step, by group.

    all-reduce of s bytes over R ranks        2·(R − 1)/R·s
    all-gather, reduce-scatter of s in all      (R − 1)/R·s

tensor    every layer enters a part that is split by heads or channels three times (self-attention or GATED,
          cross-attention, FFN) and leaves it three times. Each way in is free forward and an all-reduce of the residual
          stream backward, each way out an all-reduce forward and free backward. Under sequence parallelism these are
          all-gathers and reduce-scatters of the same bytes. Norms of q and k reduce one float32 per token both ways.
context   Gated DeltaNet layers: states (ring (K·V)·H, all_gather (N − 1)·(K + V)·K·H forward and (N − 1)·K·V·H
          backward, in float32) and the halo of the convolutions. Windowed layers: frames as `exchange.frame_plan`
          counts them.
data      gradients in float32 over context × data: an all-reduce, once a step (ZeRO 0, 1) or per micro-batch (2);
          updated weights back (1, 2). Stage 3: weights for forward and backward, and a reduce-scatter, per micro-batch.

Recomputed layers communicate again what belongs to their forward pass; `selective` keeps states, not frames.

Shapes: B samples, F frames of a rank, L tokens per frame, A actions, D width, H heads, K and V key and value width,
N context ranks, R ranks of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

from kairos_train.plan.layout import Layout
from parallel.exchange.state_exchange import resolve_method

FLOAT = 4


@dataclass(frozen=True)
class Received:
    """Bytes of one optimiser step on one rank.

    Attributes:
        tensor, context, data: by group.
        gathered_weights: of `data`, what ZeRO stage 3 fetches while it computes.
    """

    tensor: float
    context: float
    data: float
    gathered_weights: float

    @property
    def by_group(self) -> dict[str, float]:
        return {"tensor": self.tensor, "context": self.context, "data": self.data}


def received(layout: Layout, rank: int) -> Received:
    """What context rank `rank` receives."""
    micro_batches, gathered = layout.config.train.accumulation, _gathered_weights(layout)
    return Received(
        tensor=micro_batches * tensor(layout, rank),
        context=micro_batches * context(layout, rank),
        data=gathered + _gradients(layout),
        gathered_weights=gathered,
    )


def all_reduce(size: float, ranks: int) -> float:
    return 2 * share_of_others(size, ranks)


def share_of_others(size: float, ranks: int) -> float:
    """What an all-gather or a reduce-scatter brings, of `size` bytes in all."""
    return size * (ranks - 1) / ranks


def passes(layout: Layout) -> int:
    """Forward passes of a layer."""
    return 1 if layout.config.train.recompute == "none" else 2


# --- tensor ranks ---


def tensor(layout: Layout, rank: int) -> float:
    """Of one micro-batch."""
    ranks, sample, model, c = layout.degrees.tensor, layout.sample, layout.model, layout.compute_bytes
    if ranks == 1:
        return 0.0
    tokens = layout.frames_per_rank[rank] * sample.tokens
    total = sum(_layer(layout, kind, _queries(layout, kind, rank), tokens, model.video.dim) for kind in layout.kinds)
    widths = [model.video.dim]
    if sample.actions:
        total += model.num_layers * _layer(layout, "FA", sample.actions, sample.actions, model.action.dim)
        widths.append(model.action.dim)
    total += sum(all_reduce(c * sample.all_context * dim, ranks) for dim in widths)  # gradients of embedded contexts
    if layout.config.parallel.sequence:
        patch = model.video.latent_channels * model.video.patch_size[1] * model.video.patch_size[2]
        total += share_of_others(c * tokens * (model.video.dim + patch), ranks)  # after the patches, after the head
    partial = all_reduce(FLOAT * layout.parameters.partial, ranks)
    return layout.batch * total + partial


def _layer(layout: Layout, kind: str, queries: int, tokens: int, dim: int) -> float:
    """One layer, forward and backward, where self-attention computes `queries` tokens."""
    residual = layout.compute_bytes * dim * (queries + 2 * tokens)
    norms = FLOAT * ((0 if kind == "GATED" else 2 * queries) + tokens + layout.sample.all_context)
    return all_reduce((passes(layout) + 1) * (residual + norms), layout.degrees.tensor)


def _queries(layout: Layout, kind: str, rank: int) -> int:
    if kind == "GATED":
        return layout.frames_per_rank[rank] * layout.sample.tokens
    return len(layout.frame_plans[kind].queries[rank]) * layout.sample.tokens


# --- context ranks ---


def context(layout: Layout, rank: int) -> float:
    """Of one micro-batch."""
    if layout.degrees.context == 1:
        return 0.0
    return sum((_states(layout, rank) if kind == "GATED" else _frames(layout, kind, rank)) for kind in layout.kinds)


def _frames(layout: Layout, kind: str, rank: int) -> float:
    """Hidden states, keys and values of one windowed layer; their gradients."""
    plan = layout.frame_plans[kind]
    elements = passes(layout) * plan.received(rank) + plan.returned(rank)
    return layout.batch * layout.compute_bytes * elements


def _states(layout: Layout, rank: int) -> float:
    """States and halo of one Gated DeltaNet layer; their gradients."""
    video, ranks, held = layout.model.video, layout.degrees.context, layout.frames_per_rank
    key, value = video.gdn_key_dim, video.gdn_value_dim
    if resolve_method(layout.config.parallel.state_exchange, ranks) == "all_gather":
        forward, backward = (ranks - 1) * (key + value) * key, (ranks - 1) * key * value
    else:  # one state from the rank before, one gradient from the rank after
        forward, backward = key * value * (rank > 0), key * value * (rank < ranks - 1)
    replayed = 1 if layout.config.train.recompute == "block" else 0
    states = FLOAT * layout.heads * ((1 + replayed) * forward + backward)
    halo = layout.compute_bytes * (video.gdn_conv_size - 1) * video.dim
    before, after = held[rank] > 0 and rank > 0, rank + 1 < ranks and held[rank + 1] > 0
    return layout.batch * (states + halo * (passes(layout) * before + after))


# --- context × data ranks ---


def _gathered_weights(layout: Layout) -> float:
    """Stage 3: weights for forward and for backward of every micro-batch of a step.

    Those that are used again within `train.stage3_max_live_parameters` numbers stay: where forward turns into backward
    and the other way round.
    """
    train = layout.config.train
    if train.zero_stage < 3:
        return 0.0
    numbers = layout.parameters.trained + layout.parameters.frozen
    turns = 2 * train.accumulation - 1
    fetched = numbers + turns * (numbers - min(numbers, train.stage3_max_live_parameters // 2))
    return share_of_others(layout.compute_bytes * fetched, layout.gradient_ranks)


def _gradients(layout: Layout) -> float:
    """Gradients of a step, and weights after its update."""
    train, ranks, numbers = layout.config.train, layout.gradient_ranks, layout.parameters.trained
    updated = share_of_others(layout.compute_bytes * numbers, ranks)
    return {
        0: all_reduce(FLOAT * numbers, ranks),
        1: all_reduce(FLOAT * numbers, ranks) + updated,
        2: train.accumulation * all_reduce(FLOAT * numbers, ranks) + updated,
        3: train.accumulation * share_of_others(FLOAT * numbers, ranks),
    }[train.zero_stage]
