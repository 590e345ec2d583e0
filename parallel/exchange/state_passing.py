"""State passing: the gated delta rule over a sequence in contiguous shards, one per context rank.

One call of the local recurrence on values [v, 0] from the state [0, I] gives everything that does not depend on other
ranks: its value columns are independent, so that outputs are [o_base, P] and the final state is [B, A] with
    o_t = o_base_t + P_t S_in,    S_out = A S_in + B.
Ranks exchange A and B (`parallel.exchange.state_exchange`), not activations; the exchange gives S_in.

Backward: C = Pᵀ do needs no scan; the exchange the other way gives D, the gradient of S_out; then one ordinary local
backward with cotangents (do, D) from the initial state S_in. No gradient flows through A or P.

Backward keeps q, k, v, g, β, P, S_in, A, and when gathered the A of later ranks. It runs the local scan once more:
keeping its graph instead would hold some 15 times v, and going back through a graph of the call with extra columns
costs as much (1.5 times the columns) as running the plain one again. P is as large as q, and so is kept.
The first rank needs neither A nor P (its incoming state is the initial state); an empty shard is the identity map.

Every rank makes every call, with or without tokens, and runs backward for each: its loss has to depend on the outputs,
if only by an empty sum.

Shapes: B batch, S tokens of this rank, H heads, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.exchange import state_exchange
from parallel.traffic import Traffic

Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""The local recurrence: (q, k, v, g, beta, initial_state) → (outputs, final state), differentiable, any value width."""


