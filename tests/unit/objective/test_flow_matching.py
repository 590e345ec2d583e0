"""The objective: targets, the loss equation, per-sample randomness, conditions."""

from dataclasses import asdict

import pytest
import torch

from kairos_train.config.schema import StageConfig
from kairos_train.objective import schedule
from kairos_train.objective.flow_matching import FlowMatching
from kairos_train.objective.randomness import choose, draw_sample, pick

SHAPE = (4, 3, 4, 4)


def data(keys, actions=True):
    generator = torch.Generator().manual_seed(0)
    n = len(keys)
    values = {
        "keys": keys,
        "latents": torch.randn(n, *SHAPE, generator=generator),
        "context": torch.randn(n, 3, 5, generator=generator),
        "context_mask": torch.tensor([[True, True, False]] * n),
        "empty_context": torch.full((4, 5), 7.0),
    }
    if actions:
        values["state"] = torch.randn(n, 1, 2, generator=generator)
        values["actions"] = torch.randn(n, 6, 2, generator=generator)
        values["action_mask"] = torch.arange(6).expand(n, 6) < 4
    return values


def objective(**stage) -> FlowMatching:
    return FlowMatching(StageConfig(**stage), seed=3, patch=(2, 2))


def test_what_a_sample_draws_does_not_depend_on_its_batch_or_place():
    values = data(["a", "b", "c"])
    together = objective().condition(step=5, **values)
    reverse = {k: v[::-1] if isinstance(v, list) else v.flip(0) for k, v in values.items() if k != "empty_context"}
    apart = objective().condition(step=5, **reverse, empty_context=values["empty_context"])
    torch.testing.assert_close(together.latents, apart.latents.flip(0))
    torch.testing.assert_close(together.action_target, apart.action_target.flip(0))
    other_step = objective().condition(step=6, **values)
    assert not torch.equal(together.video_sigma, other_step.video_sigma)


def test_noisy_data_and_targets_follow_the_definition_and_history_is_clean():
    values = data(["a", "b"])
    batch = objective(history_frames=1).condition(step=0, **values)
    assert batch.history == [1, 1]
    noise = batch.video_target + values["latents"]
    sigma = batch.video_sigma.view(-1, 1, 1, 1, 1)
    expected = (1 - sigma) * values["latents"] + sigma * noise
    torch.testing.assert_close(batch.latents[:, :, 1:], expected[:, :, 1:])
    assert torch.equal(batch.latents[:, :, :1], values["latents"][:, :, :1])
    torch.testing.assert_close(batch.model_inputs()["video_timestep"], batch.video_sigma * 1000)


def test_sigmas_come_from_the_shifted_tables_of_each_stream():
    values = data([str(i) for i in range(64)])
    batch = objective().condition(step=0, **values)
    video = schedule.shifted_sigmas(1000, schedule.video_shift(SHAPE[1], 4)).float()
    action = schedule.shifted_sigmas(1000, 5.0).float()
    assert torch.isin(batch.video_sigma, video).all()
    assert torch.isin(batch.action_sigma, action).all()
    assert batch.action_sigma.mean() > 0.7 > 0.3, "the action's shift of 5 pushes towards noise"
    other = objective(action_shift=2.0).condition(step=0, **values)
    assert torch.isin(other.action_sigma, schedule.shifted_sigmas(1000, 2.0).float()).all()
    assert torch.equal(other.video_sigma, batch.video_sigma)


def test_actions_have_a_timestep_noise_target_and_weight_of_their_own():
    keys = [str(i) for i in range(8)]
    values, stage = data(keys), StageConfig()
    batch = objective().condition(step=2, **values)
    table = schedule.shifted_sigmas(schedule.TRAINING_STEPS, stage.action_shift)
    for i, key in enumerate(keys):
        drawn = draw_sample(stage, seed=3, step=2, key=key, video_shape=torch.Size(SHAPE), action_shape=(6, 2))
        assert drawn.action_index != drawn.video_index
        sigma, clean = table[drawn.action_index].float(), values["actions"][i]
        assert batch.action_sigma[i] == sigma
        torch.testing.assert_close(batch.action[i], (1 - sigma) * clean + sigma * drawn.action_noise)
        torch.testing.assert_close(batch.action_target[i], drawn.action_noise - clean)
        assert batch.action_weight[i] == schedule.bell_weights(table)[drawn.action_index].float()


