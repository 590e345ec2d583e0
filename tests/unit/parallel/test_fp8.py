"""FP8 layers: which are chosen, what recipes ask for, padding, and the emulated arithmetic against its definition."""

import contextlib
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kairos_train.basics.errors import UserError
from kairos_train.config.schema import ActionStreamConfig, Config, ModelConfig, VideoStreamConfig
from kairos_train.model import WorldActionModel
from kairos_train.model.layout import check_widths, empty_model, model_hooks
from parallel import fp8
from parallel.config import Fp8Config
from parallel.fp8 import TransformerEngineLinear
from parallel.fp8_emulated import BACKWARD, FORWARD, EmulatedFp8Linear, scale_of, to_fp8
from parallel.topology import Degrees, Topology


def policy(recipe="current", *, streams=("video",), skip=(), layers=32):
    return fp8.Fp8Policy(Fp8Config(recipe=recipe, streams=list(streams), skip_layers=list(skip)), layers)


def rounded(x, dtype):
    """Quantise and dequantise, in float64, from the definition."""
    largest = torch.finfo(dtype).max
    scale = largest / x.double().abs().max() if x.numel() and x.any() else torch.tensor(1.0, dtype=torch.float64)
    return (x.double() * scale).clamp(-largest, largest).to(dtype).double() / scale


# --- which layers ---


def test_layers_of_the_named_streams_are_chosen_except_the_skipped():
    chosen = policy(skip=[0, 1, -1])
    assert [layer for layer in range(32) if not chosen.applies("video", layer)] == [0, 1, 31]
    assert not any(chosen.applies("action", layer) for layer in range(32))
    both = policy(streams=["video", "action"], skip=[-32])
    assert [both.applies(stream, 0) for stream in ("video", "action")] == [False, False]
    assert [both.applies(stream, 1) for stream in ("video", "action")] == [True, True]


def test_no_recipe_chooses_nothing():
    assert not any(policy(recipe=None).applies("video", layer) for layer in range(32))
    assert policy(recipe=None).alignment == policy(recipe="emulated").alignment == 1


def small_config(recipe, streams=("video",), skip=()):
    config = Config()
    config.model = ModelConfig(num_layers=4, num_heads=2, text_dim=32, freq_dim=32)
    config.model.video = VideoStreamConfig(dim=64, ffn_dim=128, gdn_key_dim=16, gdn_value_dim=32)
    config.model.action = ActionStreamConfig(dim=32, ffn_dim=64, action_dim=4, state_dim=4)
    config.precision.fp8 = Fp8Config(recipe=recipe, streams=list(streams), skip_layers=list(skip))
    return config


@pytest.mark.parametrize(("recipe", "kind"), [("current", TransformerEngineLinear), ("emulated", EmulatedFp8Linear)])
def test_in_the_model_the_large_products_of_the_chosen_blocks_are_in_fp8_and_nothing_else(recipe, kind):
    config = small_config(recipe, streams=["video", "action"], skip=[0])
    model = empty_model(config, Topology.single(torch.device("cpu")))
    attention = [f"{part}.{name}" for part in ("self_attn", "cross_attn") for name in "qkvo"]
    ffn = ["ffn.0", "ffn.2"]
    gated = [f"gated_delta.{name}_proj" for name in "qkvgo"] + [f"cross_attn.{name}" for name in "qkvo"]
    expected = set()
    for layer in (1, 2, 3):
        video = gated if layer == 3 else attention
        expected |= {f"video_dit.blocks.{layer}.{name}" for name in [*video, *ffn]}
        expected |= {f"action_dit.blocks.{layer}.{name}" for name in [*attention, *ffn]}
    assert {name for name, module in model.named_modules() if isinstance(module, kind)} == expected
    plain = empty_model(small_config(None), Topology.single(torch.device("cpu")))
    assert {n: p.shape for n, p in model.state_dict().items()} == {n: p.shape for n, p in plain.state_dict().items()}


@pytest.mark.parametrize("stream", ["video", "action"])
def test_a_stream_that_is_not_named_has_no_fp8_layer(stream):
    model = empty_model(small_config("current", streams=[stream]), Topology.single(torch.device("cpu")))
    chosen = {
        name.partition("_")[0] for name, module in model.named_modules() if type(module) is TransformerEngineLinear
    }
    assert chosen == {stream}


