"""Training by the command line: stages, kills, resumes, several processes, exports. Real files, real processes."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence
from support.command_ranks import behind_another, interrupted, linear_is_torchs
from support.commands import RELEASED, SAMPLED, kill_at, losses, run, train_command, train_overrides
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.checkpoint.resolve import resolve_best
from kairos_train.cli import main
from kairos_train.config.compose import load_saved
from kairos_train.training.engine.deepspeed_internals import compiled_all_reduce
from kairos_train.training.engine.optimizer import lr_at
from kairos_train.training.step import weighted_loss

pytestmark = pytest.mark.slow

WHOLE = ["stage=joint", "train.steps=14", "train.checkpoint_every=5"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Path:
    """A joint run of 14 steps that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(run_dir, *WHOLE, SAMPLED)
    return run_dir


def test_a_killed_run_resumes_to_the_same_losses_bit_by_bit(shards, train, whole, tmp_path):
    """By a start of its own, with loader processes; it stands in step 9 of its first life until it is killed."""
    run_dir, stand = tmp_path / "run", "faults.inject=[{kind: slow, step: 9, seconds: 300, life: 1}]"
    kill_at(train_command(shards, run_dir, *WHOLE, stand), run_dir, 8, checkpoint=5)
    assert not (run_dir / "checkpoints" / "step-00000010").exists(), "killed between two checkpoints"
    result = train(run_dir, *WHOLE)
    assert "resumed at step 5" in result.stderr
    assert losses(run_dir) == losses(whole)
    kept = [CheckpointReader(d / "checkpoints" / "step-00000014") for d in (run_dir, whole)]
    for section in ("model", "ema", "exp_avg_sq", "rng"):
        a, b = (reader.read_section(section) for reader in kept)
        assert all((a[name] == b[name]).all() for name in b), section


def test_nothing_is_compiled_at_the_start_of_a_run(train, world, tmp_path):
    """A process that is killed while compiling leaves a lock for which all later ones wait."""
    train(tmp_path / "run", "stage=joint", "train.steps=1", "data.validation_shards=null")
    assert world(1).run(compiled_all_reduce) == [None]


def test_a_run_in_stage_3_leaves_torchs_linear_as_it_was(train, world, tmp_path):
    """DeepSpeed puts one of other rounding in its place; a later stage in the same process would go on with it."""
    train(tmp_path / "run", "stage=joint", "train.steps=1", "train.zero_stage=3", "data.validation_shards=null")
    assert world(1).run(linear_is_torchs) == [True]


