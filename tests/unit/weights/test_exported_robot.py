"""The robot's cameras and rate of actions, from the shards through checkpoint and export to a served policy."""

import dataclasses
import json

import pytest
from support.tiny_export import CAMERA, feed_of, random_weights, tiny_config

from dataloaders.shards import read_index
from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.writing import write_checkpoint
from kairos_train.conditioning.build import build_encoders
from kairos_train.config.compose import to_yaml
from kairos_train.config.schema import Config
from kairos_train.serving.policy import ServedPolicy
from kairos_train.weights.export import export


def unnamed() -> Config:
    """A run that took every camera of its dataset."""
    config = tiny_config()
    window = dataclasses.replace(config.data.window, cameras=[])
    return dataclasses.replace(config, data=dataclasses.replace(config.data, window=window))


def exported_with(tmp_path, shards, state: dict) -> ServedPolicy:
    config = unnamed()
    checkpoint = write_checkpoint(
        tmp_path / "run",
        1,
        sections={"model": random_weights(config)},
        state={"encoders": build_encoders(config.encoders).identity, **state},
        files={"config.yaml": to_yaml(config), "dataset_stats.json": (shards / "dataset_stats.json").read_text()},
    )
    export(checkpoint, tmp_path / "out", weights="raw", dtype="fp32")
    return tmp_path / "out"


def test_a_run_knows_its_robots_cameras_and_rate(shards):
    feed = feed_of(unnamed(), [read_index(shards)])
    assert feed.robot == {"fps": 10.0, "cameras": [CAMERA]}


def test_videos_have_no_robot(shards):
    index = dataclasses.replace(read_index(shards), action_dim=0, state_dim=0)
    config = dataclasses.replace(unnamed(), stage=dataclasses.replace(unnamed().stage, streams="video"))
    assert feed_of(config, [index]).robot is None


def test_an_export_is_served_without_being_told_cameras_and_rate(tmp_path, shards):
    folder = exported_with(tmp_path, shards, {"robot": {"fps": 12.5, "cameras": ["observation.images.front"]}})
    told = ServedPolicy(folder, steps=1).metadata
    assert (told["fps"], told["cameras"]) == (12.5, ["observation.images.front"])
    assert ServedPolicy(folder, steps=1, fps=25.0).metadata["fps"] == 25.0
    with pytest.raises(UserError, match=r"cameras=observation.images.wrist: .* was trained with observation.images.f"):
        ServedPolicy(folder, steps=1, cameras=["observation.images.wrist"])


def test_an_export_of_another_robot_is_found_out(tmp_path, shards):
    folder = exported_with(tmp_path, shards, {"robot": {"fps": 12.5, "cameras": ["observation.images.front"]}})
    described = json.loads((folder / "config.json").read_text())
    described["robot"]["cameras"] = ["observation.images.wrist"]
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="is not as it was exported"):
        ServedPolicy(folder)


def test_an_export_that_does_not_know_its_robot_must_be_told_the_cameras(tmp_path, shards):
    folder = exported_with(tmp_path, shards, {})
    with pytest.raises(UserError, match=r"data.window.cameras is empty"):
        ServedPolicy(folder)
    told = ServedPolicy(folder, steps=1, cameras=[CAMERA]).metadata
    assert (told["fps"], told["cameras"]) == (None, [CAMERA])