def test_the_model_is_given_each_streams_timestep_and_all_that_was_drawn():
    values = data(["a", "b"])
    batch = objective(conditions={"t2v": 0.5, "ti2v": 0.5}).condition(step=0, **values)
    assert batch.history == [0, 1]
    inputs = batch.model_inputs()
    torch.testing.assert_close(inputs["video_timestep"], 1000 * batch.video_sigma)
    torch.testing.assert_close(inputs["action_timestep"], 1000 * batch.action_sigma)
    assert inputs["history_frames"] == batch.history
    for name, value in (("latents", batch.latents), ("context", batch.context), ("action", batch.action)):
        assert inputs[name] is value
    for name in ("context_mask", "state", "action_mask"):
        assert torch.equal(inputs[name], values[name]), name


def test_each_stream_is_weighed_at_its_own_timestep():
    flow, values = objective(), data([str(i) for i in range(4)])
    batch = flow.condition(step=0, **values)
    assert (batch.action_weight - batch.video_weight).abs().min() > 1e-3
    sums = flow.loss_sums(batch, batch.video_target + 1, batch.action_target + 2)
    torch.testing.assert_close(sums.video, batch.video_weight * torch.tensor(batch.video_elements()))
    torch.testing.assert_close(sums.action, batch.action_weight * 4 * batch.action_mask.sum(1))


def test_a_dummy_of_actions_adds_nothing_and_keeps_its_gradient():
    values = data(["a"], actions=False)
    flow, dummy = objective(), torch.full((1, 1, 2), 3.0, requires_grad=True)
    batch = flow.condition(step=0, **values)
    sums = flow.loss_sums(batch, batch.video_target + 1, dummy)
    assert sums.action is None
    assert torch.equal(sums.video, flow.loss_sums(batch, batch.video_target + 1, None).video)
    sums.video.sum().backward()
    assert torch.equal(dummy.grad, torch.zeros(1, 1, 2))


def test_shares_within_the_history_count_nothing():
    batch = objective(history_frames=2).condition(step=0, **data(["a"]))
    assert batch.history == [2]
    assert [batch.video_elements(range(i, i + 1)) for i in range(3)] == [[0], [0], [4 * 16]]


def test_the_loss_counts_neither_history_nor_padding():
    values = data(["a", "b"])
    flow = objective(loss_weighting="plain")
    batch = flow.condition(step=0, **values)
    video, action = batch.video_target.clone(), batch.action_target.clone()
    video[:, :, 0] = torch.nan
    action[:, 4:] = torch.inf
    sums = flow.loss_sums(batch, video, action)
    assert sums.video.sum() == 0
    assert sums.action.sum() == 0
    video[:, :, 1] += 2
    action[:, 0] += 3
    sums = flow.loss_sums(batch, video, action)
    torch.testing.assert_close(sums.video, torch.full((2,), 4.0 * 4 * 16))
    torch.testing.assert_close(sums.action, torch.full((2,), 9.0), msg="the dimension weights sum to 1")
    assert batch.video_elements() == [4 * 2 * 16, 4 * 2 * 16]
    assert batch.video_elements(range(2)) == [4 * 16, 4 * 16], "the first of two frames is history"
    shares = [flow.loss_sums(batch, video[:, :, part], None, range(3)[part]).video for part in (slice(2), slice(2, 3))]
    torch.testing.assert_close(sum(shares), sums.video)
    assert batch.action_steps() == 8


def test_action_dimensions_are_weighed():
    values = data(["a"])
    flow = objective(loss_weighting="plain", action_dim_weights=[0.25, 0.75])
    batch = flow.condition(step=0, **values)
    action = batch.action_target.clone()
    action[:, 0, 1] += 2
    assert flow.loss_sums(batch, batch.video_target, action).action.item() == pytest.approx(3.0)


