"""Weights in few bits: what rounding costs, what a file holds, and that a loaded policy computes with just that."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.tiny_export import tiny_config, write_tiny_checkpoint

from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.writing import write_checkpoint
from kairos_train.config.compose import load_config, to_yaml
from kairos_train.inference.load import load
from kairos_train.inference.predict import Predictor
from kairos_train.inference.quantized import (
    CODES,
    METHODS,
    SCALE,
    QuantizedLinear,
    dequantize,
    is_large,
    layout,
    steps_and_centres,
)
from kairos_train.model import WorldActionModel
from kairos_train.model.public_keys import public_keys
from kairos_train.weights.export import export
from kairos_train.weights.import_public import import_weights
from kairos_train.weights.quantize import encode, find_scales

LIMITS = {"int8": 0.01, "fp8": 0.04, "int4": 0.12}
"""Relative L2 error of the outputs."""

BITS = {"int8": 8, "fp8": 8, "int4": 4}


def rounded(method: str, weight: torch.Tensor) -> torch.Tensor:
    scales = find_scales(method, weight)
    parts = {"": encode(method, weight, scales), **scales}
    assert {key: (part.dtype, tuple(part.shape)) for key, part in parts.items()} == layout(method, tuple(weight.shape))
    return dequantize(method, parts, weight.shape[1])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --- rounding ---


@pytest.mark.parametrize(("method", "limit"), [("int8", 0.0075), ("fp8", 0.027), ("int4", 0.064)])
def test_normal_weights_lose_no_more_than_the_bits_must(method, limit):
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    assert relative(rounded(method, weight), weight) < limit


def test_a_last_group_of_few_columns_spans_no_more_than_they_do():
    weight = torch.randn(8, 19, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    weight[:, 16:] = 1.0
    assert torch.equal(rounded("int4", weight)[:, 16:], weight[:, 16:])


def test_rows_in_fp8_take_the_better_of_two_largest_codes():
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    scale, largest = find_scales("fp8", weight)[SCALE], weight.abs().amax(1)
    tops = (largest / scale).round()
    assert set(tops.tolist()) == {448.0, 256.0}

    def errors(top):
        scale = largest[:, None] / top
        return ((weight / scale).to(CODES["fp8"]).float() * scale - weight).square().sum(1)

    better = torch.where(errors(256.0) < errors(448.0), 256.0, 448.0)
    assert torch.equal(tops, better)


def test_uniform_weights_in_int4_lose_no_more_than_sixteen_levels_over_a_groups_span_must():
    weight = torch.rand(64, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert relative(rounded("int4", weight), weight) < 0.053


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 24, 63, 65])
@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_columns_keeps_every_weight_in_its_place(method, columns):
    """Odd numbers of columns share no byte across rows; the last int4 group has what is left."""
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    back = rounded(method, weight)
    assert back.shape == weight.shape
    assert (back - weight).abs().max() < 0.25 * weight.abs().max()
    if method != "int4":  # whose steps have other numbers to choose from when the row's largest weight is another
        torch.testing.assert_close(rounded(method, back), back, rtol=1e-6, atol=0)  # what can be represented stays


@pytest.mark.parametrize("method", METHODS)
def test_each_row_or_group_has_its_own_scale(method):
    weight = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    weight = torch.stack([weight[0] * 1e-3, weight[1] * 1e3, torch.zeros(128)])
    weight[0, 64:] *= 100 if method == "int4" else 1
    back = rounded(method, weight)
    for part in (slice(None, 64), slice(64, None)):
        for row in range(2):
            assert relative(back[row, part], weight[row, part]) < 0.12
    assert not back[2].any()


def test_an_int4_group_clips_where_that_costs_less_than_it_saves():
    weight = torch.cat([torch.linspace(-1, 1, 15), torch.tensor([1.25])])[None]
    parts = find_scales("int4", weight)
    steps, _ = steps_and_centres(parts["_scale"], parts["_groups"])
    assert steps.item() * 15 < 2.2  # not all of the 2.25 from the least to the largest
    assert relative(rounded("int4", weight), weight) < 0.045


def test_an_int4_group_far_from_zero_keeps_its_differences():
    weight = torch.randn(4, 48, generator=torch.Generator().manual_seed(0)) + 3
    assert relative(rounded("int4", weight) - 3, weight - 3) < 0.12


def test_int4_codes_are_two_per_byte_even_columns_low():
    weight = torch.tensor([[-8.0, 7.0, 1.0]])
    groups = torch.tensor([[[1.0, 0.0]]]).to(torch.float8_e4m3fn)
    parts = {"_scale": torch.ones(1, 2), "_groups": groups}
    codes = encode("int4", weight, parts)
    assert codes.tolist() == [[0 | 15 << 4, 9]]
    assert dequantize("int4", {"": codes, **parts}, 3).tolist() == weight.tolist()


def test_a_quantised_layer_multiplies_in_the_precision_of_its_input():
    weight, x = torch.randn(6, 10), torch.randn(3, 10)
    layer = QuantizedLinear("int8", 10, 6, bias=True)
    scales = find_scales("int8", weight)
    codes = encode("int8", weight, scales)
    layer.load_state_dict({"weight": codes, "weight_scale": scales["_scale"], "bias": torch.ones(6)})
    torch.testing.assert_close(layer(x), x @ rounded("int8", weight).T + 1)
    layer.bias.data = layer.bias.data.bfloat16()
    assert layer(x.bfloat16()).dtype == torch.bfloat16


# --- exports ---


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, shards) -> Path:
    """A checkpoint of the tiny model with its initial weights, and heads that are not zero."""
    config = tiny_config()
    config.model = load_config(["model=tiny"], sections=()).model
    config.encoders.text.text_dim = config.model.text_dim
    torch.manual_seed(0)
    model = WorldActionModel(config.model)
    for head in (model.video_dit.head.head, model.action_dit.head):
        torch.nn.init.xavier_uniform_(head.weight)
    files = {"config.yaml": to_yaml(config), "dataset_stats.json": (shards / "dataset_stats.json").read_text()}
    folder = tmp_path_factory.mktemp("fresh")
    return write_checkpoint(folder, 0, sections={"ema": model.state_dict()}, state={"encoders": None}, files=files)


@pytest.fixture(scope="module")
def exports(fresh, tmp_path_factory) -> dict[str | None, tuple[Path, dict]]:
    """method → export folder and the command's summary; None: not quantised."""
    folder = tmp_path_factory.mktemp("quantised")
    made = {}
    for method in (None, *METHODS):
        out = folder / str(method)
        made[method] = out, export(fresh, out, quantize=method, file_bytes=300_000)
    return made


