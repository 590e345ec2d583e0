"""Which parameters decay, the learning rate of every step, and AdamW on float32 masters."""

import math

import pytest
import torch
from torch import nn

from kairos_train.basics.errors import UserError
from kairos_train.config.schema import OptimizerConfig
from kairos_train.training.engine.optimizer import build_optimizer, decays, lr_at, parameter_groups, set_lr


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("video_dit.blocks.0.self_attn.q.weight", (8, 8), True),
        ("video_dit.blocks.0.self_attn.q.bias", (8,), False),
        ("video_dit.blocks.0.self_attn.norm_q.weight", (8,), False),
        ("video_dit.blocks.0.cross_attn_norm.weight", (8,), False),
        ("video_dit.blocks.0.modulation", (1, 6, 8), False),
        ("video_dit.head.modulation", (1, 2, 8), False),
        ("video_dit.blocks.3.gated_delta.A_log", (4,), False),
        ("video_dit.blocks.3.gated_delta.dt_bias", (4,), False),
        ("video_dit.blocks.3.gated_delta.o_norm.weight", (16,), False),
        ("video_dit.blocks.3.gated_delta.q_conv1d.weight", (8, 1, 4), True),
        ("video_dit.blocks.0.norm_of_some_matrix.weight", (8, 8), False),
        ("video_dit.patch_embedding.weight", (8, 16, 1, 2, 2), True),
        ("action_dit.action_encoder.weight", (8, 7), True),
    ],
)
def test_norms_biases_decay_rates_and_modulations_do_not_decay(name, shape, expected):
    assert decays(name, torch.empty(shape)) is expected


def test_groups_hold_each_trainable_parameter_once_and_no_frozen_one():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    decayed, plain = parameter_groups(model, weight_decay=0.1)
    assert [p is q for p, q in zip(decayed["params"], [model[0].weight])] == [True]
    assert [id(p) for p in plain["params"]] == [id(model[0].bias), id(model[1].weight), id(model[1].bias)]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("masters", [False, True])
def test_adamw_is_told_every_number_and_each_group_its_decay(masters):
    config = OptimizerConfig(lr=3e-4, betas=[0.8, 0.99], eps=1e-6)
    groups = parameter_groups(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), weight_decay=0.1)
    optimizer = build_optimizer(groups, config, masters=masters)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["amsgrad"]) == (3e-4, (0.8, 0.99), 1e-6, False)
    set_lr(optimizer, 1e-5)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-5, 1e-5]


def test_an_empty_group_is_left_out():
    assert len(parameter_groups(nn.LayerNorm(4), weight_decay=0.1)) == 1


def test_a_wholly_frozen_model_is_refused():
    with pytest.raises(UserError, match="every parameter is frozen"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), weight_decay=0.1)


def test_constant_schedule_warms_up_linearly_and_stays():
    config = OptimizerConfig(lr=2.0, warmup_steps=4)
    assert [lr_at(step, config, 100) for step in (0, 1, 3, 4, 99, 1000)] == [0.5, 1.0, 2.0, 2.0, 2.0, 2.0]


def test_cosine_schedule_ends_at_its_least_rate_with_the_last_step():
    config = OptimizerConfig(lr=2.0, warmup_steps=10, schedule="cosine", min_lr_ratio=0.1)
    rates = [lr_at(step, config, 110) for step in range(110)]
    assert rates[9] == 2.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert math.isclose(rates[59], 0.5 * (2.0 + 0.2))  # half-way
    assert math.isclose(rates[-1], 0.2)
    assert math.isclose(lr_at(500, config, 110), 0.2)


def test_no_warmup_starts_at_the_full_rate_and_a_warmup_longer_than_the_run_never_reaches_it():
    assert lr_at(0, OptimizerConfig(lr=1.0, warmup_steps=0), 5) == 1.0
    config = OptimizerConfig(lr=1.0, warmup_steps=10, schedule="cosine")
    assert [lr_at(step, config, 5) for step in range(5)] == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match=r"optimizer\.schedule='linear'"):
        lr_at(0, OptimizerConfig(schedule="linear"), 1000)
    with pytest.raises(UserError, match=r"optimizer\.name='lion'"):
        build_optimizer([], OptimizerConfig(name="lion"), masters=False)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_masters_take_steps_smaller_than_bfloat16_can_hold(name):
    torch.manual_seed(0)
    exact = nn.Linear(5, 3)
    low = nn.Linear(5, 3)
    low.load_state_dict(exact.state_dict())
    for p in low.parameters():
        p.data = p.data.bfloat16()
    for p in exact.parameters():
        p.data = p.data.bfloat16().float()
    config = OptimizerConfig(name=name, lr=1e-5)
    plain = build_optimizer([{"params": list(exact.parameters())}], config, masters=False)
    masters = build_optimizer([{"params": list(low.parameters())}], config, masters=True)
    set_lr(plain, 2e-5)
    set_lr(masters, 2e-5)
    for _ in range(20):
        for p, q in zip(exact.parameters(), low.parameters()):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
            assert q.grad.dtype == torch.float32
        plain.step()
        masters.step()
    for p, q, master in zip(exact.parameters(), low.parameters(), masters.masters):
        assert torch.equal(p, master)
        assert torch.equal(q, master.bfloat16())


def test_gradients_of_several_passes_add_up_in_float32_under_masters():
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    build_optimizer([{"params": [weight]}], OptimizerConfig(), masters=True)
    for value in (1.0, *[2.0**-10] * 8):  # each small one is lost in bfloat16
        (weight * value).sum().backward()
    assert weight.grad.item() == 1 + 8 * 2.0**-10