def test_the_bell_weighs_each_sample_by_its_own_timestep():
    values = data([str(i) for i in range(16)])
    batch = objective().condition(step=0, **values)
    table = schedule.shifted_sigmas(1000, schedule.video_shift(SHAPE[1], 4))
    weights = schedule.bell_weights(table)
    expected = torch.tensor([weights[(table - s).abs().argmin()] for s in batch.video_sigma.double()])
    torch.testing.assert_close(batch.video_weight, expected.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("condition", "history", "context"),
    [("t2v", 0, "prompt"), ("ti2v", 1, "prompt"), ("i2v", 1, "empty"), ("null2v", 0, "zeros")],
)
def test_conditions_set_history_and_context(condition, history, context):
    values = data(["a"])
    batch = objective(conditions={condition: 1.0}, cfg_dropout=0.0).condition(step=0, **values)
    assert batch.history == [history]
    if context == "prompt":
        assert torch.equal(batch.context, values["context"])
    elif context == "empty":
        assert torch.equal(batch.context[0], values["empty_context"])
        assert batch.context_mask.all()
    else:
        assert not batch.context.any()
        assert torch.equal(batch.context_mask, values["context_mask"]), "the mask is kept"


def test_the_empty_prompt_of_i2v_leaves_nothing_of_a_longer_one():
    values = data(["a"])
    values["empty_context"] = torch.full((1, 5), 7.0)
    batch = objective(conditions={"i2v": 1.0}, cfg_dropout=0.0).condition(step=0, **values)
    assert batch.context_mask.tolist() == [[True, False, False]]
    assert torch.equal(batch.context[0, :1], values["empty_context"])
    assert not batch.context[0, 1:].any()


def test_a_dropped_context_is_zeros_under_its_mask():
    values = data(["a", "b"])
    batch = objective(conditions={"ti2v": 1.0}, cfg_dropout=1.0).condition(step=0, **values)
    assert not batch.context.any()
    assert torch.equal(batch.context_mask, values["context_mask"])
    assert values["context"].any(), "what was given is as it was"


def test_a_choice_falls_by_sorted_name_into_half_open_intervals():
    for shares in ({"a": 0.25, "b": 0.75, "c": 0.0}, {"c": 0.0, "b": 0.75, "a": 0.25}):
        assert [pick(shares, draw) for draw in (0.0, 0.2499, 0.25, 0.9999)] == ["a", "a", "b", "b"]
    assert pick({"a": 0.5, "b": 0.5 - 1e-9}, 1 - 1e-12) == "b"


def test_what_is_drawn_for_one_thing_says_nothing_of_another_and_depends_on_the_seed():
    stage = StageConfig(conditions={"t2v": 0.5, "ti2v": 0.5}, cfg_dropout=0.5)
    draws = [choose(stage, seed=0, step=0, key=str(i), frames=2) for i in range(2000)]
    of = {
        "condition": [d.condition == "t2v" for d in draws],
        "dropout": [d.drop_context for d in draws],
        "caption": [d.caption for d in draws],
        "video": [d.video_index for d in draws],
        "action": [d.action_index for d in draws],
    }
    together = torch.corrcoef(torch.tensor([list(map(float, values)) for values in of.values()]))
    assert (together - torch.eye(len(of))).abs().max() < 0.1
    assert sum(d.video_index == d.action_index for d in draws) < 20
    other = [choose(stage, seed=1, step=0, key=str(i), frames=2) for i in range(20)]
    assert not set(other) & set(draws[:20])


def test_noise_is_standard_normal_and_timesteps_are_uniform_over_the_whole_table():
    noise = [
        draw_sample(StageConfig(), seed=0, step=0, key=str(i), video_shape=(4, 5, 20, 20), action_shape=(200, 10))
        for i in range(4)
    ]
    for name in ("video_noise", "action_noise"):
        drawn = torch.cat([getattr(draw, name).flatten() for draw in noise])
        quantiles = torch.quantile(drawn, torch.tensor([0.0228, 0.1587, 0.5, 0.8413, 0.9772]))
        torch.testing.assert_close(quantiles, torch.tensor([-2.0, -1, 0, 1, 2]), atol=0.08, rtol=0)
    draws = [choose(StageConfig(), seed=0, step=0, key=str(i), frames=2) for i in range(10000)]
    for name in ("video_index", "action_index"):
        counts = torch.tensor([getattr(draw, name) for draw in draws]).bincount(minlength=1000)
        assert len(counts) == 1000
        assert 0 < counts[-1] < 40
        assert counts.view(10, 100).sum(1).sub(1000).abs().max() < 120


