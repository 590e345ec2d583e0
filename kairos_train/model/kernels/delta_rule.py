"""The gated delta rule (arXiv 2412.06464), in chunks: matrix products inside a chunk, one state between chunks.

Per head, with state S (K×V), for every token
    S ← e^g S;   S ← S + k ⊗ β(v − kᵀS);   o = qᵀS.

Within a chunk of C tokens, G the running sum of g, D_ij = e^(G_i − G_j) for i ≥ j:
    T = (1 + tril(diag(β) K Kᵀ ∘ D, −1))⁻¹      (unit lower triangular)
    U = T diag(β) V,   W = T diag(β e^G) K        (pseudo values; the incoming state's part of them)
    V' = U − W S,   O = (Q ∘ e^G) S + (Q Kᵀ ∘ D) V',   S ← e^(G_C) S + (K ∘ e^(G_C − G))ᵀ V'.

Shapes: B batch, S tokens, H heads, K key width, V value width.
"""

import importlib.util

import torch
from torch import Tensor

from kairos_train.basics.errors import UserError
from kairos_train.model.kernels import fla_hopper
from kairos_train.model.precision import upcast

CHUNK = 64
"""Tokens per chunk: the C×C triangular solve and the products over K and V cost about the same here."""


def select_backend(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve `kernels.gated_delta` for a device: "torch" or "fla".

    `auto` is fla's Triton kernels on CUDA and plain torch elsewhere; float64 always runs in torch (fla has no float64).

    Raises:
        UserError: the configuration asks for fla, or `auto` resolves to it, and it cannot run here.
    """
    if requested == "torch" or (requested == "auto" and (device.type != "cuda" or dtype == torch.float64)):
        return "torch"
    if device.type != "cuda":
        raise UserError(f"kernels.gated_delta=fla needs a CUDA device, not {device.type}; use auto or torch")
    if importlib.util.find_spec("fla") is None:
        raise UserError(
            "kernels.gated_delta: flash-linear-attention is not installed; `pip install 'kairos-train[cuda]'`, "
            "or kernels.gated_delta=torch for the slower plain implementation"
        )
    return "fla"


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    *,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a sequence; differentiable in every argument.

    Args:
        q: queries (B, S, H, K), already normalised and scaled.
        k: keys (B, S, H, K), already normalised.
        v: values (B, S, H, V), any V.
        g: log decays (B, S, H), ≤ 0, float32 or wider.
        beta: write strengths (B, S, H).
        initial_state: (B, H, K, V), float32 or wider; zeros when None.
        backend: "torch" (any device and dtype) or "fla" (CUDA), see `select_backend`.

    Returns:
        Outputs (B, S, H, V) in v's dtype, and the final state (B, H, K, V) in float32 (float64 for float64 inputs).
        A token with g = 0 and β = 0 leaves the state alone.
    """
    if backend == "fla":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        fla_hopper.replace_miscompiled_kernel()
        return chunk_gated_delta_rule(
            q, k, v, g=g, beta=beta, scale=1.0, initial_state=initial_state, output_final_state=True
        )
    return _chunked(q, k, v, g, beta, initial_state)


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    out_dtype = v.dtype
    (batch, tokens, heads, key_dim), value_dim = q.shape, v.shape[-1]
    if initial_state is None:
        state = upcast(v).new_zeros(batch, heads, key_dim, value_dim)
    else:
        state = upcast(initial_state)
    if tokens == 0:
        return v, state
    chunk = min(CHUNK, tokens)
    # (B, S, H, ·) → (B·H, chunks, C, ·); padding is neutral: g = 0, β = 0.
    q, k, v, g, beta = (_to_chunks(upcast(x), chunk) for x in (q, k, v, g[..., None], beta[..., None]))

    g = g.squeeze(-1).cumsum(-1)  # B·H n C
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    # Masked before the exponential: above the diagonal G_i − G_j is positive and may overflow.
    decay = (g[..., :, None] - g[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    unit_lower = (k @ k.mT) * (beta * decay)  # solve_triangular reads below the diagonal, takes 1 on it
    identity = torch.eye(chunk, dtype=k.dtype, device=k.device).expand_as(decay)
    # T itself is C×C; solving for the columns of U and W instead costs several times their products with T.
    weights = torch.linalg.solve_triangular(unit_lower, identity, upper=False, unitriangular=True) * beta.mT
    u = weights @ v
    minus_w = (weights * -g.exp()[..., None, :]) @ k
    scores = (q @ k.mT) * decay
    q_decayed = q * g.exp()[..., None]
    g_last = g[..., -1:]
    k_to_end = k * (g_last - g)[..., None].exp()
    chunk_decay = g_last[..., None].exp()

    outputs, state = [], state.flatten(0, 1)
    # unbind, not indexing: the gradient of an index is a zero tensor of the whole size, for every chunk.
    parts = [x.unbind(1) for x in (u, minus_w, q_decayed, scores, k_to_end.mT, chunk_decay)]
    for u_i, minus_w_i, q_i, scores_i, k_i, decay_i in zip(*parts, strict=True):
        v_new = torch.baddbmm(u_i, minus_w_i, state)
        outputs.append(torch.baddbmm(q_i @ state, scores_i, v_new))
        state = torch.baddbmm(decay_i * state, k_i, v_new)
    out = torch.stack(outputs, dim=1).flatten(1, 2)[:, :tokens].unflatten(0, (batch, heads))  # B H S V
    return out.transpose(1, 2).to(out_dtype), state.unflatten(0, (batch, heads))


def _to_chunks(x: Tensor, chunk: int) -> Tensor:
    """(B, S, H, ·) → (B·H, ⌈S/C⌉, C, ·), zero-padded at the end and contiguous."""
    x = x.transpose(1, 2).flatten(0, 1)
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % chunk)) if x.shape[1] % chunk else x.contiguous()
    return x.unflatten(1, (-1, chunk))