def test_a_model_in_emulated_fp8_computes_the_plain_model_nearly():
    inputs = {
        "latents": torch.randn(1, 16, 5, 4, 4),
        "context": torch.randn(1, 3, 32),
        "context_mask": None,
        "video_timestep": torch.tensor([500.0]),
        "history_frames": [1],
    }
    outputs = {}
    for recipe in (None, "emulated"):
        config = small_config(recipe)
        torch.manual_seed(0)
        hooks = model_hooks(config, Topology.single(torch.device("cpu")))
        model = WorldActionModel(config.model, config.kernels, hooks=hooks)
        torch.nn.init.normal_(model.video_dit.head.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
        outputs[recipe] = model(**inputs).video
        outputs[recipe].sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.video_dit.parameters())
    error = (outputs["emulated"] - outputs[None]).norm() / outputs[None].norm()
    assert 1e-4 < error < 0.1


# --- what recipes ask for ---


@pytest.mark.parametrize(("recipe", "alignment"), [("current", 16), ("delayed", 16), ("block", 16), ("mxfp8", 32)])
def test_a_width_off_the_alignment_is_refused_before_anything_is_built(recipe, alignment):
    for widths in ((alignment, alignment + 8), (alignment + 8, alignment)):
        with pytest.raises(UserError, match=rf"recipe={recipe} needs .* multiples of {alignment}, .* {alignment + 8};"):
            fp8.make_linear(policy(recipe), *widths)
    layer = fp8.make_linear(policy(recipe), alignment, 2 * alignment)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "weight": (2 * alignment, alignment),
        "bias": (2 * alignment,),
    }


def test_widths_of_the_full_model_fit_every_tensor_degree_and_those_of_an_odd_one_do_not():
    model = ModelConfig()
    for recipe in fp8.RECIPE_CLASSES:
        for tensor in (1, 2, 4):
            check_widths(policy(recipe, streams=["video", "action"]), model, tensor)
    model.video.gdn_key_dim = 24  # 480 over 4 ranks is 120
    check_widths(policy(), model, 1)
    with pytest.raises(UserError, match="multiples of 16, but a rank has 120;"):
        check_widths(policy(), model, 4)
    check_widths(policy(skip=range(3, 32, 4)), model, 4)  # no Gated DeltaNet layer left
    check_widths(policy("emulated"), model, 4)
    model.action.ffn_dim = 4100
    check_widths(policy(), model, 1)
    with pytest.raises(UserError, match="but a rank has 4100;"):
        check_widths(policy(streams=["action"]), model, 1)
    model.action = None
    check_widths(policy(streams=["action"]), model, 1)


@pytest.mark.parametrize(
    ("recipe", "capability", "fits"),
    [
        ("current", (8, 0), False),
        ("current", (8, 9), True),
        ("delayed", (9, 0), True),
        ("block", (8, 9), False),
        ("block", (9, 0), True),
        ("mxfp8", (9, 0), False),
        ("mxfp8", (10, 0), True),
    ],
)
def test_a_recipe_asks_for_its_compute_capability(recipe, capability, fits):
    fault = fp8.capability_fault(policy(recipe), capability)
    assert (fault is None) == fits
    if not fits:
        assert f"precision.fp8.recipe={recipe} needs compute capability" in fault
        assert f"has {capability[0]}.{capability[1]}; use " in fault
        assert recipe not in fault.partition("; use ")[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("recipe", fp8.RECIPE_CLASSES)
def test_a_machine_without_gpu_is_told_so_and_what_to_use(recipe):
    with pytest.raises(UserError, match=rf"recipe={recipe} needs a CUDA GPU .*recipe=emulated .*recipe=null$"):
        fp8.require(policy(recipe))


def test_recipes_without_transformer_engine_need_nothing():
    fp8.require(policy("emulated"), recompute="block", context=4)
    fp8.require(policy(None))


def test_delayed_scaling_refuses_recomputation_and_context_parallelism():
    with pytest.raises(UserError, match=r"train\.recompute=block.*recipe=current"):
        fp8.require(policy("delayed"), recompute="block")
    with pytest.raises(UserError, match=r"parallel\.context=2.*recipe=current"):
        fp8.require(policy("delayed"), context=2)


@pytest.mark.skipif(fp8.importlib.util.find_spec("transformer_engine") is not None, reason="it is installed")
def test_missing_transformer_engine_is_named_with_its_remedy():
    assert "not installed; `pip install" in fp8._transformer_engine_fault(policy())


class Recipe:
    """A recipe of Transformer Engine, as far as it is asked for here."""

    def __init__(self, **settings):
        self.settings = settings


@pytest.fixture
def engine(monkeypatch):
    """Transformer Engine's names, in place of the package; gives what `autocast` was told, from the outermost on."""
    told = []
    package, pytorch, common = (ModuleType(f"transformer_engine{end}") for end in ("", ".pytorch", ".common"))
    recipe, quantization = ModuleType("recipe"), ModuleType("quantization")

    @contextlib.contextmanager
    def autocast(**settings):
        told.append(settings)
        yield

    for name in fp8.RECIPE_CLASSES.values():
        setattr(recipe, name, type(name, (Recipe,), {}))
    pytorch.autocast, common.recipe = autocast, recipe
    quantization.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: bool(told))
    package.pytorch, package.common, pytorch.quantization = pytorch, common, quantization
    for module in (package, pytorch, common, recipe, quantization):
        inside = {"recipe": "transformer_engine.common.", "quantization": "transformer_engine.pytorch."}
        monkeypatch.setitem(sys.modules, inside.get(module.__name__, "") + module.__name__, module)
    fp8._recipe.cache_clear()
    yield told
    fp8._recipe.cache_clear()


