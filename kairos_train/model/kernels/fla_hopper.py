"""One backward step of flash-linear-attention in plain torch, where Triton compiles its kernel wrongly.

On Hopper GPUs Triton 3.4 to 3.7.0 gives wrong gradients of the decays in fla's `chunk_bwd_dqkwg`, and fla refuses the
backward pass there (its issue 640; torch 2.11 and 2.12 come with such a Triton). The step is a few matrix products per
chunk; this module computes them with torch and registers them at fla's dispatcher. The rest stays fla's.
Written for fla-core 0.6.0. An installed tilelang takes precedence.

For a chunk of C tokens with state h at its start, running decay G (base 2), pseudo values v = u − w h and scale s,

    o = s (q ∘ 2^G) h + s (q kᵀ ∘ D) v,   h' = 2^(G_C) h + (k ∘ 2^(G_C − G))ᵀ v,   D_ij = 2^(G_i − G_j), i ≥ j,

given the gradients do of o, dh of h' and dv of v:

    dS = s (do vᵀ ∘ D),  dq = s 2^G ∘ (do hᵀ) + dS k,  dk = 2^(G_C − G) ∘ (v dhᵀ) + dSᵀ q,  dw = −dv hᵀ,
    dG = Σ(dq ∘ q) − Σ(dk ∘ k), and at the chunk's last token also 2^(G_C) Σ(h ∘ dh) + Σ(dk' ∘ k), dk' the first
    part of dk. (In units of the natural logarithm of the decay.)

Shapes: B batch, T tokens, H heads, K key width, V value width, n chunks.
"""

import re
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kairos_train.basics.errors import UserError


@lru_cache(maxsize=1)
def replace_miscompiled_kernel() -> bool:
    """Register `chunk_gradients` at fla where Triton miscompiles its kernel; returns whether it does.

    Raises:
        UserError: it does, and this fla has no dispatcher to register at.
    """
    import triton

    if not miscompiled(torch.cuda.get_device_capability(), triton.__version__):
        return False
    try:
        from fla.backends import BaseBackend, register
    except ImportError as error:
        raise UserError(
            f"kernels.gated_delta=fla: with Triton {triton.__version__} this flash-linear-attention gives wrong "
            "gradients on Hopper; `pip install 'flash-linear-attention>=0.6'`, or kernels.gated_delta=torch"
        ) from error

    @register("common")
    class TorchBackend(BaseBackend):
        """Takes the calls that the gated delta rule makes, and no others."""

        backend_type = "kairos_torch"
        priority = 9  # after tilelang

        def chunk_bwd_dqkwg_verifier(self, **call: Any) -> tuple[bool, str | None]:
            supported = call.get("cu_seqlens") is None and call.get("g_gamma") is None
            supported = supported and not call.get("state_v_first", False) and call["k"].shape == call["q"].shape
            supported = supported and all(call.get(name) is not None for name in ("g", "w", "dv"))
            return supported and call["v"].shape[2] == call["k"].shape[2], "sequences of one length, equal heads"

        def chunk_bwd_dqkwg(self, **call: Any) -> tuple[Tensor, ...]:
            names = ("q", "k", "v", "do", "h", "dh", "w", "g", "dv")
            scale = call["k"].shape[-1] ** -0.5 if call.get("scale") is None else call["scale"]
            return chunk_gradients(*(call[name] for name in names), scale=scale, chunk=call.get("chunk_size", 64))

    return True


def miscompiled(capability: tuple[int, int], triton: str) -> bool:
    """Whether Triton of this version compiles fla's kernel wrongly for this compute capability."""
    version = tuple(int(part) for part in re.findall(r"\d+", triton)[:3])
    return capability[0] == 9 and (3, 4, 0) <= version < (3, 7, 1)


def chunk_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    h: Tensor,
    dh: Tensor,
    w: Tensor,
    g: Tensor,
    dv: Tensor,
    *,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients within every chunk.

    Args:
        q, k, w: (B, T, H, K).
        v, do, dv: (B, T, H, V).
        h, dh: states at the start of every chunk, gradients at its end (B, n, H, K, V).
        g: running sum of log2 decays within each chunk (B, T, H), float32 or wider.
        scale: of the queries.
        chunk: C.

    Returns:
        dq, dk, dw (B, T, H, K) in the dtypes of q, k, w; dg (B, T, H) in g's dtype, not yet summed over what follows.
        All contiguous.
    """
    batch, tokens, heads, _ = q.shape
    missing = -tokens % chunk

    def filled(x: Tensor) -> Tensor:  # whole chunks
        return torch.cat([x, x.new_zeros(batch, missing, *x.shape[2:])], dim=1) if missing else x

    def chunks(x: Tensor) -> Tensor:  # (B, T + missing, H, ·) → (B·n·H, C, ·)
        return x.unflatten(1, (-1, chunk)).transpose(2, 3).flatten(0, 2)

    def tokenwise(x: Tensor) -> Tensor:  # (B·n·H, C, ·) → (B, T, H, ·)
        # Dense: fla's next kernel takes pointers and assumes strides, also where this would be a view of padded chunks.
        return x.unflatten(0, (batch, -1, heads)).transpose(2, 3).flatten(1, 2)[:, :tokens].contiguous()

    # Where tokens are missing the decay keeps its last value: zeros lie far above it, and their powers would overflow.
    decay = chunks(torch.cat([g, g[:, -1:].expand(-1, missing, -1)], dim=1).unsqueeze(-1))  # (B·n·H, C, 1)
    last = decay[:, -1:]
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    within = (decay - decay.transpose(1, 2)).masked_fill(future, -torch.inf).exp2()
    q_c, k_c, v_c, do_c, dv_c = (chunks(filled(x)) for x in (q, k, v, do, dv))
    h, dh = h.flatten(0, 2), dh.flatten(0, 2)  # (B·n·H, K, V)

    scores = (_product(do_c, v_c.transpose(1, 2)) * within * scale).to(k.dtype)
    dk_state = _product(v_c, dh.transpose(1, 2)) * (last - decay).exp2()
    dq = _product(do_c, h.transpose(1, 2)) * decay.exp2() * scale + _product(scores, k_c)
    dk = dk_state + _product(scores.transpose(1, 2), q_c)
    dw = -_product(dv_c, h.transpose(1, 2))
    dg = tokenwise((dq * q_c - dk * k_c).sum(-1, keepdim=True)).squeeze(-1)
    kept = _product(h.flatten(1).unsqueeze(1), dh.flatten(1).unsqueeze(2)) * last.exp2()  # (B·n·H, 1, 1)
    at_end = kept.flatten() + (dk_state * k_c).sum((-1, -2))
    ends = torch.arange(1, at_end.numel() // (batch * heads) + 1, device=q.device).mul(chunk).clamp(max=tokens) - 1
    dg = dg.index_add(1, ends, at_end.view(batch, -1, heads).to(dg.dtype))
    return tokenwise(dq).to(q.dtype), tokenwise(dk).to(k.dtype), tokenwise(dw).to(w.dtype), dg.to(g.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched product with sums and result in float32 or wider: dg is a difference of nearly equal sums."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b.to(a.dtype)
    if a.is_cuda:
        return torch.bmm(a, b.to(a.dtype), out_dtype=torch.float32)
    return a.float() @ b.float()
