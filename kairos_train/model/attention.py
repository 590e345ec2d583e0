"""Softmax attention: projections, and the backends that compute windows.

Shapes: B batch, F frames, L tokens per frame, S tokens, N keys, H heads, E head width, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kairos_train.model import rotary
from kairos_train.model.precision import upcast
from kairos_train.model.seams import Seams
from kairos_train.model.windows import WindowGroup, WindowRule, attends, band_mask, window_plan


class FullWidthRMSNorm(nn.Module):
    """RMSNorm over the whole attention width, all heads together; float32 or wider in and out."""

    def __init__(self, width: int, eps: float, seams: Seams) -> None:
        super().__init__()
        self.eps, self.seams = eps, seams
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return upcast(x) * torch.rsqrt(self.seams.mean_square(x) + self.eps) * upcast(self.weight)


class Attention(nn.Module):
    """The q, k, v, o projections of self- and cross-attention with RMSNorm on q and k.

    Args:
        dim: width of queries and outputs; keys and values come from the same width (contexts are embedded to it).
        heads: H over all ranks.
        head_dim: E; the attention width H·E may differ from `dim` (action stream).
    """

    def __init__(self, *, dim: int, heads: int, head_dim: int, eps: float, seams: Seams) -> None:
        super().__init__()
        self.heads, self.head_dim = seams.local_heads(heads), head_dim
        width = heads * head_dim
        self.q = seams.column_linear(dim, width)
        self.k = seams.column_linear(dim, width)
        self.v = seams.column_linear(dim, width)
        self.o = seams.row_linear(width, dim)
        self.norm_q = FullWidthRMSNorm(self.heads * head_dim, eps, seams)
        self.norm_k = FullWidthRMSNorm(self.heads * head_dim, eps, seams)

    def project(
        self, x: Tensor, context: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q from x (B, S, D), k and v from context (B, N, D), as (B, ·, H, E) in x's dtype; q, k rotated if asked."""
        q, k = self._heads(self.norm_q(self.q(x))), self._heads(self.norm_k(self.k(context)))
        if rotation is not None:
            q, k = rotary.rotate(q, rotation), rotary.rotate(k, rotation)
        return q.to(x.dtype), k.to(x.dtype), self._heads(self.v(context))

    def cross(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of x (B, S, D) on context (B, N, D) where mask (B, N) is true; None: everywhere."""
        q, k, v = self.project(x, context, None)
        mask = None if mask is None else mask[:, None, None, :]
        return self.o(scaled_dot_product(q, k, v, mask).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim))


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of (B, S, H, E) on (B, N, H, E), scale E^−½; mask broadcasts to (B, H, S, N), true = seen."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, rule: WindowRule, history: tuple[int, ...], backend: str
) -> Tensor:
    """Video self-attention within the windows of `rule`.

    Args:
        q, k, v: (B, F, L, H, E), after norm and rotary embedding.
        history: K of each sample, length B.
        backend: `gathered` (windows copied, plain attention kernels), `flex` (FlexAttention; trains on CUDA only) or
            `dense` (an S×S mask: the oracle).

    Returns:
        (B, F·L, H, E).
    """
    compute = {"gathered": _gathered, "flex": _flex, "dense": _dense}[backend]
    return compute(q, k, v, rule, history)


def select_backend(requested: str) -> str:
    """Resolve `kernels.attention`: gathered windows unless another backend is named.

    Gathered windows need no mask, so that on CUDA the flash kernels of scaled_dot_product_attention take them.
    """
    return "gathered" if requested == "auto" else requested


def _gathered(q: Tensor, k: Tensor, v: Tensor, rule: WindowRule, history: tuple[int, ...]) -> Tensor:
    batch, frames, tokens = q.shape[:3]
    plan = window_plan(rule, frames, history, q.device)
    qs, ks, vs = (x.flatten(0, 1) for x in (q, k, v))  # (B·F, L, H, E)
    if rule.padded_frames(frames) > frames:
        ks, vs = (torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (ks, vs))
    if len(plan) == 1 and plan[0].query.shape == (batch, frames) == plan[0].key.shape:
        return scaled_dot_product(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), None)
    parts = [_attend_group(qs, ks, vs, group, rule.window) for group in plan]
    order = torch.cat([group.query.flatten() for group in plan]).argsort()
    out = torch.cat(parts).index_select(0, order)  # (B·F, L, H, E)
    return out.view(batch, frames * tokens, *out.shape[2:])


def _attend_group(q: Tensor, k: Tensor, v: Tensor, group: WindowGroup, window: int) -> Tensor:
    """(n·a, L, H, E): every query frame of the group on its key frames."""
    tokens = q.shape[1]

    def frames(x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(0, index.flatten()).view(index.shape[0], -1, *x.shape[2:])

    mask = None if group.offsets is None else band_mask(group.offsets, tokens, window, q.device)
    out = scaled_dot_product(frames(q, group.query), frames(k, group.key), frames(v, group.key), mask)
    return out.reshape(-1, tokens, *out.shape[2:])


def _pad_keys(x: Tensor, frames: int) -> Tensor:
    """(B, F, L, H, E) → (B, frames·L, H, E), zero frames appended."""
    padding = frames - x.shape[1]
    return F.pad(x, (0, 0) * 3 + (0, padding)).flatten(1, 2) if padding else x.flatten(1, 2)


def _dense(q: Tensor, k: Tensor, v: Tensor, rule: WindowRule, history: tuple[int, ...]) -> Tensor:
    batch, frames, tokens = q.shape[:3]
    padded = rule.padded_frames(frames)
    seen = attends(rule, frames, tokens, torch.tensor(history, device=q.device))
    b, i, j = (torch.arange(n, device=q.device) for n in (batch, frames * tokens, padded * tokens))
    mask = seen(b[:, None, None], i[:, None], j).expand(batch, len(i), len(j))
    return scaled_dot_product(q.flatten(1, 2), _pad_keys(k, padded), _pad_keys(v, padded), mask[:, None])


def _flex(q: Tensor, k: Tensor, v: Tensor, rule: WindowRule, history: tuple[int, ...]) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, frames, tokens = q.shape[:3]
    padded = rule.padded_frames(frames)
    seen = attends(rule, frames, tokens, torch.tensor(history, device=q.device))
    mask = create_block_mask(
        lambda b, h, i, j: seen(b, i, j), batch, None, frames * tokens, padded * tokens, device=str(q.device)
    )
    heads_first = [x.transpose(1, 2) for x in (q.flatten(1, 2), _pad_keys(k, padded), _pad_keys(v, padded))]
    # Uncompiled FlexAttention materialises the scores; compiled, it skips the masked blocks.
    attend = torch.compile(flex_attention, dynamic=False) if q.device.type == "cuda" else flex_attention
    return attend(*heads_first, block_mask=mask).transpose(1, 2)