def outputs(folder: Path, dtype: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Both velocities of a loaded export on inputs of its own."""
    model = load(folder, dtype=dtype).model
    rng = torch.Generator().manual_seed(11)
    latents, context = torch.randn(2, 16, 3, 8, 8, generator=rng), torch.randn(2, 9, 64, generator=rng)
    action, state = torch.randn(2, 8, 4, generator=rng), torch.randn(2, 1, 4, generator=rng)
    times = torch.tensor([100.0, 900.0])
    options = {"state": state, "action": action, "action_timestep": times}
    if dtype == "bf16":
        latents, context = latents.bfloat16(), context.bfloat16()
    with torch.no_grad():
        video, actions = model(latents, context, None, times, [1, 1], **options)
    return video.float(), actions.float()


@pytest.mark.parametrize("method", METHODS)
def test_outputs_of_a_fresh_model_stay_within_the_limit(exports, method):
    folder, summary = exports[method]
    reported = summary["quantization_error"]["relative_l2"]
    assert set(reported) == {"video", "action"}
    assert all(0 < error <= LIMITS[method] for error in reported.values())
    for stream, quantized, reference in zip(reported, outputs(folder), outputs(exports[None][0]), strict=True):
        error = relative(quantized, reference)
        assert error <= LIMITS[method]
        assert reported[stream] / 3 < error < reported[stream] * 3  # other inputs, the same weights
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_error"] == summary["quantization_error"]
    assert f"differ by video {reported['video']:.2%}" in (folder / "README.md").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_size_on_disk_is_the_computed_one(exports, method):
    folder, summary = exports[method]
    on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert (summary["bytes"], summary["bytes"] - summary["header_bytes"]) == (on_disk, summary["computed_bytes"])
    shapes = public_keys(load(folder).config.model)
    numel = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    kept = sum(2 * n for name, n in numel.items() if not is_large(name))
    codes = sum(n * BITS[method] // 8 for name, n in numel.items() if is_large(name))
    rows = sum(shapes[name][0] for name in shapes if is_large(name))
    scales = 4 * rows
    if method == "int4":
        scales = 8 * rows + sum(2 * n // 16 for name, n in numel.items() if is_large(name))  # multiples of 16 here
    assert summary["computed_bytes"] == kept + codes + scales
    assert summary["computed_bytes"] < exports[None][1]["computed_bytes"]


@pytest.mark.parametrize("method", METHODS)
def test_only_large_layers_are_quantised(exports, method):
    model = load(exports[method][0]).model
    quantized = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    shapes = public_keys(load(exports[None][0]).config.model)
    assert quantized == {name for name in shapes if is_large(name)}
    # Per layer q, k, v, o of self- and cross-attention and the FFN; Gated DeltaNet layers have q, k, v, o projections
    # instead.
    assert len(quantized) == 2 * 4 * 10 == exports[method][1]["quantization"]["layers"]
    kept = ("head", "embedding", "modulation", "norm", "conv", "encoder", "projection", "_proj.weight", "A_log")
    assert not [name for name in quantized if any(word in name for word in kept if word != "_proj.weight")]
    assert not [name for name in quantized if name.endswith(("a_proj.weight", "b_proj.weight", "g_proj.weight"))]
    whole = load(exports[None][0]).model.state_dict()
    state = model.state_dict()
    assert all(torch.equal(state[name], whole[name]) for name in whole if name not in quantized)


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_policy_runs_in_bfloat16(exports, method):
    model = load(exports[method][0], dtype="bf16").model
    codes = {module.weight.dtype for module in model.modules() if isinstance(module, QuantizedLinear)}
    assert codes == {{"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}[method]}
    for quantized, reference in zip(outputs(exports[method][0], "bf16"), outputs(exports[None][0])):
        assert relative(quantized, reference) < LIMITS[method] + 0.02


def test_a_quantised_policy_predicts(shards, tmp_path):
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoints", shards)
    chunks = {}
    for method in (None, "int8"):
        export(checkpoint, tmp_path / str(method), dtype="fp32", quantize=method)
        predictor = Predictor(load(tmp_path / str(method)))
        chunks[method] = predictor.predict(np.zeros((32, 32, 3), np.uint8), np.zeros(2), "go", seed=0).actions
    span = np.abs(chunks[None]).max()
    assert 0 < np.abs(chunks["int8"] - chunks[None]).max() < 0.2 * span


def test_zero_outputs_have_no_relative_error(tmp_path):
    config = tiny_config(streams="video", actions=False)
    model = WorldActionModel(config.model)  # heads are zero
    files = {"config.yaml": to_yaml(config)}
    path = write_checkpoint(tmp_path, 0, sections={"ema": model.state_dict()}, state={"encoders": None}, files=files)
    assert export(path, tmp_path / "out", quantize="int4")["quantization_error"]["relative_l2"] == {"video": None}
    load(tmp_path / "out")


# --- what is refused ---


def test_quantised_exports_are_neither_mixed_nor_relabelled(exports, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(exports["int8"][0], mixed)
    config = json.loads((mixed / "config.json").read_text())
    for method, match in (("fp8", "is not as it was exported"), ("int4", "has shape"), ("int3", "must be one of")):
        changed = {**config, "quantization": {**config["quantization"], "method": method}}
        (mixed / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=match):
            load(mixed)
    (mixed / "config.json").write_text(json.dumps({**config, "quantization": None}))
    with pytest.raises(UserError, match=r"weight_scale' has shape .* in the file and none by config\.json"):
        load(mixed)
    shutil.copy(exports["fp8"][0] / "config.json", mixed)
    with pytest.raises(UserError, match="is of another export"):
        load(mixed)


def test_the_public_layout_is_not_quantised_and_codes_are_not_imported(fresh, exports, tmp_path):
    with pytest.raises(UserError, match="the public code reads no scales"):
        export(fresh, tmp_path / "out", form="public", quantize="int8")
    with pytest.raises(UserError, match="quantize='int2'"):
        export(fresh, tmp_path / "out", quantize="int2")
    index = exports["int8"][0] / "model.safetensors.index.json"
    with pytest.raises(UserError, match=r"attn\.k\.weight' is int8, no floating type; quantised weights cannot be"):
        import_weights(index, tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_every_file_holds_plain_tensors(exports):
    for method in METHODS:
        tensors = {k: v for file in exports[method][0].glob("*.safetensors") for k, v in load_file(file).items()}
        scales = {name for name in tensors if name.endswith("_scale")}
        assert {name.removesuffix("_scale") for name in scales} == {name for name in tensors if is_large(name)}
        assert dataclasses.asdict(load(exports[method][0]).config)["model"]["name"] == "tiny"
