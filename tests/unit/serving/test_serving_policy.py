"""Windows in, raw actions out: batches, histories, actions relative to a state; and what cannot be served."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from support.serving_exports import config_of, picture, write_export
from support.tiny_export import tiny_config, write_tiny_checkpoint

from kairos_train.basics.errors import UserError
from kairos_train.inference.load import load
from kairos_train.inference.predict import Predictor
from kairos_train.serving.observation import Observation
from kairos_train.serving.policy import ActionClipping, ServedPolicy
from kairos_train.weights.export import export

LIBERO = ["observation.images.image", "observation.images.wrist_image"]
PROMPTS = ("push", "push the red square to the left", "a")


def observation(seed: int, *, cameras: int = 1, state_dim: int = 2, frames: int = 1, size: int = 32) -> Observation:
    rng = np.random.default_rng(seed)
    pictures = tuple(rng.integers(0, 256, (frames, size, size, 3), dtype=np.uint8) for _ in range(cameras))
    states = rng.uniform(-1, 1, (frames, state_dim)).astype(np.float32)
    return Observation(pictures, states, PROMPTS[seed % len(PROMPTS)], seed)


@pytest.fixture(scope="module")
def policy(exported) -> ServedPolicy:
    return ServedPolicy(exported)


def windows_of(policy: ServedPolicy, count: int):
    return [policy.history().window(observation(seed)) for seed in range(count)]


def test_actions_are_the_predictors(policy, exported):
    window = windows_of(policy, 1)[0]
    alone = Predictor(load(exported)).predict(window.frames, window.state, window.prompt, seed=window.seed)
    np.testing.assert_allclose(policy.act([window])[0], alone.actions, atol=1e-6)


def test_a_batch_gives_each_request_what_it_gets_alone(policy):
    windows = windows_of(policy, 5)
    together = policy.act(windows)
    assert together.shape == (5, policy.metadata["horizon"], policy.metadata["action_dim"])
    for window, actions in zip(windows, together):
        np.testing.assert_allclose(policy.act([window])[0], actions, atol=1e-5)
    np.testing.assert_allclose(policy.act(windows[::-1])[::-1], together, atol=1e-5)
    other_seed = dataclasses.replace(windows[0], seed=99)
    assert np.abs(policy.act([other_seed])[0] - together[0]).max() > 1e-2


def test_metadata_tells_what_a_client_needs(policy, exported):
    told = policy.metadata
    assert (told["horizon"], told["action_dim"], told["state_dim"], told["given_frames"]) == (8, 3, 2, 1)
    assert told["cameras"] == ["observation.images.top"]
    assert told["observation_keys"] == {"dataset": ["observation.images.top", "observation.state", "prompt"]}
    assert told["statistics_sha256"] == hashlib.sha256((exported / "dataset_stats.json").read_bytes()).hexdigest()
    assert told["fps"] is None
    assert ServedPolicy(exported, fps=12.5, steps=3).metadata | {"fps": None, "sampling_steps": 10} == told


def test_cameras_are_put_together_as_for_training(tmp_path):
    config = config_of(state_dim=8, action_dim=7, cameras=LIBERO)
    policy = ServedPolicy(write_export(tmp_path / "pair", config))
    given = observation(0, cameras=2, state_dim=8, size=64)
    window = policy.history().window(given)
    assert window.frames.shape == (1, 32, 64, 3)
    left_then_right = [part.mean() for part in np.split(window.frames[0].astype(float), 2, axis=1)]
    assert left_then_right == pytest.approx([p.mean() for p in given.pictures], abs=1)
    assert policy.act([window]).shape == (1, 8, 7)
    assert list(policy.metadata["observation_keys"]) == ["dataset", "libero"]


def test_actions_relative_to_the_state_get_it_back(tmp_path):
    recorded = config_of(absolute_dims=[2])
    relative = config_of(absolute_dims=[2], action_values="minus_state")
    policies = [ServedPolicy(write_export(tmp_path / str(i), c)) for i, c in enumerate((recorded, relative))]
    window = windows_of(policies[0], 1)[0]
    plain, back = (policy.act([window])[0] for policy in policies)
    added = np.array([*window.state, 0], np.float32)
    np.testing.assert_allclose(back - plain, np.broadcast_to(added, plain.shape), atol=1e-6)


@pytest.mark.parametrize("values", ["recorded", "minus_state"])
def test_clipped_actions_stay_within_the_data_and_are_counted(tmp_path, values):
    """The statistics' range is [-1, 1]; with a margin of -0.45 of it on each side, [-0.1, 0.1]."""
    folder = write_export(tmp_path / "toy", config_of(action_values=values, absolute_dims=[2]))
    plain = ServedPolicy(folder)
    window = windows_of(plain, 1)[0]
    offset = np.zeros(3) if values == "recorded" else np.array([*window.state, 0])
    free = plain.act([window])[0] - offset
    assert plain.clipped == 0
    for margin, bound in ((-0.45, 0.1), (0.5, 2.0)):
        policy = ServedPolicy(folder, clipping=ActionClipping("quantile", margin))
        actions = policy.act([window])[0] - offset
        np.testing.assert_allclose(actions, np.clip(free, -bound, bound), atol=1e-5)
        assert policy.clipped == (np.abs(free) > bound).sum()
        assert (policy.clipped > 0) == (margin < 0)
        assert policy.metadata["clipping"] == {"range": "quantile", "margin": margin}


