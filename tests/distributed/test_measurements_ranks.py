"""What is measured while training, in real layouts: gradient norms by block kind, waiting for others, slow ranks."""

import math
import socket

import pytest
from support.measurement_ranks import (
    asynchronous_and_batched,
    block_norms,
    collectives,
    failing_step,
    late_rank,
    monitored,
    plain_block_norms,
    unmeasured_norms,
)

pytestmark = pytest.mark.slow

KINDS = {"SWA", "DSWA", "FA", "GATED", "cross_attention", "ffn", "modulation", "action", "embeddings_and_heads"}
TENSOR = "parallel.tensor=2 parallel.sequence=true"
SHALLOW = "model.num_layers=2 model.video.layer_cycle=[SWA,GATED] train.accumulation=1"
CYCLE = "model.num_layers=4 model.video.layer_cycle=[SWA,GATED,DSWA,FA]"


@pytest.fixture(scope="module")
def expected(world):
    """Norms by kind of one process that trains on the same samples, by data-parallel ranks and further settings."""
    made = {}

    def norms(ranks: int, more: str):
        if (ranks, more) not in made:
            (made[ranks, more],) = world(1).run(plain_block_norms, more, ranks)
        return made[ranks, more]

    return norms


@pytest.mark.parametrize(
    ("ranks", "layout", "stage", "more"),
    [
        *((2, "", stage, CYCLE) for stage in (0, 2, 3)),
        (2, "", 1, f"{CYCLE} stage.lora.rank=2"),
        (2, "parallel.context=2", 2, f"{CYCLE} train.recompute=block"),
        (4, TENSOR, 1, f"{CYCLE} train.precision=bf16"),
        pytest.param(2, "", 1, CYCLE, marks=pytest.mark.nightly),
        pytest.param(2, "", 3, f"{CYCLE} stage.lora.rank=2", marks=pytest.mark.nightly),
        pytest.param(4, "parallel.tensor=2", 3, CYCLE, marks=pytest.mark.nightly),
    ],
)
def test_norms_by_kind_are_those_of_one_process_and_make_up_the_whole(world, expected, ranks, layout, stage, more):
    answers = world(ranks).run(block_norms, f"{layout} train.zero_stage={stage} {more}")
    assert all(answer == answers[0] for answer in answers), "the same on all ranks"
    data = ranks // (2 if layout else 1)
    close = 3e-2 if "bf16" in more else 1e-4
    for (norms, whole), plain in zip(answers[0], expected(data, more.replace("train.recompute=block", "").strip())):
        assert math.hypot(*norms.values()) == pytest.approx(whole, rel=1e-5)
        assert norms == pytest.approx(plain, rel=close, abs=close * 0.1)
        if more == CYCLE:
            assert {name.removeprefix("grad_norm/") for name in norms} == KINDS
            assert all(value > 0 for value in norms.values())


@pytest.mark.parametrize(
    ("ranks", "layout", "groups", "stage"),
    [
        *((2, "", {"gradient"}, stage) for stage in (0, 3)),
        (4, f"{TENSOR} parallel.context=2", {"tensor", "context", "gradient"}, 1),
        pytest.param(2, "", {"gradient"}, 2, marks=pytest.mark.nightly),
    ],
)
def test_every_collective_of_a_step_counts_once(world, ranks, layout, groups, stage):
    for answer in world(ranks).run(collectives, f"{layout} train.zero_stage={stage} {SHALLOW}"):
        assert groups <= answer["seconds"].keys() <= groups | {"world"}
        assert all(answer["seconds"][kind] > 0 and answer["calls"][kind] > 0 for kind in groups)
        assert sum(answer["seconds"].values()) < answer["elapsed"]
        assert sum(answer["calls"].values()) == answer["seen"], "none left out, none twice"
        assert answer["restored"]


def test_waiting_counts_where_it_happens_whoever_waits_and_groups_of_one_do_not(world):
    first, second = world(2).run(asynchronous_and_batched)
    for answer in (first, second):
        assert answer["calls"]["gradient"] == 4 + 2
        assert answer["calls"]["world"] >= 1
        assert answer["calls"].keys() == {"gradient", "world"}
    assert first["seconds"]["gradient"] > 0.15 > second["seconds"]["gradient"]


def test_torch_is_as_it_was_after_a_step_that_raised(world):
    assert world(2).run(failing_step) == [True, True]


def test_a_late_rank_is_named_and_the_others_waited_for_it(world):
    answers = world(4).run(late_rank, 2, 3.0)
    for rank, (stragglers, waited, values) in enumerate(answers):
        assert stragglers == answers[0][0]
        assert stragglers[0][:2] == (2, socket.gethostname())
        assert values["time/busy_max"] >= 3.0 > values["time/busy_median"]
        assert rank == 2 or waited > 1.0


def test_a_report_has_what_was_measured_in_its_last_step_once(world):
    answers = world(4).run(monitored, f"parallel.tensor=2 {SHALLOW} train.zero_stage=3")
    for answer in answers:
        values, again = answer["values"], answer["again"]
        assert values["communication/tensor"] > 0
        assert values["communication/gradient"] > 0
        assert values["time/forward_backward"] > 0
        assert values["time/update"] > 0
        assert values["time/busy_max"] >= values["time/busy_median"] > 0
        norms = [value for name, value in values.items() if name.startswith("grad_norm/")]
        assert math.hypot(*norms) == pytest.approx(answer["norms"][1], rel=1e-5)
        assert again == {}
    first = answers[0]["values"]
    assert 0 < first["decay/layer_01_q10"] < first["decay/layer_01_median"] < first["decay/layer_01_q90"] < 1
    assert "decay/layer_01_half_life_tokens" in first
    assert not any(name.startswith("decay/") for name in answers[1]["values"]), "as rank 0 sees them"


def test_measuring_changes_nothing_of_what_is_measured(world):
    overrides = f"{CYCLE} train.zero_stage=2 train.recompute=block"
    measured = [answer["norms"] for answer in world(2).run(monitored, overrides)]
    assert measured == world(2).run(unmeasured_norms, overrides)
