"""Gated DeltaNet (GDN), layer kind GATED, over all video tokens in raster order (model specification, "The attention
kinds").

Shapes: B batch, F frames, L tokens per frame, S = F·L video tokens, D width, H heads, K key width, V value width.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kairos_train.model.hooks import ParallelHooks
from kairos_train.model.kernels.delta_rule import gated_delta_rule, select_backend
from kairos_train.model.precision import upcast


class CausalConvolution(nn.Module):
    """Depthwise causal convolution without bias, then SiLU. Weight (channels, 1, size) as nn.Conv1d stores it."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, size))

    def forward(self, x: Tensor, previous: Tensor | None) -> Tensor:
        """x (B, S, channels), previous (B, size−1, channels) or None at the start; returns (B, S, channels)."""
        before = self.weight.shape[-1] - 1
        x = F.pad(x, (0, 0, before, 0)) if previous is None else torch.cat([previous, x], dim=1)
        return _ConvolveSilu.apply(x, self.weight[:, 0])


class _ConvolveSilu(torch.autograd.Function):
    """SiLU of Σ_i x[:, i : i + S]·taps[:, i]: x (B, size − 1 + S, C), taps (C, size) → (B, S, C) in x's dtype.

    The sums are taken in float32 or wider in both directions, and rounded once; what SiLU was given is computed again
    in backward, so that x alone is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps)
        return F.silu(_convolve(x, upcast(taps))).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (x, taps), tokens = ctx.saved_tensors, gradient.shape[1]
        wide_taps = upcast(taps)
        gradient = torch.ops.aten.silu_backward(upcast(gradient), _convolve(x, wide_taps))
        shifts = range(taps.shape[1])
        dx = gradient.new_zeros(x.shape)
        for i in reversed(shifts):
            dx[:, i : i + tokens] += gradient * wide_taps[:, i]
        d_taps = [(gradient * x[:, i : i + tokens]).sum((0, 1)) for i in shifts]
        return dx.to(x.dtype), torch.stack(d_taps, dim=1).to(taps.dtype)


def _convolve(x: Tensor, taps: Tensor) -> Tensor:
    """In the dtype of the taps. Shifted products keep the channels last; a conv1d would transpose twice."""
    tokens = x.shape[1] - taps.shape[1] + 1
    y = x[:, :tokens] * taps[:, 0]
    for i in range(1, taps.shape[1]):
        y = y + x[:, i : i + tokens] * taps[:, i]
    return y


class RMSNorm(nn.Module):
    """RMSNorm over one head's value width, computed in float32 or wider."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        x = upcast(x)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * upcast(self.weight)


@dataclass(frozen=True)
class RecurrentState:
    """What a Gated DeltaNet layer keeps of the tokens so far, for those that follow.

    Attributes:
        state: (B, H, K, V), float32 or wider.
        tokens: the layer's last inputs (B, conv_size − 1, D), which the convolutions read again; zeros before the first
            token.
    """

    state: Tensor
    tokens: Tensor


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet with short convolutions and an output gate.

    Args:
        dim: D.
        heads: H on all ranks together.
        key_dim: K per head.
        value_dim: V per head.
        backend: `kernels.gated_delta`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        conv_size: int,
        eps: float,
        hooks: ParallelHooks,
        backend: str,
    ) -> None:
        super().__init__()
        self.hooks, self.backend, self.conv_size = hooks, backend, conv_size
        self.heads, self.key_dim, self.value_dim = hooks.local_heads(heads), key_dim, value_dim
        self.q_proj = hooks.column_linear(dim, heads * key_dim, bias=False)
        self.k_proj = hooks.column_linear(dim, heads * key_dim, bias=False)
        self.v_proj = hooks.column_linear(dim, heads * value_dim, bias=False)
        self.a_proj = hooks.column_linear(dim, heads, bias=False, high_precision=True)
        self.b_proj = hooks.column_linear(dim, heads, bias=False, high_precision=True)
        self.g_proj = hooks.column_linear(dim, heads * value_dim, bias=False)
        self.q_conv1d = CausalConvolution(self.heads * key_dim, conv_size)
        self.k_conv1d = CausalConvolution(self.heads * key_dim, conv_size)
        self.v_conv1d = CausalConvolution(self.heads * value_dim, conv_size)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.o_norm = RMSNorm(value_dim, eps)
        self.o_proj = hooks.row_linear(heads * value_dim, dim, bias=False)

    def log_decay(self, x: Tensor) -> Tensor:
        """g = −exp(A_log)·softplus(a_proj x + dt_bias), (B, S, H), float32 or wider."""
        return -upcast(self.A_log).exp() * F.softplus(upcast(self.a_proj(x)) + upcast(self.dt_bias))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """x (B, F, L, D) → (B, F, L, D), causal over all tokens; `frames` counts those of the whole sample."""
        grid = self.hooks.enter_heads(x)
        halo = self.hooks.previous_tokens(grid.flatten(1, 2), self.conv_size - 1, grid.shape[2], frames)
        return self._run(grid, halo, None)[0]

    def continue_from(self, before: RecurrentState | None, x: Tensor) -> tuple[Tensor, RecurrentState]:
        """`forward` on frames (B, F, L, D) behind those that left the state `before` (None: these are the first).

        Returns:
            Outputs (B, F, L, D), and the state after these frames. On one device: nothing is exchanged.
        """
        tokens, size = x.flatten(1, 2), self.conv_size - 1
        previous = tokens.new_zeros(x.shape[0], size, x.shape[-1]) if before is None else before.tokens
        out, state = self._run(x, previous, None if before is None else before.state)
        last = torch.cat([previous, tokens[:, max(tokens.shape[1] - size, 0) :]], dim=1)
        return out, RecurrentState(state, last[:, last.shape[1] - size :])

    def _run(self, grid: Tensor, halo: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs and the state after x (B, F, L, D), given the inputs before it (B, conv_size − 1, D) and a state."""
        x = grid.flatten(1, 2)
        q = self._unit(self._project(self.q_proj, self.q_conv1d, x, halo, self.key_dim)) * self.key_dim**-0.5
        k = self._unit(self._project(self.k_proj, self.k_conv1d, x, halo, self.key_dim))
        v = self._project(self.v_proj, self.v_conv1d, x, halo, self.value_dim)
        beta = upcast(self.b_proj(x)).sigmoid()
        recurrence_fn = partial(gated_delta_rule, backend=select_backend(self.backend, x.device, x.dtype))
        outputs = self.hooks.start_recurrence(
            recurrence_fn, q.to(v.dtype), k.to(v.dtype), v, self.log_decay(x), beta, state
        )
        gate = F.silu(upcast(self.g_proj(x))).unflatten(-1, (self.heads, self.value_dim))
        o, state = outputs()
        o = (self.o_norm(o) * gate).to(x.dtype).reshape(*grid.shape[:3], self.heads * self.value_dim)
        return self.o_proj(o), state

    def _project(self, proj: nn.Module, conv: nn.Module, x: Tensor, halo: Tensor | None, width: int) -> Tensor:
        previous = None if halo is None else proj(halo)
        return conv(proj(x), previous).unflatten(-1, (self.heads, width))

    @staticmethod
    def _unit(x: Tensor) -> Tensor:
        """x / |x| over a head's width, float32 or wider (eps inside the root, as the checkpoints were trained)."""
        x = upcast(x)
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)
