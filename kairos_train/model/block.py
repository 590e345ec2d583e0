"""One layer of one stream: modulated self-attention (or GATED), cross-attention, modulated FFN.

A layer is run in two halves around self-attention, because at joint layers the action stream reads the video stream's
keys between them: `enter` → (self-attention) → `leave`.

Shapes: B batch, G modulation groups (latent frames of the video, 1 for actions), L tokens per group, D width,
N context.
"""

import torch
from torch import Tensor, nn

from kairos_train.model.attention import Attention
from kairos_train.model.gated_delta_net import GatedDeltaNet
from kairos_train.model.precision import LayerNorm, upcast
from kairos_train.model.seams import Seams


class Block(nn.Module):
    """The weights of a layer and its two halves.

    Args:
        dim: D.
        ffn_dim: hidden width of the FFN.
        heads, head_dim: of self- and cross-attention.
        gated: the GATED layer that stands in place of self-attention, or None.
    """

    def __init__(
        self,
        *,
        dim: int,
        ffn_dim: int,
        heads: int,
        head_dim: int,
        eps: float,
        seams: Seams,
        gated: GatedDeltaNet | None = None,
    ) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.norm1 = LayerNorm(dim, eps, affine=False)
        if gated is None:
            self.self_attn = Attention(dim=dim, heads=heads, head_dim=head_dim, eps=eps, seams=seams)
        else:
            self.gated_delta = gated
        self.cross_attn_norm = LayerNorm(dim, eps, affine=True)
        self.cross_attn = Attention(dim=dim, heads=heads, head_dim=head_dim, eps=eps, seams=seams)
        self.norm2 = LayerNorm(dim, eps, affine=False)
        self.ffn = nn.Sequential(seams.column_linear(dim, ffn_dim), nn.SiLU(), seams.row_linear(ffn_dim, dim))

    def factors(self, time: Tensor) -> tuple[Tensor, ...]:
        """Time projection (B, G, 6, D) → scale, shift, gate of attention, then of the FFN, each (B, G, 1, D)."""
        return (upcast(self.modulation)[:, None] + time).unsqueeze(3).unbind(2)

    def enter(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """What self-attention sees: x (B, G, L, D) normalised and modulated, as (B, G·L, D)."""
        return self._modulate(self.norm1(x), factors[0], factors[1], x.dtype).flatten(1, 2)

    def leave(
        self, x: Tensor, attended: Tensor, factors: tuple[Tensor, ...], context: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Residual of self-attention (`attended` (B, G·L, D), after o), cross-attention, FFN; returns x's shape."""
        _, _, gate, ffn_scale, ffn_shift, ffn_gate = factors
        x = x + (gate * attended.view_as(x)).to(x.dtype)
        tokens = self.cross_attn_norm(x).to(x.dtype).flatten(1, 2)
        x = x + self.cross_attn.cross(tokens, context, mask).view_as(x)
        hidden = self.ffn(self._modulate(self.norm2(x), ffn_scale, ffn_shift, x.dtype))
        return x + (ffn_gate * hidden).to(x.dtype)

    @staticmethod
    def _modulate(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
        return (x * (1 + scale) + shift).to(dtype)