def distinct_groups(**degrees):
    """A rank's place with stand-ins for process groups, which nothing is sent through."""
    groups = {f"{kind}_group": f"the {kind} group" for kind in ("tensor", "context", "gradient", "data")}
    return replace(Topology.single(torch.device("cpu")), degrees=Degrees(**degrees), **groups)


def test_delayed_scaling_reduces_its_magnitudes_over_tensor_ranks_and_no_others(engine):
    config = small_config("delayed")
    with model_hooks(config, distinct_groups(tensor=2, context=1, data=2)).autocast():
        pass
    alone = replace(distinct_groups(data=4), tensor_group=None)
    with model_hooks(config, alone).autocast():
        pass
    assert [told["amax_reduction_group"] for told in engine] == ["the tensor group", None]
    assert [told["recipe"].settings for told in engine] == [{"reduce_amax": True}, {"reduce_amax": False}]
    assert {type(told["recipe"]).__name__ for told in engine} == {"DelayedScaling"}
    assert all(told["enabled"] for told in engine)


def test_recipes_without_state_reduce_nothing_and_open_around_each_layer(engine):
    for recipe, name in fp8.RECIPE_CLASSES.items():
        with fp8.forward_autocast(policy(recipe), "group"):
            outside = len(engine)
            with fp8._layer_autocast(policy(recipe), "group"):
                pass
        if recipe != "delayed":
            assert (outside, len(engine)) == (0, 1)
            assert engine[0].keys() == {"enabled", "recipe"}
            assert (type(engine[0]["recipe"]).__name__, engine[0]["recipe"].settings) == (name, {})
        engine.clear()
    with pytest.raises(RuntimeError, match=r"within parallel\.fp8\.forward_autocast"):
        fp8._layer_autocast(policy("delayed"), None).__enter__()


def test_all_layers_and_calls_share_one_recipe(engine):
    for recipe in ("current", "delayed"):
        for _ in range(2):
            with fp8.forward_autocast(policy(recipe), "group"), fp8._layer_autocast(policy(recipe), "group"):
                pass
        assert len(engine) == 2
        assert engine[0]["recipe"] is engine[1]["recipe"]
        engine.clear()


def test_layers_of_a_layout_reduce_over_its_tensor_ranks():
    hooks = model_hooks(small_config("current"), distinct_groups(tensor=2, context=2, data=2)).video.for_layer(1)
    column, row = hooks.column_linear(64, 64), hooks.row_linear(64, 64)
    assert column.group == row.group == "the tensor group"
    assert (column.weight.shape, row.weight.shape) == ((32, 64), (64, 32))
    assert column.complete is None
    assert row.complete.keywords == {"group": "the tensor group"}
    assert (row.complete.func.__name__, column.bias.shape, row.bias.shape) == ("reduce_from", (32,), (64,))


