"""The chunked gated delta rule against the recurrence, token by token, in float64."""

import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kairos_train.basics.errors import UserError
from kairos_train.model.kernels import fla_hopper
from kairos_train.model.kernels.delta_rule import CHUNK, gated_delta_rule, select_backend


def recurrence(q, k, v, g, beta, state):
    """The definition: S ← e^g S; S ← S + k ⊗ β(v − kᵀS); o = qᵀS."""
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t].exp()[..., None, None] * state
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state


def random_inputs(tokens, *, decay=0.03, batch=2, heads=2, key=8, value=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    unit = torch.nn.functional.normalize
    q, k = (unit(draw(batch, tokens, heads, key), dim=-1) for _ in range(2))
    g = -decay * torch.rand(batch, tokens, heads, generator=generator, dtype=dtype)
    beta = torch.rand(batch, tokens, heads, generator=generator, dtype=dtype)
    tensors = [q, k, draw(batch, tokens, heads, value), g, beta, draw(batch, heads, key, value)]
    return [t.requires_grad_() for t in tensors]


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 3 * CHUNK + 1),
    decay=st.sampled_from([0.0, 0.03, 1.0, 20.0]),
    seed=st.integers(0, 1000),
)
def test_chunks_equal_the_recurrence_in_values_and_gradients(tokens, decay, seed):
    equals_the_recurrence(tokens, decay, seed)


def test_a_chunk_and_a_bit_equal_the_recurrence():
    equals_the_recurrence(CHUNK + 6, 0.3, 0)


def equals_the_recurrence(tokens, decay, seed):
    inputs = random_inputs(tokens, decay=decay, seed=seed)
    ours = gated_delta_rule(*inputs[:5], initial_state=inputs[5])
    reference = recurrence(*inputs)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(r.shape, generator=generator, dtype=r.dtype) for r in reference]
    our_grads = torch.autograd.grad(ours, inputs, cotangents)
    grads = torch.autograd.grad(reference, inputs, cotangents)
    for a, b in zip((*ours, *our_grads), (*reference, *grads), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_a_sequence_in_two_halves_equals_the_whole_through_the_state():
    q, k, v, g, beta, state = random_inputs(150)
    whole, last = gated_delta_rule(q, k, v, g, beta, initial_state=state)
    first, middle = gated_delta_rule(*(x[:, :70] for x in (q, k, v, g, beta)), initial_state=state)
    second, end = gated_delta_rule(*(x[:, 70:] for x in (q, k, v, g, beta)), initial_state=middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(end, last, atol=1e-12, rtol=1e-12)


def test_neutral_tokens_leave_the_state_alone():
    q, k, v, g, beta, state = (x.detach() for x in random_inputs(9))
    _, last = gated_delta_rule(q, k, v, torch.zeros_like(g), torch.zeros_like(beta), initial_state=state)
    torch.testing.assert_close(last, state)


def test_strong_decay_neither_overflows_nor_loses_gradients():
    inputs = random_inputs(2 * CHUNK, decay=200.0, dtype=torch.float32)
    out, state = gated_delta_rule(*inputs[:5], initial_state=inputs[5])
    grads = torch.autograd.grad(out.sum() + state.sum(), inputs)
    assert all(torch.isfinite(x).all() for x in (out, state, *grads))


@pytest.mark.parametrize(("dtype", "state_dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_dtypes_are_kept_and_the_state_is_at_least_float32(dtype, state_dtype):
    q, k, v, g, beta, _ = (x.detach().to(dtype) for x in random_inputs(70))
    out, state = gated_delta_rule(q, k, v, g, beta)
    assert (out.dtype, state.dtype) == (dtype, state_dtype)


def test_an_empty_sequence_passes_the_state_through():
    q, k, v, g, beta, state = (x.detach() for x in random_inputs(4))
    out, last = gated_delta_rule(*(x[:, :0] for x in (q, k, v, g, beta)), initial_state=state)
    assert out.shape[1] == 0
    assert torch.equal(last, state)


def test_fla_without_cuda_is_an_error_that_names_the_setting():
    with pytest.raises(UserError, match=r"kernels\.gated_delta=fla needs a CUDA device"):
        select_backend("fla", torch.device("cpu"), torch.float32)
    assert select_backend("auto", torch.device("cpu"), torch.float32) == "torch"
    assert select_backend("auto", torch.device("cuda"), torch.float64) == "torch", "fla has no float64"


def test_fla_is_told_that_queries_are_scaled_and_to_give_the_state(monkeypatch):
    told, kernel = {}, ModuleType("fla.ops.gated_delta_rule")

    def chunk_gated_delta_rule(q, k, v, **settings):
        told.update(settings)
        return v, settings["initial_state"]

    kernel.chunk_gated_delta_rule = chunk_gated_delta_rule
    triton = ModuleType("triton")
    triton.__version__ = "3.9.0"
    for module in (ModuleType("fla"), ModuleType("fla.ops"), kernel, triton):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    q, k, v, g, beta, state = (x.detach() for x in random_inputs(4))
    try:
        out, last = gated_delta_rule(q, k, v, g, beta, state, backend="fla")
    finally:
        fla_hopper.replace_miscompiled_kernel.cache_clear()
    assert (out is v, last is state) == (True, True)
    assert told.pop("g") is g
    assert told.pop("beta") is beta
    assert told == {"scale": 1.0, "initial_state": state, "output_final_state": True}
