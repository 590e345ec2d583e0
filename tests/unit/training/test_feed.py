"""Raw batches into conditioned ones; what shards must agree with."""

import copy
from dataclasses import replace

import pytest
import torch
from support.tiny_export import TEMPLATE, WINDOW, feed_of, random_weights, tiny_config, write_tiny_shards

from dataloaders.loading.batch import BatchSchema, Sample, collate
from dataloaders.loading.loader import fixed_batches
from dataloaders.packing.pack import pack
from dataloaders.shards import ShardIndex, read_index
from kairos_train.basics.errors import UserError
from kairos_train.conditioning.build import build_encoders
from kairos_train.config.schema import CaptionShare
from kairos_train.inference.normalization import from_statistics
from kairos_train.model import WorldActionModel
from kairos_train.model.flops import training_flops
from kairos_train.training import validation
from kairos_train.training.describe import sample_flops
from kairos_train.training.inputs.sources import check_sources, held_out_source, rates_of
from kairos_train.training.measure.telemetry import drop_later_lines
from kairos_train.training.step import LossMeter
from parallel.topology import Degrees, Topology


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    return write_tiny_shards(tmp_path_factory.mktemp("encoded"), encoded=True)


def check(config, indices):
    check_sources(indices, window=config.data.window, model=config.model, stage=config.stage)


def first_batch(folder, **settings):
    return next(fixed_batches(folder, batch_size=4, count=1, **settings))


def test_cached_latents_and_contexts_are_what_encoding_here_gives(shards, encoded):
    config = tiny_config()
    conditioned = [
        feed_of(config, [read_index(folder)]).condition(first_batch(folder), step=0) for folder in (shards, encoded)
    ]
    a, b = ({s[-13:]: i for i, s in enumerate(c.keys)} for c in conditioned)
    assert a.keys() == b.keys()
    order = [b[key] for key in a]
    target = conditioned[1].context[order]
    torch.testing.assert_close(conditioned[0].context[:, : target.shape[1]], target, atol=2e-3, rtol=2e-3)


def test_actions_and_states_are_normalised_and_padding_masked(shards):
    config = tiny_config()
    feed, batch = feed_of(config, [read_index(shards)]), first_batch(shards)
    conditioned = feed.condition(batch, step=0)
    stats = read_index(shards).statistics()
    normalizer = from_statistics(stats, group="action", key=WINDOW.action_key, mode="minmax")
    clean = normalizer.normalize(batch.actions)
    sigma = conditioned.action_sigma.view(-1, 1, 1)
    noise = conditioned.action_target + clean
    torch.testing.assert_close(conditioned.action, (1 - sigma) * clean + sigma * noise, atol=1e-5, rtol=1e-5)
    assert torch.equal(conditioned.action_mask, batch.action_mask)
    assert conditioned.state.abs().max() <= 5


def test_every_step_draws_anew_and_the_same_step_the_same(shards):
    feed, batch = feed_of(tiny_config(), [read_index(shards)]), first_batch(shards)
    one, same, other = (feed.condition(batch, step=step) for step in (4, 4, 5))
    assert torch.equal(one.latents, same.latents)
    assert not torch.equal(one.video_sigma, other.video_sigma)
    assert not torch.equal(one.action, other.action)


def test_captions_follow_the_progress_of_the_stage(shards):
    captions = [CaptionShare("short", start=1.0, end=0.0), CaptionShare("long", start=0.0, end=1.0)]
    feed, batch = feed_of(tiny_config(captions=captions), [read_index(shards)]), first_batch(shards)
    batch = replace(batch, meta=[meta | {"captions": {"short": "a", "long": "b c d e"}} for meta in batch.meta])
    lengths = [feed.condition(batch, step=0, progress=progress).context.shape[1] for progress in (0.0, 1.0)]
    assert lengths[0] < lengths[1]


def test_flops_are_of_the_tokens_frames_and_actions_that_there_are(shards):
    config = tiny_config()
    conditioned = feed_of(config, [read_index(shards)]).condition(first_batch(shards), step=0)
    sizes = {"context_tokens": conditioned.context.shape[1], "actions": conditioned.action.shape[1]}
    shape = conditioned.latents.shape[1:]
    assert conditioned.flops == sample_flops(config.model, config.stage, shape, **sizes)
    for conditions, history in (({"ti2v": 0.5, "t2v": 0.5}, 1), ({"t2v": 1.0}, 0)):
        stage, tokens = replace(config.stage, conditions=conditions), shape[2] // 2 * (shape[3] // 2)
        counted = {"actions": sizes["actions"], "history": history}
        assert sample_flops(config.model, stage, shape, **sizes) == training_flops(
            config.model, shape[1], tokens, sizes["context_tokens"], **counted
        )


