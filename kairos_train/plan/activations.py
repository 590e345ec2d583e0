"""What autograd keeps of a micro-batch for the backward pass, operation by operation, linear in tokens.

Each term names the operation that saves it and the region whose tokens it counts (under sequence parallelism tensor
ranks share a frame's tokens between layers, and hold all of them inside):

    between   l·F      residual stream: norms, modulations, gates             width D
    inside    L·F      linear inputs, heads, FFN channels of this rank        widths W, FFN/ranks, H·K, H·V
    windows   L·Fq     queries of self-attention; keys as gathered windows copy them

c is 2 bytes in bf16 and 4 in fp32. `upcast` makes a float32 copy of a bf16 tensor at each use and none of a float32
one, so that n uses keep 4·n bytes in bf16 and 4 in fp32: `wide(n)`.

Counted are storages, once each. What lives only while a layer runs is TRANSIENT. The measured peak of forward and
backward is within 15 % (tests/unit/plan/test_plan_memory.py).

Shapes: B batch, F frames of this rank, Fq frames whose queries it computes, L tokens per frame, l between layers,
A actions, N context tokens, D width, W attention width, H heads, K and V key and value width, C tokens per chunk.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from kairos_train.model.kernels.delta_rule import CHUNK
from kairos_train.plan.layout import Layout
from parallel.exchange.state_exchange import resolve_method

TRANSIENT = 12
"""Bytes per token and channel beside what is saved: three float32 tensors, where backward begins."""

RESCAN = 1.4
"""What the second scan of a Gated DeltaNet layer holds, over what its graph saves: gradients on their way through
it."""

TORCH_RULE = {"K": 5, "V": 2, "C": 9}
"""Float32 numbers that the plain torch recurrence keeps per token and head: this many times K, V and C.

K: k in two products, q and k decayed, W. V: v and the new values. C: scores, inverse and decays of a chunk."""

FULL_PRECISION = 4


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank.

    Attributes:
        device: at the worst moment of forward and backward.
        host: in host memory, with `train.offload_activations`.
    """

    device: float
    host: float


def activations(layout: Layout, rank: int) -> Activations:
    """Bytes that a micro-batch keeps on context rank `rank`, with `train.recompute` and offloading as configured."""
    train, layers = layout.config.train, Counter(layout.kinds)
    each = {kind: _video_layer(layout, kind, rank) for kind in layers}
    saved, largest = sum(n * each[kind] for kind, n in layers.items()), max(each.values())
    inputs = layers.total() * _video_input(layout, rank)
    kept = sum(n * _video_kept(layout, kind, rank) for kind, n in layers.items())
    if layout.sample.actions:
        saved += sum(n * _action_layer(layout, kind) for kind, n in layers.items())
        inputs += sum(n * _action_input(layout, kind) for kind, n in layers.items())
        kept += layers.total() * _attention_results(layout, layout.sample.actions, 2)
        largest = max(largest, *(_action_layer(layout, kind) for kind in layers))
    held = {"none": saved, "block": inputs, "selective": inputs + kept}[train.recompute]
    around = _outside(layout, rank) + _transient(layout, rank)
    if train.offload_activations:
        return Activations(device=layout.batch * (largest + around), host=layout.batch * held)
    again = 0.0 if train.recompute == "none" else largest  # one layer at a time
    return Activations(device=layout.batch * (held + again + around), host=0.0)


def wide(layout: Layout, uses: int) -> int:
    """Bytes per number that `uses` float32 readers of one tensor keep."""
    return FULL_PRECISION * uses if layout.compute_bytes < FULL_PRECISION else FULL_PRECISION


# --- one layer, of one sample ---


def _video_layer(layout: Layout, kind: str, rank: int) -> float:
    video, frames = layout.model.video, layout.frames_per_rank[rank]
    between, inside = frames * layout.tokens_between_layers, frames * layout.sample.tokens
    own = _gated(layout, rank, inside) if kind == "GATED" else _windowed(layout, kind, rank)
    return (
        between * _residual(layout, video.dim)
        + own
        + _cross_attention(layout, video.dim, inside)
        + _ffn(layout, video.dim, layout.ffn_width(video), inside)
    )


def _action_layer(layout: Layout, kind: str) -> float:
    action, sample, c = layout.model.action, layout.sample, layout.compute_bytes
    tokens, width = sample.actions, layout.attention_width
    history = 0 if kind == "GATED" else sample.history * sample.tokens
    return (
        tokens * _residual(layout, action.dim)
        + tokens * _projections(layout, action.dim)
        + (tokens + 2 * (tokens + history)) * c * width  # q; k and v behind the history's
        + _attention_results(layout, tokens, 1)
        + _cross_attention(layout, action.dim, tokens)
        + _ffn(layout, action.dim, layout.ffn_width(action), tokens)
    )


