"""What a step reports, and the random states that a checkpoint holds."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from kairos_train.config.schema import StageConfig
from kairos_train.objective.flow_matching import ConditionedBatch, LossSums
from kairos_train.training.engine.random_state import derive_random_state, random_state, set_random_state
from kairos_train.training.step import LossMeter, StepReport, scaled_loss, weighted_loss
from parallel.topology import Topology

ALONE = Topology.single(torch.device("cpu"))


def batch() -> ConditionedBatch:
    """Two samples of (2, 3, 2, 2) latents with 1 and 0 history frames, 4 and 1 valid actions."""
    return ConditionedBatch(
        keys=["a", "b"],
        latents=torch.zeros(2, 2, 3, 2, 2),
        context=torch.zeros(2, 1, 4),
        context_mask=torch.ones(2, 1, dtype=torch.bool),
        video_sigma=torch.tensor([0.1, 1.0]),
        history=[1, 0],
        video_target=torch.zeros(2, 2, 3, 2, 2),
        video_weight=torch.ones(2),
        action=torch.zeros(2, 5, 3),
        action_sigma=torch.tensor([0.45, 0.5]),
        action_mask=torch.arange(5) < torch.tensor([[4], [1]]),
    )


def test_the_meter_divides_sums_by_counts_and_sorts_by_sigma():
    meter, sums = LossMeter(ALONE), LossSums(torch.tensor([8.0, 12.0]), torch.tensor([2.0, 3.0]))
    meter.add(batch(), sums, range(3))
    meter.add(batch(), sums, range(3))
    assert meter.loss("video") == pytest.approx(20 / (16 + 24))
    assert meter.loss("action") == pytest.approx(5 / 5)
    assert meter.bins["video"].tolist() == [[16, 32], [0, 0], [0, 0], [0, 0], [24, 48]]
    assert meter.bins["action"].tolist() == [[0, 0], [0, 0], [10, 10], [0, 0], [0, 0]]
    assert LossMeter(ALONE).loss("video") == 0


def test_bins_are_half_open_and_the_last_one_has_sigma_1():
    sigmas = [0.0, 0.19, 0.2, 0.39, 0.6, 0.79, 0.8, 1.0]
    found = []
    for sigma in sigmas:
        meter, alone = LossMeter(ALONE), replace(batch(), video_sigma=torch.full((2,), sigma))
        meter.add(alone, LossSums(torch.ones(2), None), range(3))
        found.append(meter.bins["video"][:, 0].nonzero().flatten().tolist())
    assert found == [[0], [0], [1], [1], [3], [3], [4], [4]]


def test_the_meter_adds_in_float64():
    """A sum that float32 holds does not swallow the next sample's."""
    meter = LossMeter(ALONE)
    for sums in ([2.0**24, 1.0], [1.0, 1.0]):
        meter.add(replace(batch(), video_sigma=torch.zeros(2)), LossSums(torch.tensor(sums), None), range(3))
    assert meter.bins["video"][0, 0].item() == 2**24 + 3


def test_tokens_and_flops_are_those_of_all_samples():
    meter, sums = LossMeter(ALONE), LossSums(torch.ones(2), None)
    meter.add(replace(batch(), tokens=7, flops=3e12), sums, range(3))
    meter.add(replace(batch(), tokens=5, flops=1e12), sums, range(3))
    assert meter.work.tolist() == [4, 2 * 7 + 2 * 5, 2 * 3e12 + 2 * 1e12]


def test_context_ranks_count_their_own_frames_and_actions_once():
    sums = LossSums(torch.tensor([8.0, 12.0]), torch.tensor([2.0, 3.0]))
    meters = [LossMeter(replace(ALONE, context_rank=rank)) for rank in range(2)]
    for meter, frames in zip(meters, (range(0, 2), range(2, 3))):
        meter.add(batch(), sums, frames)
    assert [m.bins["video"][:, 1].sum().item() for m in meters] == [8 + 16, 8 + 8]
    assert [m.bins["action"][:, 1].sum().item() for m in meters] == [5, 0]
    assert [m.work[0].item() for m in meters] == [2, 0]


def test_the_differentiated_and_the_reported_loss_are_weighted_alike():
    stage = StageConfig(video_loss_weight=0.5, action_loss_weight=2.0)
    sums = LossSums(torch.tensor([8.0, 12.0]), torch.tensor([2.0, 3.0]))
    meter = LossMeter(ALONE)
    meter.add(batch(), sums, range(3))
    counts = (sum(batch().video_elements()), batch().action_steps())
    reported = weighted_loss(stage, meter.loss("video"), meter.loss("action"))
    assert scaled_loss(stage, sums, counts).item() == pytest.approx(reported) == pytest.approx(0.5 * 0.5 + 2 * 1)
    assert scaled_loss(stage, LossSums(sums.video, sums.action * 0), (40, 0)).item() == pytest.approx(0.25)


def test_context_ranks_share_the_actions_loss():
    """Each computes all actions, and frames of its own."""
    stage = StageConfig(video_loss_weight=0.5, action_loss_weight=2.0)
    sums = LossSums(torch.tensor([8.0, 12.0]), torch.tensor([2.0, 3.0]))
    assert scaled_loss(stage, sums, (40, 5), context=4).item() == pytest.approx(0.5 * 20 / 40 + 2 * 5 / 5 / 4)
    assert scaled_loss(stage, LossSums(sums.video, None), (40, 5), context=4).item() == pytest.approx(0.25)


@pytest.mark.parametrize(("loss", "norm", "finite"), [(1.0, 2.0, True), (math.inf, 2.0, False), (1.0, math.nan, False)])
def test_a_step_is_finite_when_its_loss_and_its_norm_are(loss, norm, finite):
    assert StepReport(1.0, None, loss, norm, stepped=True, samples=1).finite == finite


def test_every_random_generator_continues_where_it_stood():
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]

    draw()
    tensors, plain = random_state()
    first = draw()
    assert draw() != first
    set_random_state(tensors, plain)
    assert draw() == first
    derive_random_state(seed=0, step=5, rank=1)
    derived = draw()
    assert all(a != b for a, b in zip(derived, first))
    derive_random_state(seed=0, step=5, rank=1)
    assert draw() == derived
    for other in ((1, 5, 1), (0, 6, 1), (0, 5, 2)):
        derive_random_state(*other)
        assert all(a != b for a, b in zip(draw(), derived)), other
    set_random_state(tensors, plain)
