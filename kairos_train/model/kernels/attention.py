"""Softmax attention: projections, and the backends that compute windows.

Shapes: B batch, F frames, Fq and Fk local query and key frames, L tokens per frame, S tokens, N keys, H heads,
E head width, D width; G groups of tokens (latent frames of the video, 1 for actions) with L tokens each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kairos_train.basics.errors import UserError
from kairos_train.model.hooks import ParallelHooks
from kairos_train.model.kernels import rotary
from kairos_train.model.kernels.windows import WindowGroup, WindowSpec, attends, band_mask, window_plan
from kairos_train.model.precision import upcast


@dataclass(frozen=True)
class KeyValue:
    """Keys and values, (B, …, H, E) each.

    Not a tuple: ZeRO 3 hooks every tensor in the tuples that modules return, and gathers weights in the order in which
    gradients reach them. Whether gradients reach these depends on the batch, and DeepSpeed looks into no dataclass.
    """

    k: Tensor
    v: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "KeyValue":
        """`function` of both."""
        return KeyValue(function(self.k), function(self.v))


class FullWidthRMSNorm(nn.Module):
    """RMSNorm over the whole attention width, all heads together; float32 or wider in and out."""

    def __init__(self, width: int, eps: float, hooks: ParallelHooks) -> None:
        super().__init__()
        self.eps, self.hooks = eps, hooks
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return upcast(x) * torch.rsqrt(self.hooks.mean_square(x) + self.eps) * upcast(self.weight)


class Attention(nn.Module):
    """The q, k, v, o projections of self- and cross-attention with RMSNorm on q and k.

    Args:
        dim: width of queries and outputs; keys and values come from the same width (contexts are embedded to it).
        heads: H on all ranks together.
        head_dim: E; the attention width H·E may differ from `dim` (action stream).
    """

    def __init__(self, *, dim: int, heads: int, head_dim: int, eps: float, hooks: ParallelHooks) -> None:
        super().__init__()
        self.hooks, self.heads, self.head_dim = hooks, hooks.local_heads(heads), head_dim
        width = heads * head_dim
        self.q = hooks.column_linear(dim, width)
        self.k = hooks.column_linear(dim, width)
        self.v = hooks.column_linear(dim, width)
        self.o = hooks.row_linear(width, dim)
        self.norm_q = FullWidthRMSNorm(self.heads * head_dim, eps, hooks)
        self.norm_k = FullWidthRMSNorm(self.heads * head_dim, eps, hooks)

    def project(
        self, x: Tensor, context: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q from x (B, …, D), k and v from context (B, …, D), as (B, …, H, E) in x's dtype; q, k rotated if asked."""
        q, k, v = self.normed(x, context)
        if rotation is not None:
            q, k = rotary.rotate(q, rotation), rotary.rotate(k, rotation)
        return q.to(x.dtype), k.to(x.dtype), v

    def normed(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`project` without rotation; q and k float32 or wider."""
        q, k = self._heads(self.norm_q(self.q(x))), self._heads(self.norm_k(self.k(context)))
        return q, k, self._heads(self.v(context))

    def cross(self, x: Tensor, context: Tensor | KeyValue, mask: Tensor | None) -> Tensor:
        """Attention of x (B, G, L, D) where mask (B, N) is true (None: for all tokens) on context (B, N, D), or on what
        `context_keys` made of it."""
        if isinstance(context, Tensor):
            q, k, v = self.project(x, context, None)
        else:
            q, k, v = self._heads(self.norm_q(self.q(x))).to(x.dtype), context.k, context.v
        mask = None if mask is None else mask[:, None, None, :]
        return self.finish(scaled_dot_product(q.flatten(1, 2), k, v, mask), x)

    def context_keys(self, context: Tensor) -> KeyValue:
        """Keys and values of a context (B, N, D) that many denoising steps read."""
        return KeyValue(self._heads(self.norm_k(self.k(context))).to(context.dtype), self._heads(self.v(context)))

    def finish(self, heads: Tensor, like: Tensor) -> Tensor:
        """The output projection: heads (B, G·L, H, E) of the tokens of `like` (B, G, L, ·) → (B, G, L, D)."""
        return self.o(heads.reshape(*like.shape[:3], self.heads * self.head_dim))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim))


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of (B, S, H, E) on (B, N, H, E), scale E^−½; mask broadcasts to (B, H, S, N), true = seen."""
    if q.shape[1] == 0:
        # A rank without frames: k and v stay in the graph, because their exchange has a collective backward.
        return q + 0.0 * (k.sum() + v.sum())
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)