def _residual(layout: Layout, dim: int) -> float:
    """Per token between layers: three norms, two modulations, two gates."""
    norms = 3 * wide(layout, 1) * dim  # each norm's input in float32
    modulated = 2 * FULL_PRECISION * dim  # normalised tokens, times 1 + scale
    gated = 2 * layout.compute_bytes * dim  # outputs of self-attention and FFN, times their gates
    return norms + modulated + gated


def _projections(layout: Layout, dim: int) -> float:
    """Per token: the input of q, k, v, and what the norms of q and k keep."""
    return layout.compute_bytes * dim + 2 * _full_width_norm(layout)


def _full_width_norm(layout: Layout) -> float:
    """Per token: x for its mean square and for the product, and the product before the weight."""
    return (wide(layout, 2) + FULL_PRECISION) * layout.attention_width


def _windowed(layout: Layout, kind: str, rank: int) -> float:
    """Self-attention within windows: projections, queries, gathered keys and values, outputs."""
    plan, c, width = layout.frame_plans[kind], layout.compute_bytes, layout.attention_width
    tokens = layout.sample.tokens
    queries, copied = len(plan.queries[rank]) * tokens, layout.copied_frames(kind, rank)
    if layout.config.kernels.attention in ("flex", "dense") or copied is None:
        keys, outputs = 2 * len(plan.keys[rank]) * tokens, 1
    else:
        keys, outputs = 2 * copied * tokens, 2  # outputs of each window, and put in order for the o projection
    attention = (queries * (1 + outputs) + keys) * c * width + FULL_PRECISION * layout.heads * queries
    return queries * _projections(layout, layout.model.video.dim) + attention


def _gated(layout: Layout, rank: int, tokens: int) -> float:
    """Gated DeltaNet: convolutions, unit vectors, the rule, the gated norm, the o projection."""
    video, c = layout.model.video, layout.compute_bytes
    keys, values = layout.heads * video.gdn_key_dim, layout.heads * video.gdn_value_dim
    per_token = (
        c * video.dim  # input of the six projections
        + c * (2 * keys + values)  # inputs of the convolutions
        + 2 * wide(layout, 1) * keys  # q and k before they are made unit vectors
        + 6 * FULL_PRECISION * layout.heads  # β, the decay's parts, reciprocal norms
    )
    own = tokens * (per_token + _behind_the_rule(layout))
    return own + (_passed_rule if layout.degrees.context > 1 else _rule)(layout, rank, tokens)


def _behind_the_rule(layout: Layout) -> float:
    """Per token of a Gated DeltaNet layer: the gated norm and the o projection."""
    values = layout.heads * layout.model.video.gdn_value_dim
    gated = 2 * wide(layout, 1) + 3 * FULL_PRECISION  # outputs of g_proj and the rule; normalised; both factors
    return (gated + layout.compute_bytes) * values


def _rule(layout: Layout, rank: int, tokens: int) -> float:
    """The recurrence where nothing is passed between ranks, by `kernels.gated_delta`.

    fla (kernels of a GPU) keeps q, k, v, the running decay, β and the inverse of each chunk (C columns per token), and
    computes the rest again. Plain torch keeps every product in float32, and one state per chunk.
    """
    video, c, heads = layout.model.video, layout.compute_bytes, layout.heads
    key, value = video.gdn_key_dim, video.gdn_value_dim
    on_cpu = layout.config.train.device == "cpu"
    if layout.config.kernels.gated_delta == "torch" or on_cpu:
        products = TORCH_RULE["K"] * key + TORCH_RULE["V"] * value + TORCH_RULE["C"] * CHUNK + key * value / CHUNK
        return tokens * heads * FULL_PRECISION * products
    return tokens * heads * (c * (2 * key + value + CHUNK) + 2 * FULL_PRECISION)


def _passed_rule(layout: Layout, rank: int, tokens: int) -> float:
    """The recurrence between context ranks (`parallel.exchange.state_passing`): its inputs, P, states and maps."""
    video, c, heads = layout.model.video, layout.compute_bytes, layout.heads
    key, value, ranks = video.gdn_key_dim, video.gdn_value_dim, layout.degrees.context
    inputs = tokens * heads * (c * (2 * key + value) + 2 * FULL_PRECISION)
    if resolve_method(layout.config.parallel.state_exchange, ranks) == "serial":
        return inputs + _rule(layout, rank, tokens)
    reads = tokens * heads * c * key if rank else 0
    return inputs + reads + _maps(layout, rank)