@pytest.mark.parametrize(("condition", "zeroed"), [("ti2v", False), ("i2v", False), ("null2v", True)])
def test_a_dropped_context_is_the_empty_prompts_by_option(condition, zeroed):
    """Zeros remain what null2v means."""
    values = data(["a"])
    dropped = objective(conditions={condition: 1.0}, cfg_dropout=1.0, cfg_dropout_form="empty_prompt")
    batch = dropped.condition(step=0, **values)
    if zeroed:
        assert not batch.context.any()
        assert torch.equal(batch.context_mask, values["context_mask"])
    else:
        assert torch.equal(batch.context[0, batch.context_mask[0]], values["empty_context"])
    assert not objective(conditions={condition: 1.0}, cfg_dropout=1.0).condition(step=0, **values).context.any()


def test_dropout_and_mixed_conditions_come_at_their_rates():
    stage = StageConfig(conditions={"t2v": 0.25, "ti2v": 0.75}, cfg_dropout=0.1)
    kwargs = {"seed": 0, "step": 0, "video_shape": (1, 2, 1, 1), "action_shape": None}
    draws = [draw_sample(stage, key=str(i), **kwargs) for i in range(4000)]
    assert sum(d.condition == "t2v" for d in draws) / 4000 == pytest.approx(0.25, abs=0.03)
    assert sum(d.drop_context for d in draws) / 4000 == pytest.approx(0.1, abs=0.02)


def test_images_have_conditions_of_their_own_and_no_history():
    flow = objective(conditions={"ti2v": 1.0}, image_conditions={"t2i": 0.5, "n2i": 0.5}, cfg_dropout=0.0)
    values = data([str(i) for i in range(40)], actions=False)
    values["latents"] = values["latents"][:, :, :1]
    batch = flow.condition(step=0, **values)
    chosen = [choice.condition for choice in flow.choices(values["keys"], step=0, frames=1)]
    assert set(chosen) == {"t2i", "n2i"}
    assert batch.history == [0] * 40
    for i, condition in enumerate(chosen):
        assert batch.context[i].any() == (condition == "t2i")
    assert all(choice.condition == "ti2v" for choice in flow.choices(values["keys"], step=0, frames=2))


def test_choices_told_ahead_are_those_of_the_draw():
    stage = StageConfig(conditions={"t2v": 0.5, "ti2v": 0.5})
    where = {"seed": 1, "step": 2, "key": "k"}
    ahead = choose(stage, frames=2, **where)
    drawn = draw_sample(stage, video_shape=(1, 2, 1, 1), action_shape=None, **where)
    assert {name: getattr(drawn, name) for name in asdict(ahead)} == asdict(ahead)


@pytest.mark.parametrize("weights", [None, [0.1, 0.9]])
def test_dimensions_a_sample_does_not_have_are_zero_to_the_model_and_out_of_the_loss(weights):
    values, flow = data(["a", "b"]), objective(action_dim_weights=weights)
    own = torch.tensor([[True, True], [True, False]])
    values["actions"] = values["actions"] * own[:, None]
    batch = flow.condition(step=0, action_dim_mask=own, **values)
    assert not batch.action[1, :, 1].any()
    assert not batch.action_target[1, :, 1].any()
    error = torch.tensor([0.0, 1e3]).expand_as(batch.action_target)  # where the second sample has no dimension
    sums = flow.loss_sums(batch, batch.video_target, batch.action_target + error)
    assert sums.action[1] == 0
    assert sums.action[0] > 0
    error = torch.tensor([1.0, 0.0]).expand_as(batch.action_target)
    sums = flow.loss_sums(batch, batch.video_target, batch.action_target + error)
    expected = batch.action_weight[1] * batch.action_mask[1].sum()  # weights sum to 1 over the dimensions there are
    torch.testing.assert_close(sums.action[1], expected.float())


def test_video_only_batches_have_no_action_terms():
    values = data(["a", "b"], actions=False)
    flow = objective()
    batch = flow.condition(step=0, **values)
    assert batch.action_steps() == 0
    assert flow.loss_sums(batch, batch.video_target, None).action is None