def test_a_row_layer_leaves_each_tensor_rank_the_sums_of_its_own_tokens_under_sequence_parallelism():
    config = small_config("current", streams=["video", "action"])
    config.parallel.sequence = True
    hooks = model_hooks(config, distinct_groups(tensor=2, context=2, data=2))
    video, action = (stream.for_layer(1).row_linear(64, 64).complete for stream in (hooks.video, hooks.action))
    assert (video.func.__name__, video.keywords) == ("scatter_sums", {"dim": 2, "group": "the tensor group"})
    assert action.func.__name__ == "reduce_from", "no layout splits actions by tokens"


def test_a_shard_is_a_plain_linear_layer_to_state_dicts_and_can_be_built_on_meta():
    with torch.device("meta"):
        layer = fp8.make_linear(policy(), 64, 32, bias=False, complete=torch.sum)
    assert isinstance(layer, torch.nn.Linear)
    assert list(layer.state_dict()) == ["weight"]
    assert layer.weight.is_meta


# --- padding ---


@pytest.mark.parametrize(("tokens", "padded"), [(0, 16), (1, 16), (16, 16), (33, 48)])
def test_tokens_are_padded_to_whole_tiles_and_cut_again(tokens, padded):
    x = torch.randn(tokens, 3)
    tile = fp8.pad_rows(x, 16)
    assert tile.shape == (padded, 3)
    assert not tile[tokens:].any()
    assert torch.equal(fp8.cut_rows(tile, tokens), x)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 40), multiple=st.sampled_from([8, 16, 32]), seed=st.integers(0, 99))
def test_padding_changes_neither_outputs_nor_gradients_of_an_fp8_layer(tokens, multiple, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = EmulatedFp8Linear(8, 5)
    # Small whole numbers: sums are exact, so that equality is exact whatever their order.
    x = torch.randint(-4, 5, (tokens, 8), generator=generator).float().requires_grad_()
    cotangent = torch.randint(-4, 5, (tokens, 5), generator=generator).float()
    results = []
    for wrap in (False, True):
        y = fp8.cut_rows(layer(fp8.pad_rows(x, multiple)), tokens) if wrap else layer(x)
        results.append((y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), cotangent)))
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-6, atol=1e-6)
    assert torch.equal(results[0][0], results[1][0])


# --- emulated arithmetic ---


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 9),
    magnitudes=st.tuples(*[st.sampled_from([1e-30, 1e-4, 1.0, 3e3])] * 3),
    seed=st.integers(0, 999),
)
def test_all_three_products_take_rounded_operands(tokens, magnitudes, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = EmulatedFp8Linear(16, 12)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(12, 16, generator=generator) * magnitudes[1])
    x = (torch.randn(2, tokens, 16, generator=generator) * magnitudes[0]).requires_grad_()
    g = torch.randn(2, tokens, 12, generator=generator) * magnitudes[2]
    y = layer(x)
    grads = torch.autograd.grad(y, (x, layer.weight, layer.bias), g)
    x8, w8, g8 = rounded(x.detach(), FORWARD), rounded(layer.weight.detach(), FORWARD), rounded(g, BACKWARD)
    expected = (
        x8 @ w8.T + layer.bias.double(),
        g8 @ w8,
        torch.einsum("bso,bsi->oi", g8, x8),
        g.double().sum((0, 1)),
    )
    for ours, reference in zip((y, *grads), expected, strict=True):
        scale = float(reference.detach().abs().max())
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=2e-6 * scale + 1e-37)


def test_operands_lose_what_eight_bits_lose_and_no_more():
    x = torch.linspace(0.1, 1, 1000)
    for dtype, half_step in ((FORWARD, 2**-4), (BACKWARD, 2**-3)):
        scale = scale_of(x, dtype)
        error = (to_fp8(x, scale, dtype).float() / scale - x).abs() / x
        bound = half_step / (1 + half_step)
        assert 0.95 * bound < error.max() <= 1.001 * bound


