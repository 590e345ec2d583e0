"""A run on two robots of different sizes, the smaller one first: trained, exported, and each judged as itself."""

import json

import pytest
from support.commands import TINY, command, run

from dataloaders.shards import read_index
from kairos_train.cli import main
from kairos_train.serving.policy import ServedPolicy

pytestmark = pytest.mark.slow

OWN = ["data.window.action_key=action[1:2]", "data.window.state_key=observation.state[0:1]"]


def test_the_smaller_robot_may_come_first(shards, train, tmp_path):
    small, whole = tmp_path / "small", read_index(shards / "shards")
    words = ["data", "pack", shards / "dataset", "--out", small, "--encode", "--only-episodes", "0-2"]
    assert main([*map(str, words), *TINY, *OWN]) == 0
    sources = f"data.sources=[{{shards: '{small}'}}, {{shards: '{shards / 'shards'}'}}]"
    done = train(tmp_path / "run", "stage=joint", "train.steps=2", "train.validate_every=2", sources, *OWN)
    assert "several rates" not in done.stderr
    run(command("export", tmp_path / "run", "--out", tmp_path / "policy"))
    robots = json.loads((tmp_path / "policy/robots.json").read_text())["robots"]
    sizes = [(1, 1), (whole.action_dim, whole.state_dim)]
    assert [(robot["action_dim"], robot["state_dim"]) for robot in robots] == sizes
    for robot, folder, size in zip(robots, (small, shards / "shards"), sizes):
        words = ["--samples", 2, "--steps", 1, "--parts", "open_loop,losses"]
        words = ["evaluate", tmp_path / "policy", "--input", folder, "--out", tmp_path / robot["name"], *words]
        assert main(list(map(str, words))) == 0
        told = ServedPolicy(tmp_path / "policy", steps=1, robot=robot["name"]).metadata
        assert (told["action_dim"], told["state_dim"]) == size