def start(
    recurrence_fn: Recurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    group: dist.ProcessGroup,
    method: str = "auto",
    traffic: Traffic | None = None,
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Begin the recurrence over the whole sequence, of which this rank holds S tokens (0 is allowed).

    On CUDA the exchange runs on a stream of its own: kernels launched between this call and the call of its result
    overlap with it, and so do their gradients in backward. On a CPU the exchange runs within this call.

    Args:
        recurrence_fn: the local recurrence.
        q: queries (B, S, H, K), normalised and scaled.
        k: keys (B, S, H, K), normalised.
        v: values (B, S, H, V).
        g: log decays (B, S, H), float32 or wider. A neutral (padding) token has g = 0 and beta = 0.
        beta: write strengths (B, S, H).
        initial_state: state before the whole sequence (B, H, K, V), float32 or wider; zeros when None. Only the first
            rank reads it, and has its gradient.
        group: the context group, in sequence order.
        method: how states travel: "auto", "serial", "ring" or "all_gather" (`parallel.exchange.state_exchange`).
        traffic: counts the bytes received, as "states" and "states.backward".

    Returns:
        A function that waits for (outputs (B, S, H, V) in v's dtype, state after this rank's tokens (B, H, K, V) in
        float32 or float64).
    """
    method = state_exchange.resolve_method(method, group.size())
    first = group.rank() == 0
    state_dtype = torch.promote_types(v.dtype, torch.float32)
    if first and initial_state is None:
        initial_state = v.new_zeros(_state_shape(q, v), dtype=state_dtype)
    elif not first:
        initial_state = None
    if method == "serial":
        return _serial(recurrence_fn, (q, k, v, g, beta), initial_state, group, traffic)

    call = _Call(recurrence_fn, group, method, traffic)
    base, reads, transition, own = _LocalMap.apply(call, q, k, v, g, beta, initial_state)
    # Detached: gradients go through `_Compose`. (Operators without a derivative refuse to be asked for one.)
    a, b = transition.detach(), own.detach()
    exchange = _Behind(lambda: state_exchange.receive_state(a, b, group, method, traffic), a, b)

    def finish() -> tuple[Tensor, Tensor]:
        state_in, later = exchange.wait()
        return _Compose.apply(call, base, own, reads, transition, state_in, later)

    return finish


@dataclass
class _Call:
    """State of one call that its two halves share; the last three are set only between their backward passes."""

    recurrence_fn: Recurrence
    group: dist.ProcessGroup
    method: str
    traffic: Traffic | None
    state_in: Tensor | None = None
    state_gradient: Tensor | None = None
    returning: _Behind | None = None

    @property
    def first(self) -> bool:
        return self.group.rank() == 0


class _LocalMap(torch.autograd.Function):
    """(q, k, v, g, β, initial state) → o_base, P, A, B; its backward is that of the whole local recurrence."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        q, k, v, g, beta, initial_state = inputs
        if call.first:
            base, own = _scan(call.recurrence_fn, q, k, v, g, beta, initial_state)
            reads, transition = q.new_empty(0), own.new_zeros(*own.shape[:3], own.shape[2])
        else:
            base, reads, transition, own = local_map(call.recurrence_fn, q, k, v, g, beta)
        ctx.mark_non_differentiable(reads, transition)
        return base, reads, transition, own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_outputs: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        call, needed = ctx.call, ctx.needs_input_grad[1:]
        *inputs, initial_state = ctx.saved_tensors
        state_in = initial_state if call.first else call.state_in
        d_state = call.returning.wait()[0]
        if call.state_gradient is not None:
            d_state = d_state + call.state_gradient
        call.state_in = call.state_gradient = call.returning = None

        leaves = [x.detach().requires_grad_(n) for x, n in zip((*inputs, state_in), needed, strict=True)]
        with torch.enable_grad():
            outputs, state = _scan(call.recurrence_fn, *leaves)
        wanted = [x for x in leaves if x.requires_grad]
        gradients = torch.autograd.grad((outputs, state), wanted, (d_outputs, d_state))
        found = iter(gradients)
        return None, *(next(found) if n else None for n in needed)


class _Compose(torch.autograd.Function):
    """o = o_base + P S_in and S_out = A S_in + B; backward starts the exchange of gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        base: Tensor,
        own: Tensor,
        reads: Tensor,
        transition: Tensor,
        state_in: Tensor,
        later: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(reads, transition, state_in, later)
        ctx.like = base.shape, base.dtype
        if call.first:
            return base.view_as(base), own.view_as(own)
        return add_read(base, reads, state_in), state_exchange.carry(transition, state_in, own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_outputs: Tensor | None, d_state: Tensor | None) -> tuple[Tensor | None, ...]:
        call = ctx.call
        reads, transition, state_in, later = ctx.saved_tensors
        if d_outputs is None:
            shape, dtype = ctx.like
            d_outputs = state_in.new_zeros(shape, dtype=dtype)
        if call.first:
            own = torch.zeros_like(state_in)  # there is no rank before the first
        else:
            own = read_gradient(reads, d_outputs).to(state_in.dtype)
            if d_state is not None:
                own = state_exchange.carry_back(transition, d_state, own)
        call.state_in, call.state_gradient = state_in, d_state
        call.returning = _Behind(
            lambda: (state_exchange.return_gradient(transition, later, own, call.group, call.method, call.traffic),),
            *(transition, later, own),
        )
        # The state's own gradient waits in `call`: B has its edge for the order of backward only.
        return None, d_outputs, None, None, None, None, None


def local_map(
    recurrence_fn: Recurrence, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One call of the recurrence on [v, 0] from [0, I].

    Returns:
        o_base (B, S, H, V), P (B, S, H, K) in v's dtype; A (B, H, K, K), B (B, H, K, V) in float32 or float64.
    """
    keys, values = q.shape[-1], v.shape[-1]
    dtype = torch.promote_types(v.dtype, torch.float32)
    identity = torch.eye(keys, dtype=dtype, device=v.device).expand(*_state_shape(q, v)[:2], keys, keys)
    columns = torch.cat([v, v.new_zeros(*v.shape[:-1], keys)], dim=-1)
    outputs, state = _scan(recurrence_fn, q, k, columns, g, beta, torch.nn.functional.pad(identity, (values, 0)))
    base, reads = outputs.split([values, keys], dim=-1)
    own, transition = state.split([values, keys], dim=-1)
    # Copies: a view of P would hold o_base's memory until backward.
    return base, reads.contiguous(), transition.contiguous(), own.contiguous()


def add_read(base: Tensor, reads: Tensor, state: Tensor) -> Tensor:
    """o_base + P S, (B, S, H, V), in o_base's dtype with products summed in float32 or wider."""
    heads = base.shape[2]
    x, p = (t.transpose(1, 2).flatten(0, 1) for t in (base, reads))  # B·H S ·
    out = torch.baddbmm(x, p, state.flatten(0, 1).to(x.dtype))
    return out.unflatten(0, (-1, heads)).transpose(1, 2)


def read_gradient(reads: Tensor, d_outputs: Tensor) -> Tensor:
    """C = Pᵀ do, (B, H, K, V), summed over tokens in float32 or wider."""
    p, d = (t.transpose(1, 2).to(torch.promote_types(t.dtype, torch.float32)) for t in (reads, d_outputs))
    return p.mT @ d


def _state_shape(q: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    return q.shape[0], q.shape[2], q.shape[3], v.shape[3]


def _scan(
    recurrence_fn: Recurrence, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence; over one neutral token where the shard has none, so that kernels and gradients always see one."""
    if q.shape[1]:
        return recurrence_fn(q, k, v, g, beta, state)
    neutral = (torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], dim=1) for x in (q, k, v, g, beta))
    outputs, state = recurrence_fn(*neutral, state)
    return outputs[:, :0], state


class _Behind:
    """Work on a CUDA stream of its own while other work goes on; on other devices it runs at once."""

    def __init__(self, work: Callable[[], tuple[Tensor, ...]], *reads: Tensor) -> None:
        self.stream = torch.cuda.Stream(reads[0].device) if reads[0].is_cuda else None
        if self.stream is None:
            self.result = work()
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            self.result = work()
        for x in reads:
            x.record_stream(self.stream)

    def wait(self) -> tuple[Tensor, ...]:
        """The results, for the current stream."""
        if self.stream is not None:
            current = torch.cuda.current_stream(self.stream.device)
            current.wait_stream(self.stream)
            for x in self.result:
                x.record_stream(current)
        return self.result


# --- serial: rank after rank, by plain autograd ---


def _serial(
    recurrence_fn: Recurrence,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    initial_state: Tensor | None,
    group: dist.ProcessGroup,
    traffic: Traffic | None,
) -> Callable[[], tuple[Tensor, Tensor]]:
    def finish() -> tuple[Tensor, Tensor]:
        q, _, v, _, _ = inputs
        if initial_state is not None:
            state_in = initial_state
        else:
            dtype = torch.promote_types(v.dtype, torch.float32)
            received, _ = state_exchange.receive_state(
                v.new_empty(0, dtype=dtype), v.new_empty(_state_shape(q, v), dtype=dtype), group, "serial", traffic
            )
            state_in = _FromRankBefore.apply(q, received, group)
        outputs, state = _scan(recurrence_fn, *inputs, state_in)
        if group.rank() < group.size() - 1:
            state_exchange.send_state(state.detach(), group)
            outputs, state = _ToRankAfter.apply(outputs, state, group, traffic)
        return outputs, state

    return finish


class _FromRankBefore(torch.autograd.Function):
    """A received state; its gradient goes back to where it came from. `anchor` ties it to this rank's graph."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, received: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return received.view_as(received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        state_exchange.send_to(gradient, ctx.group, ctx.group.rank() - 1)
        return None, None, None


class _ToRankAfter(torch.autograd.Function):
    """Identity on (outputs, state), once the state is sent; backward adds what the next rank returns."""

    @staticmethod
    def forward(
        ctx: Any, outputs: Tensor, state: Tensor, group: dist.ProcessGroup, traffic: Traffic | None
    ) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.traffic = group, traffic
        return outputs.view_as(outputs), state.view_as(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_outputs: Tensor, d_state: Tensor) -> tuple[Tensor, Tensor, None, None]:
        after = ctx.group.rank() + 1
        returned = state_exchange.receive_from(d_state, ctx.group, after, "states.backward", ctx.traffic)
        return d_outputs, d_state + returned, None, None