def test_gradients_are_coarser_than_activations():
    layer = EmulatedFp8Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))
    values = torch.tensor([[1.0, 1.125, 1.25, 1.375]])  # three bits of mantissa
    scaled = torch.cat([values, torch.full((1, 4), 1.75)])  # the maximum, so that both scales are powers of two
    x = scaled.clone().requires_grad_()
    y = layer(x)
    assert torch.equal(y[0], values[0]), "E4M3 holds them"
    y.backward(scaled)
    assert torch.equal(x.grad[0], torch.tensor([1.0, 1.0, 1.25, 1.5])), "E5M2 rounds to two bits, ties to even"


def test_outputs_follow_the_scale_of_their_operands_exactly():
    layer = EmulatedFp8Linear(32, 8, bias=False)
    x = torch.randn(5, 32)
    for factor in (2.0**-40, 2.0**30):
        assert torch.equal(layer(x * factor), layer(x) * factor)


def test_rounding_saturates_and_shows_what_is_not_finite():
    one = torch.tensor(1.0)
    for dtype in (FORWARD, BACKWARD):
        largest = torch.finfo(dtype).max
        assert to_fp8(torch.tensor([1e9, -1e9]), one, dtype).float().tolist() == [largest, -largest]
        x = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan, 2.0])
        assert scale_of(x, dtype) == largest / 2
        out = to_fp8(x, scale_of(x, dtype), dtype).float()
        assert out.isnan().tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_non_finite_number_reaches_outputs_and_gradients(bad):
    layer = EmulatedFp8Linear(4, 3)
    x = torch.ones(2, 4)
    x[0, 1] = bad
    y = layer(x)
    assert not y[0].isfinite().any()
    assert y[1].isfinite().all()
    y[1].sum().backward()
    assert not layer.weight.grad[:, 1].isfinite().any(), "0·∞ of the token that was not finite"
    layer.zero_grad()
    good = torch.ones(2, 4, requires_grad=True)
    layer(good).backward(torch.tensor([[1.0, bad, 1.0], [1.0, 1.0, 1.0]]))
    assert not good.grad[0].isfinite().any()
    assert good.grad[1].isfinite().all()


def test_zeros_stay_zeros_and_no_tokens_still_have_gradients():
    layer = EmulatedFp8Linear(4, 3)
    assert torch.equal(layer(torch.zeros(2, 4)), layer.bias.expand(2, 3))
    tiny = torch.tensor([[0.0, 1e-42, 0.0, -1e-42]])
    assert layer(tiny).isfinite().all()
    y = layer(torch.zeros(2, 0, 4, requires_grad=True))
    assert y.shape == (2, 0, 3)
    y.sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_layer_keeps_the_dtype_of_its_tensors(dtype):
    layer = EmulatedFp8Linear(16, 8).to(dtype)
    x = torch.randn(3, 16, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert {y.dtype, x.grad.dtype, layer.weight.grad.dtype, layer.bias.grad.dtype} == {dtype}


def test_operands_are_kept_for_backward_in_one_byte_each():
    layer, x = EmulatedFp8Linear(16, 8, bias=False), torch.randn(3, 16, requires_grad=True)
    kept = [t for t in layer(x).grad_fn.saved_tensors if t.ndim]
    assert {t.dtype for t in kept} == {FORWARD}
    assert sorted(tuple(t.shape) for t in kept) == [(3, 16), (8, 16)]


def test_a_frozen_weight_gets_no_gradient():
    layer = EmulatedFp8Linear(4, 4).requires_grad_(False)
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None


def test_a_regression_in_emulated_fp8_follows_the_loss_of_float32():
    def losses(kind):
        torch.manual_seed(0)
        teacher = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.SiLU(), torch.nn.Linear(32, 4))
        student = torch.nn.Sequential(kind(16, 64), torch.nn.SiLU(), kind(64, 4))
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
        x = torch.randn(1024, 16)
        y = teacher(x).detach()
        curve = []
        for step in range(120):
            rows = slice(step % 8 * 128, step % 8 * 128 + 128)
            loss = (student(x[rows]) - y[rows]).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
        return torch.tensor(curve)

    plain, emulated = losses(torch.nn.Linear), losses(EmulatedFp8Linear)
    assert plain[-8:].mean() < 0.1 * plain[:8].mean()
    falling = slice(8, 60)  # later on the loss is down at the noise of rounding
    assert ((emulated - plain)[falling].abs() / plain[falling]).mean() < 0.05
    assert not torch.equal(emulated, plain)
