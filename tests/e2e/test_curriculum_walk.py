"""A curriculum by the command line: images and videos in buckets, instructions, joint windows; killed and resumed."""

import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from support.command_ranks import run_inside
from support.commands import TINY, command, kill_at, losses, run

from kairos_train.checkpoint.canonical import CheckpointReader

pytestmark = pytest.mark.slow

EXPERIMENT = """# @package _global_
defaults:
  - demo_push2d
  - _self_

experiment: three
train: {{accumulation: 1, checkpoint_every: 2, validate_every: 0}}
prepare:
  - data pack {dataset} --out {data}/images --encode {tiny} data.window.frames=1 data.window.stride=9 {alone}
  - data pack {dataset} --out {data}/videos --encode {tiny} data.window.frames=9 data.window.stride=9 {alone}
curriculum:
  stages:
    - name: physical
      set:
        - stage=physical
        - "data.sources=[{{shards: {data}/images, weight: 0.4}}, {{shards: {data}/videos, weight: 0.6}}]"
        - data.tokens_per_micro_batch=48
        - train.steps=null
        - train.tokens=200
    - name: behaviour
      set:
        - stage=behaviour
        - "stage.captions=[{{name: instruction}}]"
        - "data.sources=[{{shards: {data}/videos}}]"
        - train.steps=null
        - train.samples=39
    - {{name: joint, set: [stage=joint, train.steps=4]}}
"""
NAMES = ["physical", "behaviour", "joint"]


@pytest.fixture(scope="module")
def arguments(shards, tmp_path_factory):
    """`kairos-train train` on three stages with a folder for the run."""
    folder = tmp_path_factory.mktemp("curriculum")
    (folder / "experiment").mkdir()
    tiny = " ".join(TINY)
    alone = "data.window.state_key='' data.window.action_key=''"
    text = EXPERIMENT.format(dataset=shards / "dataset", data=folder, tiny=tiny, alone=alone)
    (folder / "experiment" / "three.yaml").write_text(text)

    def of(run_dir: Path, *overrides: str) -> list[str]:
        settings = ["experiment=three", *TINY[1:], f"data.shards={shards / 'shards'}", f"run_dir={run_dir}"]
        return command("train", "--config-dir", folder, *settings, "data.validation_shards=null", *overrides)

    return of


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> Path:
    """The stages walked without a pause."""
    run_dir = tmp_path_factory.mktemp("walked") / "run"
    result = run(arguments(run_dir))
    assert result.stderr.count("$ kairos-train data pack") == 2, "the data is made where it is missing"
    return run_dir


@pytest.fixture(scope="module")
def go_on(world, arguments):
    """The same command again, in a process that is kept; it may not start others."""

    def run(run_dir: Path, *overrides: str, code: int = 0) -> CompletedProcess:
        words = arguments(run_dir, "data.workers=0", *overrides)
        return run_inside(world(1), words[words.index("train") :], code=code)

    return run


def newest(run_dir: Path) -> CheckpointReader:
    return CheckpointReader(max((run_dir / "checkpoints").iterdir()))


def scalars(run_dir: Path) -> dict[str, float]:
    """The last value of every name."""
    return {k: v for line in (run_dir / "metrics.jsonl").read_text().splitlines() for k, v in json.loads(line).items()}


def test_three_stages_are_walked_each_to_its_budget(whole):
    readers = {name: newest(whole / name) for name in NAMES}
    assert readers["physical"].state["tokens"] >= 200 > readers["physical"].state["tokens"] - 48
    assert readers["behaviour"].state["samples"] == 40, "ten steps of four: a step is not cut"
    assert readers["joint"].step == 4
    assert {line["samples"] for line in map(json.loads, losses(whole / "physical"))} > {4}, "buckets of unequal samples"
    assert [scalars(whole / name)["progress/stage_number"] for name in NAMES] == [1, 2, 3]
    assert all(list((whole / name / "tensorboard").glob("events*")) for name in NAMES)
    assert not any(key.startswith("action_dit.") for key in readers["behaviour"].names("model"))
    assert any(key.startswith("action_dit.") for key in readers["joint"].names("model"))


def test_weights_and_averages_are_handed_over(whole, go_on, tmp_path):
    """A stage that learns nothing ends with the weights it was given; its average goes on averaging them in."""
    still = ["stage.lr=1e-30", "stage.weight_decay=0", "train.steps=null", "train.samples=4", "train.ema_decay=0.6"]
    still += ["curriculum.first=behaviour", "curriculum.last=behaviour"]
    shutil.copytree(whole / "physical", tmp_path / "physical")
    go_on(tmp_path, *still)
    before, after = newest(tmp_path / "physical"), newest(tmp_path / "behaviour")
    updates = before.state["ema"]["updates"]
    assert after.state["ema"]["updates"] == updates + 1
    kept = min(0.6, (1 + updates) / (10 + updates))
    for name in before.names("model"):
        weights, average = before.read("model", name), before.read("ema", name)
        torch.testing.assert_close(after.read("model", name), weights)
        torch.testing.assert_close(after.read("ema", name), kept * average + (1 - kept) * weights)
    assert any(not torch.equal(before.read("model", name), before.read("ema", name)) for name in before.names("model"))
    assert scalars(tmp_path / "behaviour")["progress/stage_number"] == 2


def test_a_curriculum_killed_in_its_second_stage_goes_on_to_the_same_numbers(whole, arguments, go_on, tmp_path):
    """It stands in step 9, which only the second stage has, until it is killed."""
    run_dir, stand = tmp_path / "run", "faults.inject=[{kind: slow, step: 9, seconds: 300, life: 1}]"
    kill_at(arguments(run_dir, stand), run_dir / "behaviour", 8, checkpoint=6)
    assert len(losses(run_dir / "physical")) < 9
    assert not (run_dir / "joint").exists()
    result = go_on(run_dir)
    assert "stage 1 of 3: physical is finished" in result.stderr
    for name in NAMES:
        assert losses(run_dir / name) == losses(whole / name)
    assert go_on(run_dir).stderr.count("is finished") == 3


def test_a_stage_is_not_trained_on_under_one_that_was_started_from_it(whole, go_on, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(newest(tmp_path / "run" / "physical").path)
    result = go_on(tmp_path / "run", code=2)
    assert "stage physical is not finished, but" in result.stderr
    assert "curriculum.first=behaviour" in result.stderr