def test_clipping_does_not_hide_actions_that_are_not_finite(exported):
    policy = ServedPolicy(exported, clipping=ActionClipping("minmax"))
    bounded = policy._bounded(np.array([[[np.inf, np.nan, -1e9]]], np.float32))[0, 0]
    assert np.isposinf(bounded[0])
    assert np.isnan(bounded[1])
    assert bounded[2] > -1e9
    assert policy.clipped == 1


@pytest.fixture(scope="module")
def remembering_export(tmp_path_factory) -> Path:
    """Two history latent frames: five given frames, the chunk beginning with the first of them."""
    return write_export(tmp_path_factory.mktemp("two") / "toy", config_of(history_frames=2, frames=9))


@pytest.fixture(scope="module")
def remembering(remembering_export) -> ServedPolicy:
    return ServedPolicy(remembering_export)


def test_a_history_holds_the_newest_frames_and_the_state_of_the_first(remembering):
    assert remembering.given_frames == 5
    history = remembering.history()
    seen = [observation(seed) for seed in range(7)]
    first = history.window(seen[0])
    assert np.array_equal(first.frames, np.stack([seen[0].pictures[0][0]] * 5))
    for one in seen[1:]:
        last = history.window(one)
    assert np.array_equal(last.frames, np.stack([one.pictures[0][0] for one in seen[2:]]))
    assert np.array_equal(last.state, seen[2].states[0])
    history.clear()
    assert np.array_equal(history.window(seen[0]).frames, first.frames)


def test_frames_sent_at_once_are_those_sent_one_by_one(remembering):
    stack = observation(3, frames=5)
    one_by_one, at_once = remembering.history(), remembering.history()
    for i in range(5):
        last = one_by_one.window(
            dataclasses.replace(stack, pictures=(stack.pictures[0][i : i + 1],), states=stack.states[i : i + 1])
        )
    assert np.array_equal(at_once.window(stack).frames, last.frames)
    assert np.array_equal(at_once.window(stack).state, last.state)


def test_actions_before_the_newest_frame_are_not_served(remembering, remembering_export):
    window = remembering.history().window(observation(2, frames=5))
    predictor = Predictor(load(remembering_export))
    whole = predictor.predict(window.frames, window.state, window.prompt, seed=window.seed).actions
    past = 4 * predictor.policy.config.data.window.action_video_freq_ratio
    assert remembering.metadata["horizon"] == len(whole) - past == 8
    np.testing.assert_allclose(remembering.act([window])[0], whole[past:], atol=1e-6)


def test_cameras_that_an_export_does_not_name_must_be_told(tmp_path):
    folder = write_export(tmp_path / "unnamed", config_of(cameras=[]))
    with pytest.raises(UserError, match=r"data.window.cameras is empty"):
        ServedPolicy(folder)
    policy = ServedPolicy(folder, cameras=["front", "wrist"])
    assert policy.metadata["cameras"] == ["front", "wrist"]
    assert policy.history().window(observation(0, cameras=2)).frames.shape == (1, 32, 64, 3)
    with pytest.raises(UserError, match="names one twice"):
        ServedPolicy(folder, cameras=["front", "front"])


def test_cameras_other_than_those_of_training_are_refused(exported):
    with pytest.raises(UserError, match=r"cameras=front: .* was trained with observation.images.top"):
        ServedPolicy(exported, cameras=["front"])


def test_a_model_without_actions_is_refused(tmp_path):
    config = tiny_config(streams="video", actions=False)
    export(write_tiny_checkpoint(tmp_path / "run", None, config=config), tmp_path / "video", dtype="fp32")
    with pytest.raises(UserError, match="trained without actions"):
        ServedPolicy(tmp_path / "video")


def test_warming_up_computes_a_batch(policy, remembering):
    policy.warm_up(3)
    remembering.warm_up(1)


def test_pictures_of_any_size_become_the_models(policy):
    given = dataclasses.replace(observation(0), pictures=(picture(0, 1, 4096)[None],))
    assert policy.history().window(given).frames.shape == (1, 32, 32, 3)
