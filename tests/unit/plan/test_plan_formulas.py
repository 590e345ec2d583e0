"""Every formula of the plan against its statement, written out for small numbers."""

import pytest

from kairos_train.config.compose import load_config
from kairos_train.plan import cost, memory, traffic
from kairos_train.plan.layout import Layout, Parameters, SampleShape
from kairos_train.plan.report import SECTIONS

N, F, LIVE = 1000, 40, 300  # trained and frozen numbers of a tensor rank, numbers that stage 3 keeps gathered


def lay_out(*overrides: str, gpus: int = 1, parameters: tuple[int, int] | None = (N, F)) -> Layout:
    words = ["model=tiny", "data=video_480p", "stage=physical", "data.tokens_per_micro_batch=null", *overrides]
    config = load_config(words, sections=SECTIONS)
    layout = Layout.of(config, SampleShape.of(config, 8), gpus=gpus)
    if parameters is not None:
        trained, frozen = parameters
        object.__setattr__(layout, "parameters", Parameters(trained, frozen, trained, frozen, 0))
    return layout


@pytest.mark.parametrize("gpus", [1, 4])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes_per_number_are_those_of_the_table(stage, precision, gpus):
    layout = lay_out(
        f"train.zero_stage={stage}",
        f"train.precision={precision}",
        f"train.stage3_max_live_parameters={LIVE}",
        gpus=gpus,
    )
    b, held = {"bf16": 2, "fp32": 4}[precision], N / (gpus if stage else 1)
    gathered = b * ((N + F) / gpus + LIVE) if stage == 3 and gpus > 1 else b * (N + F)
    gradients = {0: 4 * N, 1: (4 + (2 if b == 2 else 0)) * N}.get(stage, 4 * N / gpus)
    assert memory.weights(layout) == gathered
    assert memory.gradients(layout) == gradients
    assert memory.optimizer(layout) == (8 if (stage, precision) == (0, "fp32") else 12) * held
    assert memory.ema(layout) == 4 * held
    bucket = 0 if stage == 0 or (stage, precision) == (1, "bf16") else 4 * (N + F)
    assert memory.bucket(layout) == bucket
    assert memory.reduction_copy(layout) == (4 * N if stage == 0 or (stage, precision) == (1, "bf16") else 0)
    assert memory.update_copy(layout) == 4 * held


def test_the_busiest_rank_is_the_one_that_holds_most():
    layout = lay_out("parallel.context=4", gpus=4, parameters=None)
    each = [memory.memory(layout, rank).total for rank in range(4)]
    assert memory.busiest(layout).total == max(each)
    assert len(set(each)) > 1
    whole = memory.memory(layout, 1)
    assert whole.total == sum(whole.categories().values())


@pytest.mark.parametrize(("stage", "accumulation"), [(0, 3), (1, 3), (2, 3), (3, 3), (3, 1)])
def test_gradients_and_weights_travel_as_each_stage_says(stage, accumulation):
    layout = lay_out(
        f"train.zero_stage={stage}",
        f"train.accumulation={accumulation}",
        f"train.stage3_max_live_parameters={LIVE}",
        gpus=4,
    )
    others, got = 3 / 4, traffic.received(layout, 0)
    reduced, scattered = 2 * others * 4 * N, others * 4 * N
    updated = others * 2 * N
    turns = 2 * accumulation - 1
    fetched = others * 2 * ((N + F) + turns * ((N + F) - LIVE // 2)) if stage == 3 else 0
    assert got.gathered_weights == pytest.approx(fetched)
    expected = {0: reduced, 1: reduced + updated, 2: accumulation * reduced + updated, 3: accumulation * scattered}
    assert got.data == pytest.approx(fetched + expected[stage])
    assert (got.tensor, got.context) == (0, 0)


@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
@pytest.mark.parametrize("method", ["ring", "all_gather"])
def test_states_and_halos_travel_as_the_formulas_say(method, recompute):
    layout = lay_out(
        "model.video.layer_cycle=[GATED]",
        "parallel.context=4",
        f"parallel.state_exchange={method}",
        f"train.recompute={recompute}",
        "train.micro_batch=2",
        gpus=4,
    )
    video, heads, layers = layout.model.video, layout.model.num_heads, layout.model.num_layers
    key, value = video.gdn_key_dim, video.gdn_value_dim
    states, halos = (2 if recompute == "block" else 1), (1 if recompute == "none" else 2)
    for rank in range(4):
        if method == "ring":
            forward, backward = key * value * (rank > 0), key * value * (rank < 3)
        else:
            forward, backward = 3 * (key + value) * key, 3 * key * value
        halo = 2 * (video.gdn_conv_size - 1) * video.dim * (halos * (rank > 0) + (rank < 3))
        one = 4 * heads * (states * forward + backward) + halo
        assert traffic.context(layout, rank) == layers * 2 * one


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_seconds_of_computing_follow_the_busiest_rank(recompute):
    layout = lay_out(
        "model.video.layer_cycle=[SWA]",
        "parallel.context=4",
        f"train.recompute={recompute}",
        "train.accumulation=3",
        "train.micro_batch=2",
        "cluster.mfu=0.25",
        "cluster.peak_tflops=2",
        gpus=8,
    )
    found, sample = cost.cost(layout), layout.sample
    passes, most = (3 if recompute == "none" else 4), max(layout.frames_per_rank)
    assert most / sample.frames > 1 / 4, "shares are uneven"
    assert found.compute == pytest.approx(6 * passes * sample.video_flops * most / sample.frames / (2e12 * 0.25))
    assert found.flops == pytest.approx(2 * 6 * 3 * sample.video_flops)
    assert found.hardware_flops == pytest.approx(2 * 6 * passes * sample.video_flops)
    assert found.seconds == found.compute + found.tensor + found.context + found.data


def test_every_context_rank_computes_all_actions():
    layout = lay_out("stage=joint", "data=libero", "parallel.context=2", gpus=2, parameters=None)
    sample, found = layout.sample, cost.cost(layout)
    assert sample.actions > 0
    assert sample.flops == 3 * (sample.video_flops + sample.action_flops)
    video, action = cost._hardware(layout)
    assert action == 3 * sample.action_flops
    share = max(layout.frames_per_rank) / sample.frames
    cluster = layout.config.cluster
    busiest = layout.batch * layout.config.train.accumulation * (video * share + action)
    assert found.compute == pytest.approx(busiest / (cluster.peak_tflops * 1e12 * cluster.mfu))
    assert found.hardware_flops == pytest.approx(layout.samples_per_step * (video + 2 * action))
    assert sample.all_context == sample.context + 1
    assert lay_out(parameters=None).sample.all_context == 8


def test_only_copies_that_see_a_part_are_summed_over_tensor_ranks():
    alone, split = lay_out(parameters=None), lay_out("parallel.tensor=2", gpus=2, parameters=None)
    assert alone.parameters.partial == 0
    assert 0 < split.parameters.partial < split.parameters.trained < alone.parameters.trained
    assert split.parameters.whole_trained == alone.parameters.whole_trained == alone.parameters.trained
