"""Bad steps in real runs: dropped, gone back over, given up on. And the dry run, which drops its update as they do."""

import json
import math
from pathlib import Path

import pytest
from support.command_ranks import with_batches
from support.commands import RELEASED, losses, train_overrides

from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.operations.events import read_events

pytestmark = pytest.mark.slow

SETTINGS = ["stage=joint", "data.validation_shards=null", "monitor.log_samples=true"]


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in losses(run_dir)]


def of_kind(run_dir: Path, kind: str) -> list[dict]:
    return [event for event in read_events(run_dir) if event["kind"] == kind]


def samples(run_dir: Path) -> dict[int, list]:
    entries = map(json.loads, (run_dir / "samples" / "rank-00000.jsonl").read_text().splitlines())
    return {entry["step"]: entry["samples"] for entry in entries}


def state(run_dir: Path, step: int) -> dict:
    reader = CheckpointReader(run_dir / "checkpoints" / f"step-{step:08d}")
    return {f"{s}/{n}": reader.read(s, n) for s in ("model", "ema", "exp_avg", "rng") for n in reader.names(s)}


@pytest.mark.parametrize("stage", [0, 3, *(pytest.param(stage, marks=pytest.mark.nightly) for stage in (1, 2))])
def test_a_bad_step_and_the_dry_run_change_nothing_but_their_own_step(train, tmp_path, stage):
    """Beside the same run without a dry run, whose learning rate is nothing in the bad step: the same but for EMA and
    moments, which the dropped update does not touch; so the losses of the next step are the ones to look at."""
    common = [*SETTINGS, *RELEASED, "train.steps=4", "train.checkpoint_every=1", "train.keep_last=9"]
    common.append(f"train.zero_stage={stage}")
    spoiled = "faults.inject=[{kind: nan, step: 3, rank: 1}]"
    train(tmp_path / "bad", *common, spoiled, ranks=2)
    train(tmp_path / "good", *common, "train.dry_run=false", ranks=2)
    bad, good = lines(tmp_path / "bad"), lines(tmp_path / "good")
    assert bad[:2] == good[:2], "the dry run before them left no trace"
    assert [line["stepped"] for line in bad] == [True, True, False, True]
    assert math.isnan(bad[2]["loss"])
    assert bad[3]["loss"] != good[3]["loss"]
    before, after = state(tmp_path / "bad", 2), state(tmp_path / "bad", 3)
    assert all((before[name] == after[name]).all() for name in before), "weights, averages and moments of step 2"
    assert all((before[name] == same).all() for name, same in state(tmp_path / "good", 2).items())
    (event,) = of_kind(tmp_path / "bad", "skipped")
    assert (event["step"], event["why"]) == (3, "not finite")
    assert set(event["samples"]) >= set(samples(tmp_path / "bad")[3][0])
    assert len(of_kind(tmp_path / "bad", "memory")) == 1
    assert not of_kind(tmp_path / "good", "memory")


def test_a_loss_spike_is_dropped_and_training_goes_on(train, tmp_path):
    run_dir = tmp_path / "run"
    fault = "faults.inject=[{kind: spike, step: 23}]"
    result = train(run_dir, *SETTINGS, "train.steps=25", "train.checkpoint_every=25", fault)
    assert "step 23: " in result.stderr
    assert "a loss spike, the update was dropped; samples dataset-" in result.stderr
    assert [line["step"] for line in lines(run_dir) if not line["stepped"]] == [23]
    assert math.isfinite(lines(run_dir)[22]["loss"])


def test_too_many_bad_steps_go_back_to_the_last_good_checkpoint_and_over_the_data(world, shards, train, tmp_path):
    settings = [*SETTINGS, "train.steps=10", "train.checkpoint_every=2", "train.keep_last=9"]
    budget = ["guard.skips=2", "guard.window=9", "faults.inject=[{kind: nan, step: 6, steps: 3}]"]
    words = ["train", *train_overrides(shards, tmp_path / "run", "data.workers=0", *settings, *budget)]
    result, seen = world(1).run(with_batches, words)[0]
    assert result.returncode == 0, result.stderr
    assert seen.count("batch") == 8 + 6, "one for each step that was made, none to come past those that were gone back"
    assert "rollback" in seen, "what takes as long as a start is not taken for a hang"
    train(tmp_path / "sound", *settings, "train.steps=14")
    assert "bad steps 6, 7, 8" in result.stderr
    assert "back to step 4, and on with the data behind step 8" in result.stderr
    seen, order = samples(tmp_path / "run"), samples(tmp_path / "sound")
    assert [seen[step] for step in range(1, 5)] == [order[step] for step in range(1, 5)]
    assert [seen[step] for step in range(5, 11)] == [order[step] for step in range(9, 15)]
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 11))
    assert all(line["stepped"] for line in lines(tmp_path / "run"))
    (event,) = of_kind(tmp_path / "run", "rollback")
    assert (event["step"], event["to"], event["rollbacks"]) == (8, 4, 1)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (2, 4, 6, 8, 10)]


def test_bad_steps_that_going_back_does_not_cure_stop_the_run(train, tmp_path):
    run_dir = tmp_path / "run"
    settings = [*SETTINGS, "train.steps=30", "train.checkpoint_every=2", "guard.skips=0", "guard.rollbacks=1"]
    fault = "faults.inject=[{kind: nan, step: 5}, {kind: nan, step: 6}]"
    result = train(run_dir, *settings, fault, code=3)
    assert "went back 1 times already (guard.rollbacks)" in result.stderr.splitlines()[-1]
    (stop,) = of_kind(run_dir, "stop")
    assert stop["outcome"] == "stopped"
    result = train(run_dir, *settings, "faults.inject=[{kind: nan, step: 7, life: 2}]", code=3)
    assert "went back 1 times already" in result.stderr, "counted over all lives"


def test_without_a_checkpoint_of_before_there_is_no_way_back(train, tmp_path):
    settings = [*SETTINGS, "train.steps=9", "guard.skips=0", "faults.inject=[{kind: nan, step: 2}]"]
    result = train(tmp_path / "run", *settings, code=3)
    assert "there is no checkpoint of before step 2 to go back to" in result.stderr.splitlines()[-1]