@dataclass(frozen=True)
class Windows:
    """The windows of one layer for the local frames; all of a sample's unless context ranks split them.

    Attributes:
        spec: of the layer.
        history: K of each sample, length B.
        frames: F of the whole sample.
        queries: numbers of the frames whose queries this rank has (Fq).
        keys: numbers of the frames whose keys this rank has (Fk), ascending; all that the queries read.
    """

    spec: WindowSpec
    history: tuple[int, ...]
    frames: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]

    @classmethod
    def whole(cls, spec: WindowSpec, history: tuple[int, ...], frames: int) -> "Windows":
        """All frames are on this rank."""
        return cls(spec, history, frames, tuple(range(frames)), tuple(range(frames)))

    def mask_fn(self, tokens: int, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """`f(b, i, j) -> bool` on indices of the local tokens; keys run on into zero padding."""
        seen = attends(self.spec, self.frames, tokens, torch.tensor(self.history, device=device))
        padding = range(self.frames, self.spec.padded_frames(self.frames))
        queries, keys = (torch.tensor(n, device=device) for n in (self.queries, (*self.keys, *padding)))
        return lambda b, i, j: seen(
            b, queries[i // tokens] * tokens + i % tokens, keys[j // tokens] * tokens + j % tokens
        )


def window_attention(q: Tensor, k: Tensor, v: Tensor, *, windows: Windows, backend: str) -> Tensor:
    """Video self-attention within windows.

    Args:
        q: (B, Fq, L, H, E), after norm and rotary embedding.
        k, v: (B, Fk, L, H, E).
        windows: which frames these are, and what they read.
        backend: `gathered` (windows copied, plain attention kernels), `flex` (FlexAttention; trains on CUDA only) or
            `dense` (an S×S mask: the oracle).

    Returns:
        (B, Fq·L, H, E).
    """
    if not windows.queries:
        return scaled_dot_product(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), None)
    return {"gathered": _gathered, "flex": _flex, "dense": _dense}[backend](q, k, v, windows)


def select_backend(requested: str, device: torch.device | None = None) -> str:
    """Resolve `kernels.attention`: gathered windows unless another backend is named.

    Gathered windows need no mask, so that on CUDA the flash kernels of scaled_dot_product_attention take them.

    Args:
        device: to train on; None: for forward passes alone.

    Raises:
        UserError: the backend has no backward pass there.
    """
    if requested == "flex" and device is not None and device.type != "cuda":
        raise UserError(
            f"kernels.attention=flex trains on a CUDA device only, not on {device.type}; use auto, gathered or dense"
        )
    return "gathered" if requested == "auto" else requested


def _gathered(q: Tensor, k: Tensor, v: Tensor, windows: Windows) -> Tensor:
    (batch, frames, tokens), spec = q.shape[:3], windows.spec
    plan = window_plan(spec, windows.frames, windows.history, windows.queries, windows.keys, q.device)
    if len(plan) == 1 and _is_everything(plan[0], q, k):
        return scaled_dot_product(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), None)
    qs, ks, vs = (x.flatten(0, 1) for x in (q, k, v))  # (B·F, L, H, E)
    if spec.padded_frames(windows.frames) > windows.frames:
        ks, vs = (torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (ks, vs))
    parts = [_attend_group(qs, ks, vs, group, spec.window) for group in plan]
    order = torch.cat([group.query.flatten() for group in plan]).argsort()
    out = torch.cat(parts).index_select(0, order)  # (B·Fq, L, H, E)
    return out.view(batch, frames * tokens, *out.shape[2:])


def _is_everything(group: WindowGroup, q: Tensor, k: Tensor) -> bool:
    """Whether every local query reads every local key, in full."""
    return group.offsets is None and group.query.shape == q.shape[:2] and group.key.shape == k.shape[:2]


def _attend_group(q: Tensor, k: Tensor, v: Tensor, group: WindowGroup, window: int) -> Tensor:
    """(n·a, L, H, E): every query frame of the group on its key frames."""
    tokens = q.shape[1]

    def frames(x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(0, index.flatten()).view(index.shape[0], -1, *x.shape[2:])

    mask = None if group.offsets is None else band_mask(group.offsets, tokens, window, q.device)
    out = scaled_dot_product(frames(q, group.query), frames(k, group.key), frames(v, group.key), mask)
    return out.reshape(-1, tokens, *out.shape[2:])


def _pad_keys(x: Tensor, windows: Windows) -> Tensor:
    """(B, Fk, L, H, E) → (B, S, H, E), with the zero frames of the token reading behind them."""
    padding = windows.spec.padded_frames(windows.frames) - windows.frames
    return F.pad(x, (0, 0) * 3 + (0, padding)).flatten(1, 2) if padding else x.flatten(1, 2)


def _dense(q: Tensor, k: Tensor, v: Tensor, windows: Windows) -> Tensor:
    batch, seen = q.shape[0], windows.mask_fn(q.shape[2], q.device)
    q, k, v = q.flatten(1, 2), _pad_keys(k, windows), _pad_keys(v, windows)
    b, i, j = (torch.arange(n, device=q.device) for n in (batch, q.shape[1], k.shape[1]))
    mask = seen(b[:, None, None], i[:, None], j).expand(batch, len(i), len(j))
    return scaled_dot_product(q, k, v, mask[:, None])


def _flex(q: Tensor, k: Tensor, v: Tensor, windows: Windows) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, seen = q.shape[0], windows.mask_fn(q.shape[2], q.device)
    q, k, v = q.flatten(1, 2), _pad_keys(k, windows), _pad_keys(v, windows)
    mask = create_block_mask(
        lambda b, h, i, j: seen(b, i, j), batch, None, q.shape[1], k.shape[1], device=str(q.device)
    )
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    # Uncompiled FlexAttention materialises the scores; compiled, it skips the masked blocks.
    attend = torch.compile(flex_attention, dynamic=False) if q.device.type == "cuda" else flex_attention
    return attend(*heads_first, block_mask=mask).transpose(1, 2)
