"""In bfloat16 every parameter is cast, and what is delicate computes in float32 from the cast values (constraint 20).

Each part is run on bfloat16 numbers and compared, bit by bit, with the same numbers in float32 and no rounding but the
one at its end. Arithmetic in bfloat16 anywhere between would show in a good part of all elements.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from support.model_factory import make_config, randomize
from torch import Tensor, nn

from kairos_train.model import WorldActionModel
from kairos_train.model.block import Block
from kairos_train.model.gated_delta_net import CausalConvolution, GatedDeltaNet, RMSNorm
from kairos_train.model.hooks import SingleDevice
from kairos_train.model.kernels import rotary
from kairos_train.model.kernels.attention import Attention, FullWidthRMSNorm
from kairos_train.model.kernels.delta_rule import gated_delta_rule
from kairos_train.model.precision import LayerNorm, UpcastLinear, dtype_of, upcast, wide
from kairos_train.model.streams import VideoHead
from kairos_train.model.timestep import sinusoid
from parallel import hooks as sharded
from parallel.config import Fp8Config, ParallelConfig
from parallel.exchange.state_passing import read_gradient
from parallel.fp8 import Fp8Policy
from parallel.topology import Topology

EPS = 1e-6
D, HEADS, HEAD = 24, 2, 12


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers that bfloat16 holds."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def low(module: nn.Module) -> nn.Module:
    """The module in bfloat16, with weights under which everything matters."""
    with torch.no_grad():
        for i, (name, p) in enumerate(module.named_parameters()):
            near = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(draw(*p.shape, seed=i + 1, scale=0.5).float() + near)
    return module.bfloat16()


def in_float32(module: nn.Module, like: nn.Module) -> nn.Module:
    """The same weights, without another rounding."""
    module.load_state_dict({name: value.float() for name, value in like.state_dict().items()})
    return module


def same(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    torch.testing.assert_close(
        a, b, rtol=2e-6 if a.dtype == torch.float32 else 0, atol=2e-6 * (a.dtype != torch.bfloat16)
    )


def input_of(module: nn.Module, run) -> Tensor:
    """What `module` is given while `run` runs."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    run()
    handle.remove()
    return seen[0]


# --- the rule itself ---


def test_only_sixteen_bits_are_widened():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert wide(dtype) == upcast(torch.ones(1, dtype=dtype)).dtype == torch.float32
    assert wide(torch.float64) == upcast(torch.ones(1).double()).dtype == torch.float64
    assert dtype_of(nn.Linear(2, 2).bfloat16()) == torch.bfloat16


# --- norms ---


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_computes_and_answers_in_float32(affine):
    norm, x = low(LayerNorm(D, EPS, affine=affine)), draw(5, D, scale=3.0) + 4
    weight, bias = (norm.weight.float(), norm.bias.float()) if affine else (None, None)
    same(norm(x), F.layer_norm(x.float(), (D,), weight, bias, EPS))


def test_the_norm_of_gated_outputs_computes_and_answers_in_float32():
    norm, x = low(RMSNorm(D, EPS)), draw(5, D)
    same(norm(x), x.float() / (x.float().pow(2).mean(-1, keepdim=True) + EPS).sqrt() * norm.weight.float())


def one_rank_of_a_layout() -> sharded.StreamHooks:
    alone = Topology.single(torch.device("cpu"))
    return sharded.video_hooks(alone, ParallelConfig(), Fp8Policy(Fp8Config(), 1))


@pytest.mark.parametrize("hooks", [SingleDevice(), one_rank_of_a_layout()], ids=["plain", "sharded"])
def test_the_norm_of_queries_and_keys_takes_its_mean_square_in_float32(hooks):
    x = draw(5, D, scale=7.0)
    mean = x.float().pow(2).mean(-1, keepdim=True)
    same(hooks.mean_square(x), mean)
    norm = low(FullWidthRMSNorm(D, EPS, hooks))
    same(norm(x), x.float() / (mean + EPS).sqrt() * norm.weight.float())
    assert hooks.mean_square(x.double()).dtype == torch.float64


