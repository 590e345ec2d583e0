"""Two robots of different sizes in one run: exported together, each evaluated and served as itself."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.tiny_export import CAMERA, TEMPLATE, WINDOW, random_weights, tiny_config

from dataloaders.packing.pack import pack
from dataloaders.shards import read_index
from evaluation import losses
from evaluation.held_out import open_policy
from evaluation.open_loop import evaluate
from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.writing import write_checkpoint
from kairos_train.conditioning.build import build_encoders
from kairos_train.config.compose import to_yaml
from kairos_train.inference.load import load
from kairos_train.inference.predict import Predictor
from kairos_train.inference.robots import ROBOTS_FILE, to_json
from kairos_train.serving.observation import Observation
from kairos_train.serving.policy import ServedPolicy
from kairos_train.training.inputs.sources import robots_of
from kairos_train.weights.export import export

SMALL = replace(WINDOW, action_key="action[1:3]", state_key="observation.state[1:2]", frames=5, stride=4)


@pytest.fixture(scope="module")
def sources(shards, tmp_path_factory):
    """A robot of 3 actions and 2 states, and one of 2 and 1 whose numbers are others."""
    folder = tmp_path_factory.mktemp("sources") / "small"
    pack(shards.parent / "lerobot", folder, window=SMALL, prompt_template=TEMPLATE)
    index = json.loads((folder / "index.json").read_text())
    index["source"]["dataset"] = "small"
    (folder / "index.json").write_text(json.dumps(index))
    return [read_index(shards), read_index(folder)]


def export_of(sources, out, *, change=None):
    """An export of a run on these sources, in this order."""
    config = tiny_config()
    config.data.window = sources[0].window
    weights = random_weights(config)
    if change:
        change(weights)
    robots = list(robots_of(sources).values())
    checkpoint = write_checkpoint(
        out / "run",
        1,
        sections={"model": weights},
        state={"encoders": build_encoders(config.encoders).identity},
        files={
            "config.yaml": to_yaml(config),
            "dataset_stats.json": json.dumps(sources[0].statistics()),
            ROBOTS_FILE: to_json(robots),
        },
    )
    export(checkpoint, out / "export", weights="raw", dtype="fp32")
    return out / "export"


@pytest.fixture(scope="module")
def both(sources, tmp_path_factory):
    return export_of(sources, tmp_path_factory.mktemp("both"))


@pytest.fixture(scope="module")
def reversed_order(sources, tmp_path_factory):
    return export_of(sources[::-1], tmp_path_factory.mktemp("reversed"))


def observation(state_dim: int) -> Observation:
    rng = np.random.default_rng(0)
    return Observation((rng.integers(0, 256, (1, 32, 32, 3), np.uint8),), np.full((1, state_dim), 9.0), "push", 5)


def act(folder, robot, state_dim, **settings):
    policy = ServedPolicy(folder, steps=2, robot=robot, **settings)
    return policy.act([policy.history().window(observation(state_dim))])[0]


def test_each_robot_is_served_with_its_own_sizes_and_statistics(both, reversed_order, sources):
    for folder, first in ((both, "lerobot"), (reversed_order, "small")):
        assert ServedPolicy(folder, steps=1).metadata["robot"] == first
        for index, name, sizes in zip(sources, ("lerobot", "small"), ((3, 2), (2, 1))):
            told = ServedPolicy(folder, steps=1, robot=name).metadata
            assert (told["robot"], told["action_dim"], told["state_dim"], told["cameras"]) == (name, *sizes, [CAMERA])
            policy = load(folder, robot=name)
            assert policy.statistics == index.statistics()
            assert policy.config.data.window.action_key == index.window.action_key
            assert act(folder, name, sizes[1]).shape == (8, sizes[0])
    np.testing.assert_array_equal(act(both, "small", 1), act(reversed_order, "small", 1))
    with pytest.raises(UserError, match=r"robot=arm: .* was trained on lerobot, small; name one of these"):
        load(both, robot="arm")


def test_what_a_robot_does_not_have_stays_zero_and_without_influence(sources, both, tmp_path):
    def disturb(weights):
        weights["action_dit.action_encoder.weight"][:, 2] += 1
        weights["action_dit.head.weight"][2] += 1
        weights["action_dit.head.bias"][2] += 1

    other = export_of(sources, tmp_path, change=disturb)
    np.testing.assert_allclose(act(both, "small", 1), act(other, "small", 1), atol=1e-6)
    assert np.abs(act(both, "lerobot", 2) - act(other, "lerobot", 2)).max() > 1e-2
    predictor = Predictor(load(both, robot="small"))
    window = observation(1)
    conditions = predictor.conditions(texts=["push"], state=window.states, frames=window.pictures[0][None])
    for mode in ("action", "joint"):
        sampled = predictor.sample(conditions, mode=mode, seeds=[1])
        assert sampled.actions.shape == (1, 8, 3)
        assert not sampled.actions[..., 2].any()
        assert sampled.actions[..., :2].all()
    assert conditions.state.shape == (1, 1, 2)
    assert not conditions.state[..., 1].any()


def test_each_robot_is_evaluated_with_its_own_statistics(both, sources):
    for index, name in zip(sources, ("lerobot", "small")):
        policy, _ = open_policy(both, index.folder)
        assert policy.robot.name == name
        result = evaluate(both, shards=index.folder, out=None, samples=4, steps=1)
        alone = policy.statistics["action"][index.window.action_key]
        assert len(alone["global_min"]) == index.action_dim
        assert result["rows"]["mean"]["mse_raw"] > 0
        predictor = Predictor(policy)
        measured = losses.measure(predictor, index, samples=4, seed=0, batch_size=2, draws=1)
        assert np.isfinite(measured["streams"]["action"]["loss"])


def test_the_loss_of_a_padded_robot_is_that_of_training(both, sources):
    """Padded dimensions: no noise in them, none of the loss."""
    policy, index = open_policy(both, sources[1].folder)
    predictor = Predictor(policy)
    batch = next(losses.spread_batches(index, count=2, batch_size=2, with_frames=True))
    noisy = losses.conditioned(predictor, losses.objective_of(predictor, seed=0), batch, draw=0)
    assert noisy.action_dim_mask.tolist() == [[True, True, False]] * 2
    assert not noisy.action[..., 2].any()
    assert not noisy.action_target[..., 2].any()


def test_shards_that_could_be_of_several_robots_must_be_told(sources, tmp_path):
    twin = replace(sources[0], source=sources[0].source | {"dataset": "twin"})
    third = replace(sources[0], source=sources[0].source | {"dataset": "third"})
    folder = export_of([twin, third], tmp_path)
    with pytest.raises(UserError, match=r"several robots of .* \(twin, third\); say which one with --robot"):
        open_policy(folder, sources[0].folder)
    assert open_policy(folder, sources[0].folder, robot="third")[0].robot.name == "third"


def test_robots_of_another_export_are_found_out(both, tmp_path):
    shutil.copytree(both, tmp_path / "export")
    content = json.loads((tmp_path / "export" / ROBOTS_FILE).read_text())
    content["robots"][0]["statistics"]["action"]["action"]["global_max"][0] += 1
    (tmp_path / "export" / ROBOTS_FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"robots\.json: is not the one that was exported"):
        load(tmp_path / "export")
    (tmp_path / "export" / ROBOTS_FILE).unlink()
    with pytest.raises(UserError, match=r"robots\.json: not found"):
        load(tmp_path / "export")


def test_a_run_of_one_robot_has_no_names(exported):
    assert load(exported).robots == []
    with pytest.raises(UserError, match=r"robot=x: .* was trained on one that has no name"):
        load(exported, robot="x")


def test_the_loss_is_of_the_dimensions_that_there_are(both):
    policy = load(both, robot="small")
    actions, mask = Predictor(policy).padded_actions(torch.zeros(1, 8, 2))
    assert actions.shape == (1, 8, 3)
    assert mask.tolist() == [[True, True, False]]
    whole, none = Predictor(load(both)).padded_actions(torch.zeros(1, 8, 3))
    assert (whole.shape, none) == ((1, 8, 3), None)
