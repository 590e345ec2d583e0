"""The planned activations beside the peak that torch's allocator reports, on one process.

Weights, gradients and optimiser states are measured in tests/distributed/test_plan_measured.py.
"""

import pytest
from support.allocations import activation_peak

from kairos_train.config.compose import load_config
from kairos_train.config.schema import Config
from kairos_train.plan.activations import activations
from kairos_train.plan.layout import Layout, SampleShape
from kairos_train.plan.report import SECTIONS

TEXT_TOKENS = 8
SIZES = {
    "256 tokens": ("data.window.frames=29", "data.window.height=64", "data.window.width=64", "train.micro_batch=2"),
    "960 tokens": ("data.window.frames=45", "data.window.height=160", "data.window.width=128", "train.micro_batch=1"),
    "576 wide tokens": (
        *("data.window.frames=33", "data.window.height=128", "data.window.width=128", "train.micro_batch=1"),
        *("model.video.dim=256", "model.video.ffn_dim=768"),
    ),
}


def configure(*overrides: str) -> Config:
    common = ("model=tiny", "encoders=weight_free", "data=demo", "train.device=cpu")
    return load_config([*common, *overrides], sections=SECTIONS)


def planned_and_measured(*overrides: str) -> tuple[float, int]:
    config = configure(*overrides)
    sample = SampleShape.of(config, TEXT_TOKENS)
    layout = Layout.of(config, sample, gpus=1)
    return activations(layout, 0).device, activation_peak(config, sample, layout.batch)


@pytest.mark.parametrize(
    ("size", "recompute", "stage"),
    [  # every pair of a size, a policy and a stage; bf16 takes long on a CPU
        ("256 tokens", "none", "physical"),
        ("960 tokens", "block", "physical"),
        ("576 wide tokens", "selective", "physical"),
        ("960 tokens", "none", "joint"),
        ("576 wide tokens", "none", "joint"),
        ("256 tokens", "block", "joint"),
        ("576 wide tokens", "block", "joint"),
        ("256 tokens", "selective", "joint"),
        ("960 tokens", "selective", "joint"),
    ],
)
def test_the_estimate_is_within_15_percent_of_the_peak(size, recompute, stage):
    precision = {"physical": "bf16", "joint": "fp32"}[stage]
    chosen = (f"stage={stage}", f"train.precision={precision}", f"train.recompute={recompute}")
    planned, measured = planned_and_measured(*chosen, *SIZES[size])
    assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(("kind", "tolerance"), [("FA", 0.015), ("SWA", 0.015), ("DSWA", 0.015), ("GATED", 0.03)])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_a_kind_of_layer_saves_is_within_a_few_percent(kind, tolerance, precision):
    chosen = ("stage=physical", f"model.video.layer_cycle=[{kind}]", f"train.precision={precision}")
    planned, measured = planned_and_measured(*chosen, *SIZES["960 tokens"])
    assert planned == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize("recompute", ["block", "selective"])
def test_every_further_recomputed_layer_costs_what_it_keeps(recompute):
    chosen = ("stage=physical", "train.precision=bf16", f"train.recompute={recompute}", *SIZES["256 tokens"])
    few, many = (planned_and_measured(*chosen, f"model.num_layers={n}") for n in (4, 8))
    assert many[0] - few[0] == pytest.approx(many[1] - few[1], rel=0.03)


@pytest.mark.parametrize("semantics", ["frame", "token"])
def test_keys_that_windows_copy_are_counted_under_both_readings(semantics):
    history = str(semantics == "frame").lower()
    chosen = (f"model.video.window_semantics={semantics}", f"model.video.all_attend_history={history}")
    chosen += (f"model.video.restrict_history_query_to_history={history}", "stage=physical")
    planned, measured = planned_and_measured(*chosen, "model.video.layer_cycle=[SWA,DSWA]", *SIZES["960 tokens"])
    assert planned == pytest.approx(measured, rel=0.02)


def test_activations_are_linear_in_samples_and_nearly_so_in_frames():
    def bytes_of(*overrides: str) -> float:
        config = configure("stage=physical", "train.precision=bf16", *overrides)
        return activations(Layout.of(config, SampleShape.of(config, TEXT_TOKENS), gpus=1), 0).device

    # What does not grow is the float32 copy of the timestep MLP.
    fixed = 4 * 7 * 128**2
    one, three = (bytes_of(f"train.micro_batch={n}") - fixed for n in (1, 3))
    assert three == pytest.approx(3 * one)
    short, long = (bytes_of("model.video.layer_cycle=[GATED]", f"data.window.frames={n}") - fixed for n in (41, 201))
    assert long / short == pytest.approx(51 / 11, rel=0.02)