def test_unit_vectors_are_made_in_float32():
    x = draw(5, D)
    same(GatedDeltaNet._unit(x), x.float() / (x.float().pow(2).sum(-1, keepdim=True) + 1e-6).sqrt())


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
def test_every_epsilon_is_1e_6_and_stands_inside_of_the_root(size):
    """At such sizes epsilon decides: half of what is under the root, nearly nothing, or all of it."""
    x = size * draw(3, D).double()
    mean, centred = x.pow(2).mean(-1, keepdim=True), x - x.mean(-1, keepdim=True)
    norm, full = RMSNorm(D, EPS).double(), FullWidthRMSNorm(D, EPS, SingleDevice()).double()
    for module in (norm, full):
        nn.init.ones_(module.weight)
        torch.testing.assert_close(module(x), x / (mean + 1e-6).sqrt())
    deviation = (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(LayerNorm(D, EPS, affine=False)(x), centred / deviation)
    torch.testing.assert_close(GatedDeltaNet._unit(x), x / (D * mean + 1e-6).sqrt())


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_every_norm_of_a_model_has_the_configured_epsilon(eps):
    config = make_config()
    assert config.eps == 1e-6
    config.eps = eps
    with torch.device("meta"):
        norms = {
            name: module.eps for name, module in WorldActionModel(config).named_modules() if hasattr(module, "eps")
        }
    kinds = (
        "norm1",
        "norm2",
        "cross_attn_norm",
        "self_attn.norm_q",
        "cross_attn.norm_k",
        "gated_delta.o_norm",
        "head.norm",
    )
    assert all(any(name.endswith(kind) for name in norms) for kind in kinds)
    assert set(norms.values()) == {eps}


# --- time ---


def test_sinusoids_are_taken_in_float64():
    times = torch.tensor([0.0, 0.37, 999.5, 1000.0])
    expected = [
        [f(t * 10000 ** (-i / 4)) for f in (math.cos, math.sin) for i in range(4)] for t in times.double().tolist()
    ]
    out = sinusoid(times, 8)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_timestep_layers_widen_what_they_are_given_and_what_they_have(bias):
    layer = low(UpcastLinear(D, 8, bias=bias))
    for x in (draw(5, D), draw(5, D).float() + 1e-3):
        same(layer(x), F.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None))


def test_both_streams_embed_their_timesteps_in_float32():
    """From float32 timesteps: bfloat16 would know only every fourth one near 1000."""
    config = make_config()
    model = low(WorldActionModel(config))
    whole = in_float32(WorldActionModel(config), model)
    times = torch.tensor([[999.0, 998.1, 3.3], [0.0, 517.7, 1000.0]])
    for ours, exact in zip(model.video_dit.embed_time(times), whole.video_dit.embed_time(times)):
        same(ours, exact)
    same(model.action_dit.embed_time(times[:, 0]), whole.action_dit.embed_time(times[:, 0]))
    assert (model.action_dit.embed_time(times[0, :1]) - model.action_dit.embed_time(times[0, 1:2])).abs().max() > 1e-3


# --- what modulates ---


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return (F.layer_norm(x.float(), (D,), eps=EPS) * (1 + scale) + shift).bfloat16()


def test_a_block_modulates_and_gates_in_float32_and_rounds_once():
    block = low(Block(dim=D, ffn_dim=32, heads=HEADS, head_dim=HEAD, eps=EPS, hooks=SingleDevice()))
    x, time, context = draw(2, 3, 4, D), draw(2, 3, 6, D, seed=9).float() + 1e-3, draw(2, 5, D, seed=8)
    attended = draw(2, 3, 4, D, seed=7)
    scale, shift, gate, ffn_scale, ffn_shift, ffn_gate = (
        (block.modulation.float()[:, None] + time)[:, :, i, None] for i in range(6)
    )
    given, results = [], []
    handle = block.ffn.register_forward_hook(lambda _, inputs, output: results.append((inputs[0], output)))
    out, _ = block(x, time, lambda h: (given.append(h) or attended, None), context, None)
    handle.remove()
    same(given[0], modulated(x, scale, shift))
    x = x + (gate * attended.float()).bfloat16()
    norm = block.cross_attn_norm
    tokens = F.layer_norm(x.float(), (D,), norm.weight.float(), norm.bias.float(), EPS).bfloat16()
    x = x + block.cross_attn.cross(tokens, context, None)
    hidden, ffn = results[0]
    same(hidden, modulated(x, ffn_scale, ffn_shift))
    same(out, x + (ffn_gate * ffn.float()).bfloat16())


