"""The backward step that replaces fla's miscompiled kernel, against autograd of what one chunk computes."""

import math

import pytest
import torch

from kairos_train.model.kernels.delta_rule import gated_delta_rule
from kairos_train.model.kernels.fla_hopper import chunk_gradients, miscompiled

B, H, K, V, C = 2, 3, 6, 5, 8


def chunk_inputs(tokens, *, decay=0.3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    chunks = -(-tokens // C)
    x = {name: draw(B, tokens, H, K) for name in ("q", "k", "w")}
    x |= {name: draw(B, tokens, H, V) for name in ("v", "do", "dv")}
    x |= {name: draw(B, chunks, H, K, V) for name in ("h", "dh")}
    log_decay = -decay * torch.rand(B, tokens, H, generator=generator, dtype=dtype)
    x["g"] = torch.cat([part.cumsum(1) for part in log_decay.split(C, dim=1)], dim=1) / math.log(2)
    return x


def by_autograd(x, scale):
    """dq, dk, dg through o and h' of every chunk, its pseudo values held fixed; dw through them."""
    q, k, w, natural = (t.clone().requires_grad_() for t in (x["q"], x["k"], x["w"], x["g"] * math.log(2)))
    objective = 0.0
    for n, (qn, kn, wn, gn, vn, don, dvn) in enumerate(
        zip(*(t.split(C, dim=1) for t in (q, k, w, natural, x["v"], x["do"], x["dv"])), strict=True)
    ):
        h, dh = x["h"][:, n], x["dh"][:, n]
        g = gn.transpose(1, 2)  # B H C
        inside = (g[..., :, None] - g[..., None, :]).tril().exp().tril()
        scores = torch.einsum("bihk,bjhk->bhij", qn, kn) * inside
        o = torch.einsum("bihk,bhi,bhkv->bihv", qn, g.exp(), h) + torch.einsum("bhij,bjhv->bihv", scores, vn)
        after = g[..., -1].exp()[..., None, None] * h
        after = after + torch.einsum("bihk,bhi,bihv->bhkv", kn, (g[..., -1:] - g).exp(), vn)
        pseudo = -torch.einsum("bihk,bhkv->bihv", wn, h)
        objective = objective + (scale * o * don).sum() + (after * dh).sum() + (pseudo * dvn).sum()
    dq, dk, dw, dg = torch.autograd.grad(objective, (q, k, w, natural))
    return dq, dk, dw, dg


@pytest.mark.parametrize("tokens", [C, 3 * C, 2 * C + 3, 1])
@pytest.mark.parametrize("decay", [0.0, 0.3, 200.0])
def test_gradients_within_chunks_equal_autograd(tokens, decay):
    x = chunk_inputs(tokens, decay=decay)
    ours = chunk_gradients(**x, scale=0.7, chunk=C)
    for a, b in zip(ours, by_autograd(x, 0.7), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [C, 2 * C + 3, 1])
def test_what_goes_back_to_flas_kernels_is_dense(tokens, dtype):
    """They take pointers and assume strides: one chunk, or a ragged last one, must not come as a view."""
    x = {name: t.to(dtype) for name, t in chunk_inputs(tokens).items()}
    x["g"] = x["g"].to(torch.promote_types(dtype, torch.float32))
    for name, gradient in zip(("dq", "dk", "dw", "dg"), chunk_gradients(**x, scale=0.7, chunk=C), strict=True):
        assert gradient.is_contiguous(), name


def test_sixteen_bit_inputs_give_gradients_in_their_dtype_and_decays_in_float32():
    exact = chunk_inputs(2 * C + 3)
    x = {name: t.float() if name == "g" else t.bfloat16() for name, t in exact.items()}
    ours = chunk_gradients(**x, scale=0.7, chunk=C)
    assert [t.dtype for t in ours] == [torch.bfloat16] * 3 + [torch.float32]
    reference = chunk_gradients(**{name: t.double() for name, t in x.items()}, scale=0.7, chunk=C)
    for a, b in zip(ours, reference, strict=True):
        assert (a.double() - b).norm() / b.norm() < 5e-3


def test_its_decays_complete_the_gradient_of_the_rule():
    """dG of one whole chunk with given pseudo values is ∂/∂G of the rule's own o and state, where β = 1 and w = 0."""
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, C, 1, K, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(1, C, 1, V, generator=generator, dtype=torch.float64)
    log_decay = (-0.2 * torch.rand(1, C, 1, generator=generator, dtype=torch.float64)).requires_grad_()
    state = torch.randn(1, 1, K, V, generator=generator, dtype=torch.float64)
    zero_keys = torch.zeros_like(k)  # k = 0: the state only decays, and o = qᵀ e^G S
    o, last = gated_delta_rule(q, zero_keys, v, log_decay, torch.ones(1, C, 1, dtype=torch.float64), state)
    do, dlast = torch.ones_like(o), torch.ones_like(last)
    (reference,) = torch.autograd.grad((o, last), log_decay, (do, dlast))
    running = log_decay.detach().cumsum(1) / math.log(2)
    *_, dg = chunk_gradients(
        q, zero_keys, v, do, state[:, None], dlast[:, None], zero_keys, running, torch.zeros_like(v), scale=1.0, chunk=C
    )
    torch.testing.assert_close(dg.flip(1).cumsum(1).flip(1), reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("capability", "triton", "wrong"),
    [
        ((9, 0), "3.3.1", False),
        ((9, 0), "3.4.0", True),
        ((9, 0), "3.6.0+git1234", True),
        ((9, 0), "3.7.0", True),
        ((9, 0), "3.7.1", False),
        ((9, 0), "3.10.0", False),
        ((8, 0), "3.6.0", False),
        ((10, 0), "3.6.0", False),
    ],
)
def test_the_versions_that_compile_it_wrongly(capability, triton, wrong):
    assert miscompiled(capability, triton) == wrong