def test_i2v_alone_needs_the_empty_prompt(shards):
    feed = feed_of(tiny_config(conditions={"i2v": 1.0}, cfg_dropout=0.0), [read_index(shards)])
    conditioned = feed.condition(first_batch(shards), step=0)
    assert torch.equal(conditioned.context[0, : len(feed.empty_context)], feed.empty_context)
    assert feed_of(tiny_config(cfg_dropout=0.0), [read_index(shards)]).empty_context is None


def test_shards_of_other_windows_or_sizes_are_refused(shards):
    index = read_index(shards)
    check(tiny_config(), [index])
    for section, field, value in (
        ("data.window", "frames", 9),
        ("data.window", "height", 64),
        ("model.action", "action_dim", 9),
        ("model.action", "state_dim", 1),
    ):
        config = copy.deepcopy(tiny_config())
        owner = config
        for name in section.split("."):
            owner = getattr(owner, name)
        setattr(owner, field, value)
        with pytest.raises(UserError, match=rf"{section}\.{field}={value}"):
            check(config, [index])


def test_other_encoders_than_the_shards_are_refused(encoded):
    config = tiny_config()
    config.encoders.text.max_tokens += 1
    with pytest.raises(UserError, match=r"encoders\.text"):
        feed_of(config, [read_index(encoded)])
    config = tiny_config()
    config.encoders.video.kind = "wan"
    with pytest.raises(UserError, match=r"encoders\.video\.kind=wan"):
        feed_of(config, [read_index(encoded)])


def test_shards_of_another_image_or_system_message_setting_are_refused(encoded):
    """Where the VLM's weights are not there to be compared by their hash."""
    index, config = read_index(encoded), tiny_config()
    config.encoders.text.kind = "qwen"
    for settings, match in (
        ({"image": False}, r"encoders\.text\.image=true: the shards were encoded with false"),
        ({"image": True, "system_message": False}, r"encoders\.text\.system_message=true.*with false"),
    ):
        identity = {**index.encoders, "text": {"kind": "qwen", **settings}}
        with pytest.raises(UserError, match=match):
            feed_of(config, [replace(index, encoders=identity)])
    config.encoders.text.image = config.encoders.text.system_message = False
    identity["text"] = {"kind": "qwen", "image": False, "system_message": False}
    assert not feed_of(config, [replace(index, encoders=identity)]).identity["text"]["image"]


def test_contexts_dropped_to_the_empty_prompt_are_its_encoding(shards, encoded):
    config = tiny_config(cfg_dropout=1.0, cfg_dropout_form="empty_prompt")
    for folder in (shards, encoded):
        feed = feed_of(config, [read_index(folder)])
        dropped = feed.condition(first_batch(folder), step=0)
        expected, _ = build_encoders(config.encoders).text.encode([""], None)
        for context, mask in zip(dropped.context, dropped.context_mask):
            torch.testing.assert_close(context[mask], expected[0], atol=2e-3, rtol=2e-3)
    index = replace(read_index(encoded), folder=shards)  # no empty_context.npy there, and no encoder
    config.encoders.text.kind, index = "qwen", replace(index, encoders={**index.encoders, "text": {"kind": "qwen"}})
    with pytest.raises(UserError, match=r"stage\.cfg_dropout_form=empty_prompt needs the empty prompt's encoding"):
        feed_of(config, [index])