def test_the_video_head_modulates_in_float32_shift_first():
    head, x, time = low(VideoHead(D, 8, EPS)), draw(2, 3, 4, D), draw(2, 3, D, seed=9).float() + 1e-3
    shift, scale = ((head.modulation.float()[:, None] + time[:, :, None])[:, :, i, None] for i in range(2))
    same(input_of(head.head, lambda: head(x, time)), modulated(x, scale, shift))


# --- attention ---


def test_queries_and_keys_are_normed_and_turned_in_float32_and_rounded_once():
    layer, x = low(Attention(dim=D, heads=HEADS, head_dim=HEAD, eps=EPS, hooks=SingleDevice())), draw(1, 3, 4, D)
    angles = rotary.grid_angles(torch.tensor([100, 101, 107]), 2, 2, HEAD)
    table = rotary.rotation(angles, torch.float32)
    q, k, v = layer.project(x, x, table)
    for ours, linear, norm in ((q, layer.q, layer.norm_q), (k, layer.k, layer.norm_k)):
        full = linear(x).float()
        full = full / (full.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * norm.weight.float()
        turned = torch.view_as_complex(full.double().view(1, 3, 4, HEADS, HEAD // 2, 2)) * torch.polar(
            torch.ones_like(angles), angles
        ).unsqueeze(-2)
        exact = torch.view_as_real(turned).flatten(-2)
        assert ours.dtype == torch.bfloat16
        assert (ours == exact.bfloat16()).float().mean() > 0.99, "a float32 may fall on the other side of a half"
        torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=1e-6)
    assert torch.equal(v, layer.v(x).unflatten(-1, (HEADS, HEAD)))
    plain, plain_k, _ = layer.normed(x, x)
    assert plain.dtype == plain_k.dtype == torch.float32


def test_rotary_tables_are_rounded_from_float64_to_float32_at_least():
    model = low(WorldActionModel(make_config()))
    far, head = (3, 5001), model.video_dit.head_dim
    for table, angles in (
        (model.video_dit.rotation(far, 4, 4, draw(1)), rotary.grid_angles(torch.tensor(far), 2, 2, head)),
        (model.action_dit.rotation(40, draw(1)), rotary.sequence_angles(40, head, torch.device("cpu"))),
    ):
        assert angles.dtype == torch.float64
        for ours, exact in zip(table, (angles.cos(), angles.sin())):
            assert torch.equal(ours, exact.float().unsqueeze(-2))


def test_turning_is_multiplication_by_complex_numbers_of_adjacent_channels():
    x, angles = draw(3, HEADS, HEAD).double(), draw(3, HEAD // 2, seed=4).double()
    ours = rotary.rotate(x, rotary.rotation(angles, torch.float64))
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(ours, torch.view_as_real(turned).flatten(-2))


def test_angles_restart_per_axis_and_count_frames_by_their_numbers():
    """Not from the first one here: the keys of other frames come turned, from the ranks that hold them."""
    angles, half = rotary.grid_angles(torch.tensor([3, 7]), 2, 3, 16), 8  # pairs: 4 of frames, 2 of height, 2 of width
    assert angles.shape == (2, 6, half)

    def turns(*places: int) -> torch.Tensor:
        return torch.tensor(
            [place * 10000.0 ** (-i / n) for place, n in zip(places, (4, 2, 2)) for i in range(n)], dtype=torch.float64
        )

    for frame, number in enumerate((3, 7)):
        for token, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
            torch.testing.assert_close(angles[frame, token], turns(number, row, column))
    line = rotary.sequence_angles(3, 8, torch.device("cpu"))
    torch.testing.assert_close(line[2], turns(2, 0, 0)[:4])
    assert not line[0].any()


# --- Gated DeltaNet ---


class Listening(SingleDevice):
    """Keeps what the recurrence is given and gives."""

    def start_recurrence(self, rule, q, k, v, g, beta, initial_state):
        self.given = q, k, v, g, beta
        result = rule(q, k, v, g, beta, initial_state)
        self.outputs = result[0]
        return lambda: result


def gated_layer() -> tuple[GatedDeltaNet, Listening]:
    hooks = Listening()
    sizes = {"dim": D, "heads": HEADS, "key_dim": 6, "value_dim": 8, "conv_size": 4, "eps": EPS}
    return low(GatedDeltaNet(**sizes, hooks=hooks, backend="torch")), hooks


def test_decays_write_strengths_and_unit_vectors_are_made_in_float32():
    layer, hooks = gated_layer()
    grid = draw(2, 3, 4, D)
    layer(grid, 3)
    x, (q, k, v, g, beta) = grid.flatten(1, 2), hooks.given
    rate = layer.A_log.float().exp()
    same(layer.log_decay(x), -rate * F.softplus(layer.a_proj(x).float() + layer.dt_bias.float()))
    same(g, layer.log_decay(x))
    same(beta, layer.b_proj(x).float().sigmoid())
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    for ours, linear, convolution, scale in (
        (q, layer.q_proj, layer.q_conv1d, 6**-0.5),
        (k, layer.k_proj, layer.k_conv1d, 1.0),
    ):
        heads = convolution(linear(x), None).unflatten(-1, (HEADS, 6)).float()
        same(ours, (heads * torch.rsqrt(heads.pow(2).sum(-1, keepdim=True) + 1e-6) * scale).bfloat16())


def test_convolutions_sum_their_taps_in_float32_both_ways_and_round_once():
    layer, x, gradient = low(CausalConvolution(D, 4)), draw(2, 9, D), draw(2, 6, D, seed=1)
    leaves = x.requires_grad_(), layer.weight
    wide_x, wide_taps = (t.detach().float().requires_grad_() for t in leaves)
    expected = F.silu(sum(wide_x[:, i : i + 6] * wide_taps[:, 0, i] for i in range(4)))
    ours = layer(x[:, 3:], x[:, :3])
    same(ours, expected.bfloat16())
    exact = torch.autograd.grad(expected, (wide_x, wide_taps), gradient.float())
    for a, b in zip(torch.autograd.grad(ours, leaves, gradient), exact, strict=True):
        same(a, b.bfloat16())


def test_the_output_gate_and_norm_are_float32_and_rounded_once():
    layer, hooks = gated_layer()
    grid = draw(2, 3, 4, D)
    given = input_of(layer.o_proj, lambda: layer(grid, 3))
    gate = F.silu(layer.g_proj(grid.flatten(1, 2)).float()).unflatten(-1, (HEADS, 8))
    o = hooks.outputs.float()
    normed = o * torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + EPS) * layer.o_norm.weight.float()
    same(given, (normed * gate).bfloat16().reshape(2, 3, 4, -1))


def test_the_recurrence_computes_in_float32_between_bfloat16_inputs_and_outputs():
    unit = F.normalize
    q, k = (unit(draw(1, 150, HEADS, 6, seed=i).float(), dim=-1).bfloat16() for i in range(2))
    v, g = draw(1, 150, HEADS, 8, seed=2), -0.05 * torch.rand(1, 150, HEADS)
    beta, start = torch.rand(1, 150, HEADS), torch.randn(1, HEADS, 6, 8)
    for initial in (None, start):
        out, state = gated_delta_rule(q, k, v, g, beta, initial)
        exact, exact_state = gated_delta_rule(q.float(), k.float(), v.float(), g, beta, initial)
        same(out, exact.bfloat16())
        same(state, exact_state)


def test_the_gradient_of_a_state_is_summed_over_tokens_in_float32():
    reads, d_outputs = draw(2, 300, HEADS, 6), draw(2, 300, HEADS, 8, seed=1)
    exact = torch.einsum("bshk,bshv->bhkv", reads.double(), d_outputs.double())
    found = read_gradient(reads, d_outputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert read_gradient(reads.double(), d_outputs.double()).dtype == torch.float64


# --- the whole ---


def test_a_bfloat16_model_gives_its_own_type_and_float16_weights_run_too():
    config = make_config()
    torch.manual_seed(0)
    model = WorldActionModel(config)
    randomize(model)
    inputs = {
        "latents": draw(1, 16, 2, 4, 4).float(),
        "context": draw(1, 3, 12).float(),
        "context_mask": None,
        "video_timestep": torch.tensor([500.0]),
        "history_frames": [1],
    }
    model.eval()
    with torch.no_grad():
        exact = model(**inputs).video
        for dtype in (torch.bfloat16, torch.float16):
            video = model.to(dtype)(**inputs).video
            assert video.dtype == dtype
            assert (video.float() - exact).norm() < 0.02 * exact.norm()
