"""One layer of one stream: modulated self-attention (or Gated DeltaNet), cross-attention, modulated FFN.

The caller says what self-attention is: at cross-stream layers the action stream reads the video stream's keys.

Shapes: B batch, G modulation groups (latent frames of the video, 1 for actions), L tokens per group, D width,
N context.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kairos_train.model.gated_delta_net import GatedDeltaNet, RecurrentState
from kairos_train.model.hooks import ParallelHooks
from kairos_train.model.kernels.attention import Attention, KeyValue
from kairos_train.model.precision import LayerNorm, upcast

LayerState = KeyValue | RecurrentState | None
"""What self-attention leaves for other tokens: keys and values, or the state of a Gated DeltaNet layer."""

Attend = Callable[[Tensor], tuple[Tensor, LayerState]]
"""Self-attention or Gated DeltaNet, output projection included: (B, G, L, D) → (B, G, L, D) and what it leaves."""


class Block(nn.Module):
    """The weights of a layer, and everything in it but the choice of keys.

    Args:
        dim: D.
        ffn_dim: hidden width of the FFN.
        heads, head_dim: of self- and cross-attention.
        gated: the Gated DeltaNet layer instead of self-attention, or None.
    """

    def __init__(
        self,
        *,
        dim: int,
        ffn_dim: int,
        heads: int,
        head_dim: int,
        eps: float,
        hooks: ParallelHooks,
        gated: GatedDeltaNet | None = None,
    ) -> None:
        super().__init__()
        self.hooks = hooks
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))
        self.norm1 = LayerNorm(dim, eps, affine=False)
        if gated is None:
            self.self_attn = Attention(dim=dim, heads=heads, head_dim=head_dim, eps=eps, hooks=hooks)
        else:
            self.gated_delta = gated
        self.cross_attn_norm = LayerNorm(dim, eps, affine=True)
        self.cross_attn = Attention(dim=dim, heads=heads, head_dim=head_dim, eps=eps, hooks=hooks)
        self.norm2 = LayerNorm(dim, eps, affine=False)
        self.ffn = nn.Sequential(hooks.column_linear(dim, ffn_dim), nn.SiLU(), hooks.row_linear(ffn_dim, dim))

    def forward(
        self, x: Tensor, time: Tensor, attend: Attend, context: Tensor | KeyValue, mask: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        """One layer: x after it, and what `attend` leaves.

        Args:
            x: (B, G, L, D).
            time: time projection (B, G, 6, D); with the modulation it gives scale, shift, gate of attention, then of
                the FFN.
            attend: self-attention with this block's weights.
            context: (B, N, D), or `self.cross_attn.context_keys` of it.
            mask: bool (B, N) or None.
        """
        factors = (upcast(self.modulation)[:, None] + time).unsqueeze(3).unbind(2)  # 6 × (B, G, 1, D)
        scale, shift, gate, ffn_scale, ffn_shift, ffn_gate = factors
        attended, left = attend(self._modulate(self.norm1(x), scale, shift, x.dtype))
        x = x + (gate * attended).to(x.dtype)
        tokens = self.hooks.enter_heads(self.cross_attn_norm(x).to(x.dtype))
        x = x + self.cross_attn.cross(tokens, context, mask)
        hidden = self.hooks.enter_heads(self._modulate(self.norm2(x), ffn_scale, ffn_shift, x.dtype))
        return x + (ffn_gate * self.ffn(hidden)).to(x.dtype), left

    @staticmethod
    def _modulate(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
        return (x * (1 + scale) + shift).to(dtype)
