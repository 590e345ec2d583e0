"""Bytes on one GPU by category, as `kairos_train.training.engine.deepspeed_engine` and DeepSpeed allocate them.

n numbers of trained parameters on a tensor rank, f of frozen ones, P ranks that partition (context × data),
b bytes of a weight (2 in bf16, 4 in fp32), L = `train.stage3_max_live_parameters`:

    ZeRO stage       0 bf16     0 fp32     1 bf16     1 fp32     2            3
    weights          b(n + f)   b(n + f)   b(n + f)   b(n + f)   b(n + f)     b(n + f)/P + b·min(n + f, L)
    gradients        4n         4n         4n + 2n    4n         4n/P         4n/P
    optimizer        12n        8n         12n/P      12n/P      12n/P        12n/P
    ema              4n         4n         4n/P       4n/P       4n/P         4n/P

Gradients are accumulated in float32; stage 1 in bf16 holds all of them on every rank, and the bf16 gradients of the
last backward pass beside them. In stage 0 in fp32 the weights are the masters. Stage 3 keeps gathered weights that are
used again within L numbers, on two ranks or more.

"working" is what DeepSpeed and AdamW hold for a moment, where it is more than the activations that are gone by then:
a bucket of gradients on their way (in backward), a copy of what is reduced after it, one tensor as large as the masters
in the update.

Padding of partitions is left out (below 0.01 %), as are the CUDA context, kernels' workspaces and fragmentation: see
HEADROOM in `kairos_train.plan.search`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from kairos_train.plan.activations import activations
from kairos_train.plan.layout import Layout
from parallel.exchange.state_exchange import resolve_method

LARGEST_BUCKET = 500_000_000
"""Numbers that are reduced at once (`kairos_train.training.engine.deepspeed_engine.LARGEST_BUCKET`)."""

FLOAT = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    activations: float
    exchange: float
    working: float

    @property
    def total(self) -> float:
        """Of all categories."""
        return sum(self.categories().values())

    def categories(self) -> dict[str, float]:
        """Name → bytes."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def memory(layout: Layout, rank: int) -> Memory:
    """Bytes on a GPU of context rank `rank`."""
    live, exchanged = activations(layout, rank).device, exchange(layout, rank)
    return Memory(
        weights=weights(layout),
        gradients=gradients(layout),
        optimizer=optimizer(layout),
        ema=ema(layout),
        activations=live,
        exchange=exchanged,
        working=max(bucket(layout), max(reduction_copy(layout), update_copy(layout)) - live - exchanged),
    )


def busiest(layout: Layout) -> Memory:
    """Of the context rank that holds most."""
    return max((memory(layout, rank) for rank in range(layout.degrees.context)), key=lambda m: m.total)


def weights(layout: Layout) -> float:
    """What the model computes with."""
    numbers, ranks = layout.parameters.trained + layout.parameters.frozen, layout.gradient_ranks
    train = layout.config.train
    if train.zero_stage < 3 or ranks == 1:
        return layout.compute_bytes * numbers
    return layout.compute_bytes * (numbers / ranks + min(numbers, train.stage3_max_live_parameters))


def gradients(layout: Layout) -> float:
    """After a backward pass."""
    stage, numbers = layout.config.train.zero_stage, layout.parameters.trained
    if stage >= 2:
        return FLOAT * numbers / layout.gradient_ranks
    low = layout.compute_bytes if stage == 1 and layout.compute_bytes < FLOAT else 0
    return (FLOAT + low) * numbers


def optimizer(layout: Layout) -> float:
    """Float32 masters and two moments."""
    if layout.config.train.zero_stage == 0 and layout.compute_bytes == FLOAT:
        return 2 * FLOAT * _partition(layout)
    return 3 * FLOAT * _partition(layout)


def ema(layout: Layout) -> float:
    """The average of the masters."""
    return FLOAT * _partition(layout)


def _partition(layout: Layout) -> float:
    """Trained numbers whose masters a rank has."""
    return layout.parameters.trained / (layout.gradient_ranks if layout.config.train.zero_stage else 1)


def bucket(layout: Layout) -> float:
    """Float32 gradients on their way, while activations are there."""
    stage = layout.config.train.zero_stage
    if stage == 0 or (stage == 1 and layout.compute_bytes < FLOAT):
        return 0
    return FLOAT * min(layout.parameters.trained + layout.parameters.frozen, LARGEST_BUCKET)


def reduction_copy(layout: Layout) -> float:
    """Stages 0 and 1 in bf16 copy what they reduce once backward is over: stage 1 all of it, stage 0 by buckets."""
    stage, numbers = layout.config.train.zero_stage, layout.parameters.trained
    if stage == 1 and layout.compute_bytes < FLOAT:
        return FLOAT * numbers
    return FLOAT * min(numbers, LARGEST_BUCKET) if stage == 0 else 0


def update_copy(layout: Layout) -> float:
    """AdamW on a GPU takes the roots of all second moments at once."""
    return FLOAT * _partition(layout)


def exchange(layout: Layout, rank: int) -> float:
    """Buffers of the context group for one layer: frames sent, received and put together; states of all ranks."""
    if layout.degrees.context == 1:
        return 0
    most = 0.0
    for plan in layout.frame_plans.values():
        keys = plan.collecting.sent(rank) + plan.collecting.received(rank) + len(plan.keys[rank])
        hidden = plan.moving.sent(rank) + plan.moving.received(rank) + len(plan.queries[rank])
        moved = plan.kv_elements * keys + (plan.hidden_elements * hidden if plan.layout == "residue" else 0)
        most = max(most, layout.compute_bytes * moved)
    if "GATED" in layout.kinds:
        video, ranks = layout.model.video, layout.degrees.context
        gathered = resolve_method(layout.config.parallel.state_exchange, ranks) == "all_gather"
        maps = video.gdn_key_dim * (video.gdn_key_dim + video.gdn_value_dim)
        most = max(most, layout.heads * FLOAT * maps * (ranks + 1 if gathered else 2))
    return layout.batch * most
