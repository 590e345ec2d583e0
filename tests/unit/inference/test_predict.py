"""Observations of several clients at a time, pictures of several cameras, rollouts in pictures, compiled passes."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.model_factory import make_config, make_inputs, make_model
from support.tiny_export import tiny_config, write_tiny_checkpoint

from kairos_train.basics.errors import UserError
from kairos_train.conditioning.build import build_encoders
from kairos_train.conditioning.interfaces import Encoders
from kairos_train.inference.compiled import CompiledModel
from kairos_train.inference.load import Policy, load
from kairos_train.inference.predict import Predictor, Request
from kairos_train.inference.rollout import chunk_seed
from kairos_train.inference.sampler import SamplerConfig
from kairos_train.weights.export import export

SAMPLER = SamplerConfig(steps=3, guidance=2.0)


@pytest.fixture(scope="module")
def predictor(exported) -> Predictor:
    return Predictor(load(exported), sampler=SAMPLER)


@pytest.fixture(scope="module")
def long(shards, tmp_path_factory) -> Policy:
    """Windows of 13 frames, four latent ones, with causal history."""
    config = tiny_config()
    config.model.video.history_causal = True
    config.data.window = replace(config.data.window, frames=13)
    folder = tmp_path_factory.mktemp("long")
    export(write_tiny_checkpoint(folder / "run", shards, config=config), folder / "export", dtype="fp32")
    return load(folder / "export")


def requests(count: int) -> list[Request]:
    rng = np.random.default_rng(0)
    texts = ("push square 0", "push the other square, which is red, to the left", "go")
    return [
        Request(
            frames=rng.integers(0, 255, (32, 32, 3), dtype=np.uint8),
            state=rng.uniform(0, 20, 2).astype(np.float32),
            instruction=texts[i % 3],
            seed=10 + i,
        )
        for i in range(count)
    ]


def conditions(predictor: Predictor):
    some = requests(2)
    return predictor.conditions(
        texts=[predictor.prompt(r.instruction) for r in some],
        state=np.stack([r.state for r in some]),
        frames=np.stack([r.frames[None] for r in some]),
    )


def test_a_request_is_answered_alike_whoever_shares_its_batch(predictor):
    some = requests(4)
    alone = [predictor.predict(r.frames, r.state, r.instruction, seed=r.seed).actions for r in some]
    for order in ([0, 1, 2, 3], [3, 1], [2, 0, 3]):
        together = predictor.predict_batch([some[i] for i in order])
        for i, answer in zip(order, together):
            np.testing.assert_allclose(answer.actions, alone[i], atol=1e-4)
            assert answer.frames is None
    assert np.abs(alone[0] - alone[3]).max() > 1e-2


def test_equal_requests_with_other_seeds_get_other_noise(predictor):
    one = requests(1)[0]
    same, other = predictor.predict_batch([one, replace(one, seed=11)])
    assert np.abs(same.actions - other.actions).max() > 1e-3


def test_a_batch_in_mode_joint_has_pictures_too(predictor):
    some = requests(2)
    joint, action = predictor.predict_batch(some, mode="joint"), predictor.predict_batch(some)
    for one, other in zip(joint, action):
        assert one.frames.shape == (5, 32, 32, 3)
        np.testing.assert_allclose(one.actions, other.actions, atol=1e-4)


def test_latents_take_the_place_of_pictures(predictor):
    some = requests(2)
    encoded = predictor.encoders.video.encode(torch.from_numpy(np.stack([r.frames[None] for r in some])))
    latents = [replace(r, frames=None, latents=z) for r, z in zip(some, encoded)]
    for one, other in zip(predictor.predict_batch(some), predictor.predict_batch(latents)):
        np.testing.assert_allclose(one.actions, other.actions, atol=1e-5)
    with pytest.raises(UserError, match="some hold frames and some do not"):
        predictor.predict_batch([some[0], latents[1]])


def test_a_request_that_does_not_fit_is_named(predictor):
    good = requests(3)
    predictor.check(good[0])
    for bad, match in (
        (replace(good[1], frames=None), r"^request 1: frames=None"),
        (replace(good[1], frames=np.zeros((48, 32, 3), np.uint8)), r"^request 1: frames: 48×32"),
        (replace(good[1], state=None), r"^request 1: state=None"),
        (replace(good[1], frames=None, latents=torch.zeros(16, 1, 4, 8)), r"^request 1: latents: .*\[16, 1, 4, 4\]"),
    ):
        with pytest.raises(UserError, match=match):
            predictor.predict_batch([good[0], bad, good[2]])
    with pytest.raises(UserError, match="at least one"):
        predictor.predict_batch([])


def test_a_head_over_both_wrists_is_one_picture_of_the_windows_size(exported):
    policy = load(exported)
    config = copy.deepcopy(policy.config)
    config.stage.conditions = {"t2v": 1.0}
    config.data.window.height, config.data.window.cameras = 96, ["head", "left", "right"]
    latents = {}
    for layout in ("side_by_side", "head_over_wrists"):
        config.data.window.layout = layout
        without_frames = Predictor(replace(policy, config=copy.deepcopy(config)), sampler=SamplerConfig(steps=1))
        given = without_frames.conditions(texts=["go"], state=np.zeros((1, 2)), frames=None)
        latents[layout] = without_frames.sample(given, mode="video", seeds=[0]).latents.shape[-2:]
    assert latents == {"side_by_side": (12, 12), "head_over_wrists": (12, 4)}
    config.stage.conditions = {"ti2v": 1.0}
    given = Predictor(replace(policy, config=config))
    state = np.zeros(2, np.float32)
    given.check(Request(np.zeros((96, 32, 3), np.uint8), state, "go", 0))
    with pytest.raises(UserError, match=r"96×64 pixels.*96×32 in all, the head over both wrists"):
        given.check(Request(np.zeros((96, 64, 3), np.uint8), state, "go", 0))


def test_the_first_chunk_of_a_rollout_is_a_sample_and_later_ones_see_its_last_pictures(long):
    predictor = Predictor(long, sampler=SAMPLER)
    given, seeds = conditions(predictor), [5, 6]
    first, second = predictor.rollout(given, mode="joint", seeds=seeds, chunks=2, history=2)
    sampled = predictor.sample(given, mode="joint", seeds=seeds)
    assert np.array_equal(first.frames, predictor.frames(sampled))
    assert np.array_equal(first.actions, predictor.actions(sampled))
    assert first.frames.shape == (2, 13, 32, 32, 3)
    again = predictor.encoders.video.encode(torch.from_numpy(first.frames[:, -5:]))
    sampled = predictor.sample(replace(given, history=again), mode="joint", seeds=[chunk_seed(s, 1) for s in seeds])
    assert np.array_equal(second.frames, predictor.frames(sampled)[:, 5:])
    assert np.array_equal(second.actions, predictor.actions(sampled))
    assert second.frames.shape == (2, 8, 32, 32, 3)
    assert second.actions.shape == (2, long.horizon, 3)


def test_a_carried_rollout_goes_on_in_latents(long):
    predictor = Predictor(long, sampler=SAMPLER)
    given = conditions(predictor)
    found = {
        carried: list(predictor.rollout(given, mode="video", seeds=[5, 6], chunks=3, history=2, carried=carried))
        for carried in (False, True)
    }
    assert [chunk.frames.shape[1] for chunk in found[True]] == [13, 8, 8]
    difference = [np.abs(a.frames.astype(int) - b.frames).max() for a, b in zip(*found.values())]
    assert difference[0] <= 1
    assert difference[1] > 1
    assert all(chunk.actions is None for chunk in found[True])


class WithPictures:
    """The text encoder, told that it looks at pictures, and what it was shown."""

    def __init__(self, encoder) -> None:
        self.encoder, self.text_dim, self.shown = encoder, encoder.text_dim, []
        self.identity = {**encoder.identity, "image": True}

    def encode(self, prompts, images=None):
        self.shown.append(images)
        return self.encoder.encode(prompts, images)


def test_a_text_encoder_that_looks_sees_the_first_picture_of_every_chunk(long):
    built = build_encoders(long.config.encoders)
    looking = WithPictures(built.text)
    predictor = Predictor(replace(long, encoders=None), encoders=Encoders(built.video, looking), sampler=SAMPLER)
    given, texts = conditions(predictor), ["go", "stay"]
    looking.shown.clear()
    first, *_ = predictor.rollout(given, mode="video", seeds=[5, 6], chunks=2, history=2, texts=texts)
    assert len(looking.shown) == 1
    assert np.array_equal(looking.shown[0].numpy(), first.frames[:, -5])
    list(predictor.rollout(given, mode="video", seeds=[5, 6], chunks=2, history=2))
    assert len(looking.shown) == 1


def test_rollouts_that_cannot_go_on_are_refused(predictor, exported):
    given = conditions(predictor)
    config = copy.deepcopy(predictor.policy.config)
    config.stage.conditions = {"t2v": 1.0}
    with pytest.raises(UserError, match="trained without given frames"):
        Predictor(replace(load(exported), config=config)).memory(mode="joint")
    for settings, match in (
        ({"mode": "action"}, "no video to go on from"),
        ({"mode": "joint", "history": 2}, "history=2: a chunk of 2 latent frames goes on from 1 of them"),
        ({"mode": "joint", "carried": True}, "history_causal=false"),
    ):
        with pytest.raises(UserError, match=match):
            next(predictor.rollout(given, seeds=[1, 2], chunks=2, **settings))


@pytest.mark.filterwarnings("ignore:Dynamo detected:UserWarning")
def test_compiled_passes_are_one_graph_each_and_give_the_same():
    """The graph is captured but not translated: code generation takes a minute on a CPU."""
    config = replace(make_config(layer_cycle=["DSWA", "GATED"]), num_layers=2)
    model = make_model(config).float().eval().requires_grad_(False)
    given = make_inputs(history=(2, 2), dtype=torch.float32)
    text = {key: given[key] for key in ("context", "context_mask", "state")}
    compiled = CompiledModel(model, backend="eager", fullgraph=True)
    video = {key: given[key] for key in (*text, "latents", "video_timestep", "history_frames")}
    torch.testing.assert_close(compiled(**video).video, model(**video).video)
    cache = model.encode_history(given["latents"][:, :, :2], **text)
    actions = [m.forward_action(cache, given["action"], given["action_timestep"], **text) for m in (compiled, model)]
    torch.testing.assert_close(*actions)