def _maps(layout: Layout, rank: int) -> float:
    """S_in, A and, when gathered, the A of later ranks."""
    video, ranks = layout.model.video, layout.degrees.context
    method = resolve_method(layout.config.parallel.state_exchange, ranks)
    later = ranks - 1 - rank if method == "all_gather" else 0
    key, value = video.gdn_key_dim, video.gdn_value_dim
    return layout.heads * FULL_PRECISION * (key * value + (1 + later) * key * key)


def _cross_attention(layout: Layout, dim: int, tokens: int) -> float:
    """Queries of the tokens, keys and values of the context."""
    c, width, context = layout.compute_bytes, layout.attention_width, layout.sample.all_context
    queries = tokens * (c * dim + _full_width_norm(layout) + c * width) + _attention_results(layout, tokens, 1)
    return queries + context * (_full_width_norm(layout) + 2 * c * width)


def _attention_results(layout: Layout, tokens: int, calls: int) -> float:
    """Outputs of attention and the logarithm of its denominator."""
    return calls * tokens * (layout.compute_bytes * layout.attention_width + FULL_PRECISION * layout.heads)


def _ffn(layout: Layout, dim: int, hidden: int, tokens: int) -> float:
    """Inputs of the first layer, of SiLU and of the second layer."""
    return tokens * layout.compute_bytes * (dim + 2 * hidden)


# --- recomputation ---


def _video_input(layout: Layout, rank: int) -> float:
    tokens = layout.frames_per_rank[rank] * layout.tokens_between_layers
    return tokens * layout.compute_bytes * layout.model.video.dim


def _action_input(layout: Layout, kind: str) -> float:
    """The action tokens, and at joint layers the keys and values of the history."""
    sample, c = layout.sample, layout.compute_bytes
    history = 0 if kind == "GATED" else sample.history * sample.tokens
    return c * (sample.actions * layout.model.action.dim + 2 * history * layout.attention_width)


def _video_kept(layout: Layout, kind: str, rank: int) -> float:
    """What `selective` keeps besides: attention outputs, and states that came from other ranks."""
    inside = layout.frames_per_rank[rank] * layout.sample.tokens
    cross = _attention_results(layout, inside, 1)
    if kind == "GATED":
        return cross + (_maps(layout, rank) if layout.degrees.context > 1 else 0)
    queries = len(layout.frame_plans[kind].queries[rank]) * layout.sample.tokens
    return cross + _attention_results(layout, queries, 1)


# --- around the layers ---


def _outside(layout: Layout, rank: int) -> float:
    """Embeddings, head, rotary tables, the loss; of one sample."""
    video, frames, c = layout.model.video, layout.frames_per_rank[rank], layout.compute_bytes
    between, inside = frames * layout.tokens_between_layers, frames * layout.sample.tokens
    patch = video.latent_channels * video.patch_size[0] * video.patch_size[1] * video.patch_size[2]
    head = between * (wide(layout, 1) + FULL_PRECISION + c) * video.dim  # norm, modulation, linear input
    tables = 2 * FULL_PRECISION * inside * video.dim // layout.model.num_heads // 2
    outputs = inside * patch * (c + 2 * FULL_PRECISION)  # patches; velocity and its error in float32
    times = FULL_PRECISION * frames * 10 * video.dim
    streams = [video.dim] + ([layout.model.action.dim] if layout.sample.actions else [])
    texts = sum(2 * c * layout.sample.all_context * (layout.model.text_dim + dim) for dim in streams)
    # The timestep MLPs read float32 copies of bf16 weights: D² and 6·D².
    copies = sum(FULL_PRECISION * 7 * dim * dim for dim in streams) if c < FULL_PRECISION else 0
    return head + tables + outputs + times + texts + copies / layout.batch


def _transient(layout: Layout, rank: int) -> float:
    """Beside what is saved, at the worst moment: where backward begins, or where a Gated DeltaNet layer scans once
    more.

    That is after the parts of the layer behind its recurrence are gone.
    """
    video, inside = layout.model.video, layout.frames_per_rank[rank] * layout.sample.tokens
    begin = TRANSIENT * inside * video.dim
    if layout.degrees.context == 1 or "GATED" not in layout.kinds:
        return begin
    gone = _cross_attention(layout, video.dim, inside) + _ffn(layout, video.dim, layout.ffn_width(video), inside)
    return max(begin, RESCAN * _rule(layout, rank, inside) - gone - inside * _behind_the_rule(layout))