def test_a_run_goes_on_after_a_disk_that_spoilt_its_newest_checkpoint_an_old_one_and_its_logs(train, whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    newest, old = (run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json" for step in (14, 5))
    newest.unlink()
    newest.mkdir()
    old.write_text("[" * 200_000)
    kept = (run_dir / "losses.jsonl").read_bytes()
    (run_dir / "losses.jsonl").write_bytes(b"".join(kept.splitlines(keepends=True)[:10])[:-30])  # as a power cut may
    for name in ("metrics.jsonl", "events.jsonl"):
        (run_dir / name).write_bytes(b"\xff\n" + (run_dir / name).read_bytes())
    result = train(run_dir, "stage=joint", "train.steps=14", "train.checkpoint_every=5", "train.keep_last=1")
    assert "step-00000014 is skipped: " in result.stderr
    assert "resumed at step 10" in result.stderr
    assert "step-00000005 is left as it is: " in result.stderr
    for name in ("metrics.jsonl", "events.jsonl"):
        assert f"{run_dir / name}: left out 1 line that cannot be read" in result.stderr
    assert losses(run_dir) == losses(whole)
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["step-00000005", "step-00000014"]


def test_what_the_job_before_wrote_while_its_end_was_waited_for_is_continued(world, shards, whole, tmp_path):
    """When this job looked first, nothing was there yet."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000014")
    settings = ["stage=joint", "train.steps=14", "train.checkpoint_every=5", SAMPLED, "data.workers=0"]
    words = ["train", *train_overrides(shards, run_dir, *settings)]
    (result,) = world(1).run(behind_another, words, run_dir, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "resumed at step 10" in result.stderr
    assert losses(run_dir) == losses(whole)


def test_a_run_that_is_to_stop_writes_the_checkpoint_of_its_step_first(train, whole, tmp_path):
    run_dir = tmp_path / "run"
    settings = ["stage=joint", "train.steps=14", "train.checkpoint_every=5", SAMPLED]
    result = train(run_dir, *settings, "train.deadline=2020-01-01T00:00:00", code=75)
    assert "the checkpoint of step 1 is written" in result.stderr
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000001"]
    assert losses(run_dir) == losses(whole)[:1]


def test_ctrl_c_ends_a_run_with_the_checkpoint_of_its_step_from_which_it_goes_on(world, shards, whole, train, tmp_path):
    run_dir = tmp_path / "run"
    settings = ["stage=joint", "train.steps=14", "train.checkpoint_every=5", SAMPLED, "data.workers=0"]
    words = ["train", *train_overrides(shards, run_dir, *settings)]
    (result,) = world(1).run(interrupted, words, run_dir / "losses.jsonl", step=2, timeout=300)
    assert result.returncode == 130, result.stderr
    steps = len(losses(run_dir))
    assert 2 <= steps < 14
    assert f"asked to stop (Ctrl-C); the checkpoint of step {steps} is written" in result.stderr
    train(run_dir, *settings)
    assert losses(run_dir) == losses(whole)


def test_a_step_that_waited_for_its_data_is_reported(train, tmp_path):
    settings = ["stage=joint", "train.steps=2", "data.validation_shards=null", "data.log_wait=0.2"]
    result = train(tmp_path / "run", *settings, "faults.inject=[{kind: stall, step: 2, seconds: 0.3}]")
    assert "step 2: waited 0 s for data" in result.stderr
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert 2 in [event["step"] for event in events if event["kind"] == "loader_stall"]


def shown(run_dir: Path) -> dict[str, np.ndarray]:
    """The frames (T, H, W, 3) of every picture in TensorBoard."""
    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()
    pictures = {}
    for tag in board.Tags()["images"]:
        (found,) = board.Images(tag)
        with Image.open(io.BytesIO(found.encoded_image_string)) as picture:
            frames = [np.asarray(frame.convert("RGB"), float) for frame in ImageSequence.Iterator(picture)]
        pictures[tag] = np.stack(frames)
    return pictures


def test_samples_do_not_depend_on_the_layout(train, tmp_path):
    settings = ["stage=joint", "train.steps=1", "train.micro_batch=2", "stage.lr=1e-12", "train.precision=fp32"]
    settings += ["train.validate_every=0", SAMPLED]
    # Fresh heads give zeros, in every layout: from weights that have moved.
    moved = ["stage=joint", "train.steps=3", "stage.lr=0.02", "optimizer.warmup_steps=0", "train.precision=fp32"]
    train(tmp_path / "base", *moved, "data.validation_shards=null")
    settings += [f"stage.init_from={tmp_path / 'base'}", "stage.init_weights=raw"]
    train(tmp_path / "1", *settings)
    train(tmp_path / "2", *settings, "parallel.context=2", "train.zero_stage=3", *RELEASED, ranks=2)
    one, two = shown(tmp_path / "1"), shown(tmp_path / "2")
    assert set(one) == set(two)
    for tag, pictures in one.items():
        assert np.abs(pictures - two[tag]).mean() < 0.5, tag
    sampled, recorded = np.split(one["samples/video_0"], 2, axis=2)
    assert np.abs(sampled[0] - recorded[0]).mean() < 0.5, "the first frame is given"
    assert np.abs(sampled[-1] - recorded[-1]).mean() > 5, "an untrained model does not know the others"


def test_losses_fall_and_everything_is_reported(whole):
    lines = [json.loads(line) for line in losses(whole)]
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert {"loss", "video_loss", "action_loss", "grad_norm", "lr"} <= set(lines[0])
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    kinds = [sorted({"loss/total", "validation_raw/video", "validation_ema/video"} & line.keys()) for line in metrics]
    assert kinds == [["loss/total"]] * 3 + [["validation_raw/video"], ["validation_ema/video"]], "reported first"
    names = {name for line in metrics for name in line}
    assert {"speed/model_tflops_per_second", "speed/tokens_per_second", "memory/gb", "validation_ema/action"} <= names
    assert any(name.startswith("loss_by_sigma/action") for name in names)
    pictures = shown(whole)
    assert set(pictures) == {f"samples/{what}_{i}" for what in ("video", "actions") for i in range(2)}
    assert pictures["samples/video_0"].shape[1:] == (32, 64, 3), "sampled beside recorded"
    (sampled,) = (whole / "samples").iterdir()
    assert {f"samples/{path.stem}" for path in sampled.iterdir()} == set(pictures)
    assert (whole / "config.yaml").is_file()
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == [f"step-{s:08d}" for s in (5, 10, 14)]


def test_stages_hand_their_weights_on_and_a_checkpoint_exports(train, whole, tmp_path):
    video = tmp_path / "video"
    train(video, "stage=physical", "train.steps=2")
    assert all("action_loss" not in json.loads(line) for line in losses(video))
    names = CheckpointReader(video / "checkpoints" / "step-00000002").names("model")
    assert all(name.startswith("video_dit.") for name in names), "a video stage has no action stream"
    assert main(["export", str(video), "--out", str(tmp_path / "video_export")]) == 0
    joint = tmp_path / "joint"
    train(joint, "stage=joint", "train.steps=1", f"stage.init_from={video}")
    first, fresh = (json.loads(losses(d)[0]) for d in (joint, whole))
    assert first["loss"] != fresh["loss"]
    out = tmp_path / "export"
    assert main(["export", str(joint / "checkpoints" / "step-00000001"), "--out", str(out)]) == 0
    assert (out / "model.safetensors.index.json").is_file()
    weights = video / "checkpoints" / "step-00000002" / "ema-00000-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x77")
    result = train(tmp_path / "other", "stage=joint", "train.steps=1", f"stage.init_from={video}", code=2)
    assert f"checkpoint {weights.parent}: {weights.name} is damaged" in result.stderr


def test_the_checkpoint_with_the_lowest_validation_loss_stays(train, tmp_path):
    """Of weights that do not change, the first are the best."""
    run_dir = tmp_path / "run"
    settings = [
        "train.validate_every=2",
        "train.checkpoint_every=100",
        "train.keep_last=1",
        "train.validation_batches=1",
    ]
    settings += ["stage=joint", "stage.lr=1e-30", "stage.weight_decay=0"]
    for steps in (4, 6):
        train(run_dir, *settings, "optimizer.schedule=constant", f"train.steps={steps}")
        assert [p.name for p in sorted((run_dir / "checkpoints").iterdir())] == ["step-00000002", f"step-{steps:08d}"]
        assert resolve_best(run_dir).name == "step-00000002"
    config = load_saved(run_dir / "config.yaml")
    rates = [lr_at(step, config.optimizer, 6) for step in range(6)]
    assert [json.loads(line)["lr"] for line in losses(run_dir)] == pytest.approx(rates, rel=1e-6, abs=0)
    told = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    averaged = {name: value for line in told if line["step"] == 2 for name, value in line.items() if "_ema/" in name}
    total = weighted_loss(config.stage, averaged["validation_ema/video"], averaged["validation_ema/action"])
    best = CheckpointReader(run_dir / "checkpoints/step-00000002").state["best"]
    assert best == {"step": 2, "loss": pytest.approx(total)}


def test_two_processes_train_resume_and_validate_like_one_run(shards, train, tmp_path):
    run_dir = tmp_path / "run"
    settings = ["stage=joint", "train.zero_stage=1", "train.checkpoint_every=2", "train.micro_batch=2"]
    settings.append("optimizer.schedule=constant")
    overrides = train_overrides(shards, run_dir, *settings, "train.steps=2")
    run([*TORCHRUN, "2", "-m", "kairos_train.cli", "train", *overrides])
    train(run_dir, *settings, "train.steps=4", ranks=2)
    lines = [json.loads(line) for line in losses(run_dir)]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {line["samples"] for line in lines} == {4}


def test_a_run_goes_on_in_another_layout(train, whole, tmp_path):
    """The samples of a step stay, however they are split; the numbers differ by rounding. (More: test_reshard.py.)"""
    overrides = ["parallel.tensor=2", "parallel.sequence=true", "train.zero_stage=3", *RELEASED, SAMPLED]
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for step in (10, 14):
        shutil.rmtree(run_dir / "checkpoints" / f"step-{step:08d}")
    settings = ["stage=joint", "train.steps=14", "train.checkpoint_every=5", "train.precision=fp32", *overrides]
    result = train(run_dir, *settings, ranks=2)
    assert "resumed with a changed setting: tensor ranks 1 -> 2" in result.stderr
    found, expected = ([json.loads(line) for line in losses(folder)] for folder in (run_dir, whole))
    assert [line["step"] for line in found] == list(range(1, 15))
    for key in ("loss", "video_loss", "action_loss", "grad_norm", "samples"):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-5), key


def test_another_number_of_samples_per_step_is_refused(train, whole):
    result = train(whole, "stage=joint", "train.steps=20", "train.micro_batch=3", code=2)
    assert result.stderr.count("\n") == 1
    assert "train.micro_batch=3 × train.accumulation=1 × 1 data ranks = 3 samples" in result.stderr


def test_validation_does_not_depend_on_the_number_of_processes(train, tmp_path):
    """Three batches on two processes: the fourth place is run, and not counted."""
    settings = ["stage=joint", "train.steps=1", "train.micro_batch=2", "stage.lr=1e-12", "train.validation_batches=3"]
    train(tmp_path / "1", *settings)
    train(tmp_path / "2", *settings, ranks=2)
    found = []
    for name in ("1", "2"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found.append({k: v for line in lines for k, v in line.items() if k.startswith("validation_")})
    assert len(found[0]) == 4
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_run_folder_of_other_settings_is_refused(train, whole):
    result = train(whole, "stage=joint", "train.steps=20", "seed=7", code=2)
    assert result.stderr.count("\n") == 1
    assert "seed=7" in result.stderr


def test_other_encoders_are_refused(train, tmp_path):
    result = train(tmp_path / "run", "encoders.text.max_tokens=9", code=2)
    assert "encoders.text" in result.stderr


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_non_finite_loss_stops_or_skips_and_names_the_samples(train, tmp_path, policy):
    """A learning rate that makes the weights overflow: real infinities from the real loop."""
    run_dir = tmp_path / policy
    settings = [
        "stage=joint",
        "train.steps=6",
        "stage.lr=1e30",
        "optimizer.warmup_steps=0",
        "optimizer.schedule=constant",
    ]
    settings += [f"train.on_nonfinite={policy}", "data.validation_shards=null"]
    result = train(run_dir, *settings, code=3 if policy == "stop" else 0)
    assert "not finite" in result.stderr
    assert "dataset-00000" in result.stderr, "sample keys are named"
    if policy == "skip":
        assert len(losses(run_dir)) == 6
    else:
        assert result.stderr.splitlines()[-1].startswith("kairos-train: ")


def test_a_truncated_shard_stops_or_is_skipped_and_counted(train, shards, tmp_path):
    broken = tmp_path / "shards"
    shutil.copytree(shards / "shards", broken)
    shard = broken / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    settings = ["stage=joint", "train.steps=40", "data.validation_shards=null", "train.log_every=40"]
    settings.append(f"data.shards={broken}")
    result = train(tmp_path / "run", *settings, code=2)
    assert result.stderr.count("\n") == 1, "found before anything is loaded"
    assert "shard-000001.tar" in result.stderr
    train(tmp_path / "run", *settings, "data.on_corrupt=skip", "data.max_corrupt=0.5")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["data/corrupt"] >= 1


def test_a_run_exports_to_a_policy_that_is_judged_and_rolled_out(shards, whole, tmp_path):
    """The README's last three commands, on the tiny run."""
    policy, unseen = tmp_path / "policy", shards / "shards_validation"
    assert main(["export", str(whole), "--out", str(policy), "--dtype", "fp32"]) == 0
    assert json.loads((policy / "config.json").read_text())["robot"]["fps"] > 0, "servers tell their clients"
    common = [str(policy), "--input", str(unseen), "--steps", "2"]
    assert main(["evaluate", *common, "--samples", "8", "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "open_loop.json").read_text())
    assert set(report["rows"]) == {"model", "blind", "mean", "hold"}
    for mode in ("video", "joint", "action"):
        out = tmp_path / mode
        assert main(["rollout", *common, "--mode", mode, "--count", "1", "--out", str(out)]) == 0
        assert (out / "summary.json").is_file()
        assert bool(list(out.glob("*.mp4"))) == (mode != "action")
        assert bool(list(out.glob("*_actions.png"))) == (mode != "video")
