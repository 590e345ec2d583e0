"""What `verify parallel` trains on, and what it takes for the same training."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.parallel_training_ranks import SIZES, make_config
from support.settings import changed

from kairos_train.basics.errors import UserError
from kairos_train.config.compose import load_config, load_saved, save_config
from kairos_train.objective.flow_matching import FlowMatching
from kairos_train.training.parity import verify
from kairos_train.training.parity.compare import (
    EMPTY_TOKENS,
    SLACK,
    TEXT_TOKENS,
    Trace,
    compare,
    exact_config,
    low_precision,
    make_batch,
)

STAGES = sorted(path.stem for path in (Path(__file__).resolve().parents[3] / "configs/stage").glob("*.yaml"))


def composed(*words, config_dirs=()):
    return load_config(["experiment=demo", *SIZES.split(), *words], config_dirs=config_dirs, sections=verify.SECTIONS)


def batches(config, numbers):
    objective = FlowMatching(config.stage, seed=config.seed, patch=tuple(config.model.video.patch_size[1:]))
    return [make_batch(config, objective, 0, number, torch.device("cpu")) for number in numbers]


# --- batches ---


@pytest.mark.parametrize("stage", STAGES)
def test_every_shipped_stage_has_its_batches(stage):
    made = batches(composed(f"stage={stage}"), range(8))
    assert [batch.latents.shape[2] for batch in made] == [5, 5, 5, 1] * 2
    assert all(batch.latents.isfinite().all() for batch in made)


def test_samples_from_frames_alone_see_the_empty_prompt():
    config = composed("stage=physical", "stage.conditions={i2v: 1}", "stage.cfg_dropout=0", "seed=3")
    first, second = batches(config, (0, 1))
    assert first.context_mask.tolist() == [[True] * EMPTY_TOKENS + [False] * (TEXT_TOKENS - EMPTY_TOKENS)] * 2
    assert torch.equal(first.context, second.context), "one prompt, whatever the micro-batch"
    assert first.context.any()
    other = batches(replace(config, seed=4), (0,))[0]
    assert not torch.equal(other.context, first.context)


def test_data_of_images_alone_need_neither_window_nor_cameras(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/pictures.yaml").write_text("name: pictures\nclips: {most_frames: 1, least_frames: 1}\n")
    for words in (["data=images_256p"], ["data=pictures"], ["data.window.frames=1"]):
        config = load_config(
            ["experiment=demo", "stage=physical_images", "train.micro_batch=2", *words],
            config_dirs=[tmp_path],
            sections=verify.SECTIONS,
        )
        save_config(config, tmp_path / "saved.yaml")
        assert load_saved(tmp_path / "saved.yaml", sections=verify.SECTIONS) == config
        made = batches(config, range(4))
        assert {(batch.latents.shape[2], *batch.history) for batch in made} == {(1, 0, 0)}


# --- limits ---

NAMES = ("a.self_attn.q.weight", "a.cross_attn.k.weight", "a.cross_attn.k.bias", "head.weight")


def trace(*, scale=0.0, off=(), scalars=0.0, size=64):
    """All tensors 1 but a key bias, which is almost nothing; `scale` adds noise, `off` more of it to some."""
    generator, tensors = torch.Generator().manual_seed(int(scale * 1e6)), {}
    for name in NAMES:
        noise = torch.randn(size, generator=generator) * scale
        tiny = 1e-6 if name.endswith("bias") else 1.0
        tensors[name] = tiny * (1 + noise) + 0.5 * (name in off)
    values = torch.full((3, 4), 2.0, dtype=torch.float64) * (1 + scalars)
    return Trace(values, dict(tensors), dict(tensors))


def failing(expected, got, config, exact=None):
    return {d.what: d.first for d in compare(expected, got, config, exact=exact) if not d.ok}


BF16 = make_config("train.precision=bf16")


def test_low_precision_is_held_to_what_it_does_to_one_process():
    exact, expected = trace(), trace(scale=0.05, scalars=0.002)
    for times, wrong in ((0.8 * SLACK, {}), (1.5 * SLACK, {"gradients", "weights"})):
        got = trace(scale=0.05 * times, scalars=0.002)
        assert failing(expected, got, BF16, exact).keys() == set(wrong)
    measured = compare(expected, trace(scale=0.05, scalars=0.002), BF16, exact=exact)
    assert all(0.02 < d.allowed < 1 for d in measured if d.what in ("gradients", "weights"))
    assert failing(expected, trace(scale=0.05, off=["head.weight"]), BF16, exact) == {
        "gradients": "head.weight",
        "weights": "head.weight",
    }
    for apart, wrong in ((0.9 * SLACK, set()), (1.2 * SLACK, {"losses", "gradient norm"})):
        got = trace(scale=0.05, scalars=0.002 * (1 + apart))
        assert failing(expected, got, BF16, exact).keys() == wrong
    limits = {d.what: d.allowed for d in compare(trace(), trace(), BF16, exact=trace())}
    assert limits == {"losses": SLACK / 512, "gradient norm": SLACK / 512, "gradients": 1e-4, "weights": 1e-4}


def test_float32_is_held_to_fixed_limits():
    config = make_config("")
    limits = {d.what: d.allowed for d in compare(trace(), trace(), config)}
    assert limits == {"losses": 1e-5, "gradient norm": 1e-5, "gradients": 1e-4, "weights": 1e-4}
    assert failing(trace(), trace(scalars=2e-5), config).keys() == {"losses", "gradient norm"}
    assert failing(trace(), trace(scale=2e-4), config) == {"gradients": NAMES[0], "weights": NAMES[0]}
    sgd = make_config("optimizer.name=sgd")
    without = [replace(t, gradients={}) for t in (trace(), trace(off=[NAMES[2]]))]
    assert failing(*without, sgd) == {"weights": NAMES[2]}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bias_that_its_softmax_cancels_is_judged_by_its_layers_gradient(precision):
    config, bias = make_config(f"train.precision={precision}"), "a.cross_attn.k.bias"
    exact = trace() if precision == "bf16" else None
    for gradient, weight, wrong in (
        (-1e-6, 1e-3, {}),  # rounding, and a step of AdamW that is made of it
        (0.1, 0.0, {"gradients": bias}),
    ):
        got = trace()
        got.gradients[bias], got.weights[bias] = torch.full((64,), gradient), torch.full((64,), weight)
        assert failing(trace(), got, config, exact) == wrong
    got = trace()
    got.weights["a.cross_attn.k.weight"] = got.weights["a.cross_attn.k.weight"] + 1e-3
    assert failing(trace(), got, config, exact) == {"weights": "a.cross_attn.k.weight"}


def test_what_low_precision_is_held_to_is_the_same_training_in_float32():
    for words in ("train.precision=bf16", "precision.fp8.recipe=emulated", "train.precision=bf16 train.zero_stage=2"):
        config = make_config(words)
        exact = exact_config(config, 4)
        assert (low_precision(config), low_precision(exact)) == (True, False)
        assert (exact.train.zero_stage, exact.parallel.tensor, exact.train.accumulation) == (0, 1, 8)
    assert not low_precision(make_config(""))


# --- the command ---


def test_kernels_that_cannot_run_here_are_refused_before_processes_are_started():
    with pytest.raises(UserError, match=r"^kernels\.attention=flex trains on a CUDA device only"):
        verify.verify_parallel(changed(make_config(""), {"kernels.attention": "flex"}), steps=1, ranks=1)


@pytest.mark.parametrize("prefix", ["", "[rank1]: ", "[rank12]:", "kairos_train.basics.errors."])
def test_the_error_of_a_process_is_its_last_line_not_the_one_that_raises(prefix):
    text = f"[rank1]:     raise ValueError(f'{{x}}')\n{prefix}UserError: x=3 is odd; use 4\nother words\n"
    assert re.search(verify.ERROR, text)[1] == "UserError: x=3 is odd; use 4"
