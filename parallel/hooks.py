"""The parallel hooks of a layout; `kairos_train.model.hooks.ParallelHooks` says what each does, and has no layout.

    hook              tensor ranks                          with sequence                  context ranks
    column_linear     Megatron column layer
    row_linear        Megatron row layer, all-reduce        reduce-scatter of tokens
    mean_square       sums of squares all-reduced
    enter_heads       identity / all-reduce backward        all-gather / reduce-scatter
    enter_context     identity / all-reduce backward
    split, join                                             own tokens / all-gather
    local_frames                                                                           own frames
    exchange_frames                                                                        `exchange.frame_exchange`
    previous_tokens                                                                        `exchange.halo`
    start_recurrence                                                                       `exchange.state_passing`

The action stream has tensor ranks only: its tokens are few, and every context rank computes all of them.

Shapes: B batch, F local frames, L tokens per frame, l of them on this rank between layers, D width, W attention width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from kairos_train.basics.errors import UserError
from parallel import collectives, linear
from parallel.config import ParallelConfig
from parallel.exchange import halo, state_passing
from parallel.exchange.frame_exchange import FrameExchange
from parallel.exchange.frame_plan import Frames, plan_frames
from parallel.exchange.state_passing import Recurrence
from parallel.fp8 import Fp8Policy, make_linear
from parallel.topology import Topology, split_frames
from parallel.traffic import Traffic

TOKENS = 2
"""Dimension of a frame's tokens in (B, F, L, D)."""


@dataclass(frozen=True)
class StreamHooks:
    """`ParallelHooks` of one stream in one layout.

    Attributes:
        topology: this rank among the others.
        parallel: how states and frames are exchanged.
        fp8: which linear layers take FP8.
        stream: "video" or "action".
        sequence: whether tensor ranks split the tokens of each frame between layers.
        layer: the layer that these hooks are for; None outside of layers.
        traffic: counts the bytes that context ranks receive.
    """

    topology: Topology
    parallel: ParallelConfig
    fp8: Fp8Policy
    stream: str
    sequence: bool
    layer: int | None = None
    traffic: Traffic | None = None

    def for_layer(self, layer: int) -> StreamHooks:
        return replace(self, layer=layer)

    def column_linear(
        self, in_features: int, out_features: int, *, bias: bool = True, high_precision: bool = False
    ) -> nn.Module:
        if high_precision or not self._in_fp8():
            return linear.column_linear(in_features, out_features, bias=bias, topology=self.topology)
        local = out_features // self.topology.degrees.tensor
        return make_linear(self.fp8, in_features, local, bias=bias, group=self.topology.tensor_group)

    def row_linear(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        group = self.topology.tensor_group
        if not self._in_fp8():
            return linear.row_linear(
                in_features, out_features, bias=bias, topology=self.topology, sequence=self.sequence
            )
        complete = None
        if self.sequence:
            complete = partial(collectives.scatter_sums, dim=TOKENS, group=group)
        elif group is not None:
            complete = partial(collectives.reduce_from, group=group)
        local = in_features // self.topology.degrees.tensor
        return make_linear(self.fp8, local, out_features, bias=bias, complete=complete, group=group)

    def local_heads(self, heads: int) -> int:
        return heads // self.topology.degrees.tensor

    def mean_square(self, x: Tensor) -> Tensor:
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        total = collectives.reduce_both(x.pow(2).sum(-1, keepdim=True), self.topology.tensor_group)
        return total / (x.shape[-1] * self.topology.degrees.tensor)

    def enter_heads(self, x: Tensor) -> Tensor:
        if self.sequence:
            return collectives.gather_tokens(x, TOKENS, self.topology.tensor_group)
        return collectives.copy_to(x, self.topology.tensor_group)

    def enter_context(self, context: Tensor) -> Tensor:
        return collectives.copy_to(context, self.topology.tensor_group)

    def split_tokens(self, x: Tensor) -> Tensor:
        if not self.sequence:
            return x
        if x.shape[TOKENS] % self.topology.degrees.tensor:
            raise UserError(
                f"parallel.sequence=true: the {x.shape[TOKENS]} tokens of a frame do not divide over parallel.tensor="
                f"{self.topology.degrees.tensor} ranks; use another resolution or parallel.sequence=false"
            )
        return collectives.split_tokens(x, TOKENS, self.topology.tensor_group)

    def join_tokens(self, x: Tensor) -> Tensor:
        return collectives.join_tokens(x, TOKENS, self.topology.tensor_group) if self.sequence else x

    def local_frames(self, frames: int) -> range:
        return split_frames(frames, self.topology.degrees.context)[self.topology.context_rank]

    def exchange_frames(
        self, frames: int, reads: tuple[Frames, ...], on_all_ranks: Frames, *, period: int, hidden: int, kv: int
    ) -> FrameExchange:
        ranks, choice = self.topology.degrees.context, self.parallel.frame_layout
        plan = plan_frames(frames, reads, on_all_ranks, ranks=ranks, period=period, hidden=hidden, kv=kv, choice=choice)
        return FrameExchange(plan, self.topology.context_group, self.topology.context_rank, self.traffic)

    def previous_tokens(self, x: Tensor, count: int, tokens_per_frame: int, frames: int) -> Tensor | None:
        if self.topology.context_group is None:
            return None
        tokens = [len(local) * tokens_per_frame for local in split_frames(frames, self.topology.degrees.context)]
        return halo.previous_tokens(x, count, tokens=tokens, group=self.topology.context_group, traffic=self.traffic)

    def start_recurrence(
        self, recurrence_fn: Recurrence, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        group, method = self.topology.context_group, self.parallel.state_exchange
        if group is None:
            result = recurrence_fn(q, k, v, g, beta, state)
            return lambda: result
        exchange = {"group": group, "method": method, "traffic": self.traffic}
        return state_passing.start(recurrence_fn, q, k, v, g, beta, initial_state=state, **exchange)

    def _in_fp8(self) -> bool:
        return self.layer is not None and self.fp8.applies(self.stream, self.layer)


def video_hooks(
    topology: Topology, parallel: ParallelConfig, fp8: Fp8Policy, traffic: Traffic | None = None
) -> StreamHooks:
    """The video stream splits heads, tokens and frames, as far as the degrees say."""
    return StreamHooks(topology, parallel, fp8, "video", sequence=parallel.sequence, traffic=traffic)


def action_hooks(topology: Topology, parallel: ParallelConfig, fp8: Fp8Policy) -> StreamHooks:
    """The action stream splits heads only."""
    alone = replace(topology, degrees=replace(topology.degrees, context=1), context_rank=0, context_group=None)
    return StreamHooks(alone, parallel, fp8, "action", sequence=False)