def test_lines_past_the_checkpoint_and_odd_ones_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\n\xff\n{"step": 2}\n{"step": 3}\n{"st')
    drop_later_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    drop_later_lines(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.fixture(scope="module")
def sources(shards, tmp_path_factory) -> list[ShardIndex]:
    """A robot, the same one with a dimension less of everything, and videos without a robot."""
    folder = tmp_path_factory.mktemp("sources")
    smaller = replace(WINDOW, action_key="action[0:2]", state_key="observation.state[0:1]")
    alone = replace(WINDOW, action_key="", state_key="")
    for name, window in (("smaller", smaller), ("alone", alone)):
        pack(shards.parent / "lerobot", folder / name, window=window, prompt_template=TEMPLATE)
    return [read_index(path) for path in (shards, folder / "smaller", folder / "alone")]


def batch_of(indices, *numbers):
    layout = BatchSchema.of(indices)
    rows = [next(iter(fixed_batches(indices[n].folder, batch_size=1, count=1))) for n in numbers]
    samples = [
        Sample(b.keys[0], b.frames[0].numpy(), None, {}, _row(b.actions), _row(b.state), b.meta[0], n)
        for n, b in zip(numbers, rows)
    ]
    return collate(samples, layout)


def _row(values):
    return None if values is None else values[0].numpy()


def test_every_source_is_normalised_with_its_own_statistics_and_padded(sources):
    feed, batch = feed_of(tiny_config(), sources), batch_of(sources, 0, 1)
    conditioned = feed.condition(batch, step=0)
    assert conditioned.action_dim_mask.tolist() == [[True] * 3, [True, True, False]]
    for i, index in enumerate(sources[:2]):
        own = from_statistics(index.statistics(), group="action", key=index.window.action_key, mode="minmax")
        sigma = conditioned.action_sigma[i]
        noise = conditioned.action_target[i, :, : own.dim] + own.normalize(batch.actions[i, :, : own.dim])
        clean = (conditioned.action[i, :, : own.dim] - sigma * noise) / (1 - sigma)
        torch.testing.assert_close(clean, own.normalize(batch.actions[i, :, : own.dim]), atol=1e-3, rtol=0)
        state = from_statistics(index.statistics(), group="state", key=index.window.state_key, mode="minmax")
        torch.testing.assert_close(
            conditioned.state[i, :, : state.dim], state.normalize(batch.state[i, :, : state.dim])
        )
    assert not conditioned.action[1, :, 2].any()
    assert not conditioned.state[1, :, 1].any()


def test_videos_without_a_robot_are_a_batch_without_actions(sources):
    feed = feed_of(tiny_config(), sources)
    conditioned = feed.condition(batch_of(sources, 2), step=0)
    assert (conditioned.action, conditioned.state, conditioned.action_mask) == (None, None, None)
    assert conditioned.tokens == 2 * 2 * 2  # two latent frames of 4 x 4, patches of 2 x 2
    labelled = feed.condition(batch_of(sources, 0), step=0)
    assert labelled.tokens == conditioned.tokens + 8
    assert labelled.flops > conditioned.flops > 0


def test_the_first_source_with_actions_is_the_policys(sources):
    robot, smaller, alone = sources
    check(tiny_config(), [alone, robot, smaller])
    feed = feed_of(tiny_config(), [alone, robot, smaller])
    assert feed.policy == 1
    assert feed.statistics == robot.statistics()
    assert torch.equal(
        feed.condition(batch_of(sources, 0), step=0, source=1).action,
        feed_of(tiny_config(), [robot]).condition(batch_of(sources, 0), step=0).action,
    )
    with pytest.raises(UserError, match=r"data.window.state_key=.*smaller was packed with"):
        check(tiny_config(), [smaller, robot])
    config = tiny_config()
    config.data.window = smaller.window
    check(config, [smaller, robot])
    config.model.action.action_dim = 4
    with pytest.raises(UserError, match=r"action_dim=4: .*shards holds 3; set 3, the largest of the sources"):
        check(config, [smaller, robot])
    with pytest.raises(UserError, match=r"model\.action\.action_dim=3: .*alone holds 0"):
        check(tiny_config(), [alone])


def test_two_robots_of_different_sizes_train_in_either_order(sources):
    robot, smaller, _ = sources
    config = tiny_config()
    config.data.window = smaller.window
    ahead, behind = feed_of(config, [smaller, robot]), feed_of(tiny_config(), [robot, smaller])
    assert ahead.statistics == smaller.statistics()
    assert [(r.action_dim, r.state_dim) for r in ahead.robots] == [(2, 1), (3, 2)]
    assert [r.window["action_key"] for r in behind.robots] == ["action", "action[0:2]"]
    assert len({r.name for r in ahead.robots}) == 2, "of one dataset, and told apart"
    assert [r.statistics for r in behind.robots] == [robot.statistics(), smaller.statistics()]
    batch = batch_of(sources, 0, 1)
    one = behind.condition(batch, step=0)
    other = ahead.condition(replace(batch, source=[1, 0]), step=0)
    for name in ("action", "state", "action_dim_mask", "action_target"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_held_out_windows_are_normalised_as_the_robot_that_they_are_of(sources):
    robot, smaller, _ = sources
    config = tiny_config()
    config.data.validation_shards = str(smaller.folder)
    feed = feed_of(config, [robot, smaller])
    assert (feed.policy, feed.held_out) == (0, 1)
    renamed = replace(smaller, source=smaller.source | {"dataset": "unseen"})
    assert held_out_source([robot, smaller], renamed) == 1, "by its windows and sizes"
    assert held_out_source([robot, robot], robot) == 0, "the policy's, where both could be meant"
    twin = replace(robot, source=robot.source | {"dataset": "twin"})
    assert held_out_source([robot, twin], twin) == 1, "by the name of its dataset"
    batch = next(iter(fixed_batches(smaller.folder, batch_size=1, count=1)))
    given = feed.encode(batch, "ti2v", source=feed.held_out)
    own = from_statistics(smaller.statistics(), group="action", key="action[0:2]", mode="minmax")
    assert torch.equal(given["actions"][..., :2], own.normalize(batch.actions))
    assert not given["actions"][..., 2].any()


class Process:
    """In place of an engine: the model itself, on one of several data ranks that nothing is sent between."""

    def __init__(self, config, *, rank=0, ranks=1):
        torch.manual_seed(0)
        self.model = WorldActionModel(config.model)
        self.model.load_state_dict(random_weights(config))
        alone = Topology.single(torch.device("cpu"))
        self.topology = replace(alone, data_rank=rank, degrees=Degrees(data=ranks))
        self.training = []

    def __call__(self, **inputs):
        self.training.append(self.model.training)
        return self.model(**inputs)


def losses_of(process, feed, batches, *, source):
    meter = LossMeter(process.topology)
    for batch in batches:
        given = feed.condition(batch, step=validation.FIXED_STEP, source=source)
        with torch.no_grad():
            output = process.model.eval()(**given.model_inputs())
        meter.add(given, feed.objective.loss_sums(given, output.video, output.action), range(given.latents.shape[2]))
    return {stream: meter.loss(stream) for stream in ("video", "action")}


def test_validation_counts_each_batch_once_as_the_robot_that_it_is_of(sources):
    robot, smaller, _ = sources
    config = tiny_config()
    config.data.validation_shards = str(smaller.folder)
    config.train.micro_batch, config.train.validation_batches = 2, 3
    feed = feed_of(config, [robot, smaller])
    batches = list(fixed_batches(smaller.folder, batch_size=2, count=3))
    for rank, mine in enumerate(([0, 2], [1])):  # the second rank runs a surplus round
        process = Process(config, rank=rank, ranks=2)
        found = validation.validate(process, feed, config.data, config.train)
        assert process.training == [False, False]
        assert process.model.training
        expected = losses_of(process, feed, [batches[i] for i in mine], source=1)
        assert found == pytest.approx(expected)
    assert validation.FIXED_STEP < 0, "no training step draws that noise"


def test_several_rates_of_one_mixture_are_said(sources):
    robot, smaller, alone = sources
    assert rates_of([robot, smaller]) is None
    assert rates_of([robot, alone]) is None
    faster = replace(smaller, fps=30.0, source={"dataset": "arm"})
    said = rates_of([robot, faster])
    assert "lerobot 5 frames and 10 actions, arm 15 frames and 30 actions" in said
    slower = replace(robot, window=replace(robot.window, action_video_freq_ratio=4))
    assert "lerobot 2.5 frames and 10 actions" in rates_of([robot, slower])


def test_sources_of_different_encoders_are_refused(encoded, shards):
    other = replace(read_index(encoded), encoders={"video": {"kind": "wan"}, "text": {"kind": "qwen"}})
    with pytest.raises(UserError, match=r"encoders\."):
        feed_of(tiny_config(), [read_index(encoded), other])
    assert feed_of(tiny_config(), [read_index(encoded), read_index(shards)]).needs_frames


def test_history_must_leave_frames_of_every_clip(sources):
    config = tiny_config(history_frames=2)
    with pytest.raises(UserError, match=r"history_frames=2 leaves nothing of the 2 latent frames"):
        check(config, sources)
