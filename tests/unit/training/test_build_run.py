"""What is held to be right before a run takes a device, and what it continues from."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from support.settings import changed
from support.tiny_export import random_weights, tiny_config

from dataloaders.config import SourceConfig
from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.checkpoint.writing import write_checkpoint
from kairos_train.config.compose import to_yaml
from kairos_train.config.schema import Config
from kairos_train.training.build_run import check, confirm
from kairos_train.training.run_state import changed_settings, checkpoints
from parallel.topology import Topology

ALONE = Topology.single(torch.device("cpu"))


@pytest.fixture
def config(shards, tmp_path) -> Config:
    config = tiny_config()
    return replace(config, run_dir=str(tmp_path / "run"), data=replace(config.data, shards=str(shards), workers=0))


def save(config: Config, step: int) -> Path:
    """A checkpoint of a run, as far as it is looked at before a model is built."""
    layout = {"tensor": 1, "context": 1, "data": 1, "step_size": config.train.micro_batch * config.train.accumulation}
    return write_checkpoint(
        checkpoints(config.run_dir),
        step,
        sections={"model": random_weights(config)},
        state={"layout": layout},
        files={"config.yaml": to_yaml(config)},
    )


def test_a_run_begins_or_continues_from_the_newest_checkpoint(config):
    begun = check(config)
    assert (begun.checkpoint, begun.changes, len(begun.indices)) == (None, [], 1)
    assert confirm(config, begun, ALONE) == begun
    for step in (10, 20):
        save(config, step)
    assert check(config).checkpoint.step == 20


def test_what_changed_is_reported_unless_it_is_silent(config):
    save(config, 10)
    other = changed(config, {"train.log_every": 3, "train.deadline": "2030-01-01T00:00:00", "data.workers": 1})
    assert check(other).changes == ["data.workers 0 -> 1", "train.log_every 10 -> 3"]
    with pytest.raises(UserError, match=r"^stage\.cfg_dropout=0\.2: the run in run_dir=.* was started with 0\.1; set"):
        check(changed(config, {"stage.cfg_dropout": 0.2}))
    with pytest.raises(UserError, match=r"^train\.precision=fp32: the run in run_dir=.* was started with bf16"):
        check(changed(config, {"train.precision": "fp32"}))


def test_a_signature_that_was_renewed_is_no_other_setting(config):
    def settings(host: str, secret: str):
        shards = f"https://user:{secret}@{host}/shards?signature={secret}"
        return changed(config, {"data.shards": shards, "data.sources": [SourceConfig(shards=shards)]})

    path = save(settings("a", "OLD"), 10)
    assert "https://a/shards" in (path / "config.yaml").read_text()
    assert "OLD" not in (path / "config.yaml").read_text()
    assert changed_settings(asdict(settings("a", "NEW")), CheckpointReader(path)) == []
    with pytest.raises(UserError, match=r"^data\.shards=https://b/shards: the run .* with https://a/shards; set that"):
        changed_settings(asdict(settings("b", "NEW")), CheckpointReader(path))


def test_a_checkpoint_with_a_wrong_byte_is_passed_over_once_all_ranks_can_look(config):
    good, bad = save(config, 10), save(config, 20)
    weights = next(bad.glob("model-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x77")
    assert check(config).checkpoint.step == 20
    confirmed = confirm(config, check(config), ALONE)
    assert confirmed.checkpoint.path == good
    assert len(confirmed.damaged) == 1


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_a_run_of_which_all_checkpoints_are_damaged_does_not_begin_again(config, resume):
    config, paths = changed(config, {"train.resume": resume}), [save(config, step) for step in (10, 20)]
    for path in paths:
        weights = next(path.glob("model-*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x77")
    words = (
        rf"^train\.resume={resume}: no valid checkpoint in .*: checkpoint .*step-00000020 is skipped: .*, and 1 more "
        "like it; nothing there was touched: restore one of them, or move that folder away to begin at step 0$"
    )
    checked = check(config)  # which looks at sizes alone
    with pytest.raises(UserError, match=words):
        confirm(config, checked, ALONE)
    for path in paths:
        (path / "manifest.json").unlink()
        (path / "manifest.json").mkdir()
    with pytest.raises(UserError, match=words):
        check(config)
    assert all(next(path.glob("model-*.safetensors")).is_file() for path in paths)
    checkpoints(config.run_dir).rename(Path(config.run_dir) / "damaged")
    if resume == "auto":
        assert check(config).checkpoint is None


def test_what_the_job_before_wrote_while_its_end_was_waited_for_counts(config):
    before = check(config)
    assert before.checkpoint is None
    save(changed(config, {"train.log_every": 3}), 10)
    confirmed = confirm(config, before, ALONE)
    assert confirmed.checkpoint.step == 10
    assert confirmed.changes == ["train.log_every 3 -> 10"]
    with pytest.raises(UserError, match=r"^seed=1: the run in run_dir=.* was started with 0"):
        confirm(changed(config, {"seed": 1}), before, ALONE)


def test_steps_of_another_size_are_refused(config):
    save(config, 10)
    for other, factors in (
        ({"train.micro_batch": 8}, r"train\.micro_batch=8 × train\.accumulation=1 × 1 data ranks = 8"),
        ({"train.accumulation": 2}, r"train\.micro_batch=16 × train\.accumulation=2 × 1 data ranks = 32"),
    ):
        words = rf"^{factors} samples per step, but the run in run_dir=.*run has 16; change one of them"
        with pytest.raises(UserError, match=words):
            confirm(changed(config, other), check(changed(config, other)), ALONE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("kernel", "line"),
    [
        (
            {"kernels.attention": "flex"},
            r"^kernels\.attention=flex trains on a CUDA device only, not on cpu; use auto, .*",
        ),
        ({"kernels.gated_delta": "fla"}, r"^kernels\.gated_delta=fla needs a CUDA device, not cpu; use auto or torch$"),
    ],
)
def test_kernels_that_cannot_run_here_are_refused_before_a_device_is_taken(config, kernel, line):
    with pytest.raises(UserError, match=line):
        check(changed(config, kernel))
    check(changed(config, kernel), on_this_machine=False)


def test_data_that_do_not_fit_are_refused_before_the_checkpoint_is_looked_at(config):
    with pytest.raises(UserError, match=r"^data\.window\.frames=9: .* was packed with 5"):
        check(changed(config, {"data.window": replace(config.data.window, frames=9), "train.resume": "must"}))
    held_out = changed(config, {"data.validation_shards": config.data.shards})
    assert check(held_out).checkpoint is None
    with pytest.raises(UserError, match=r"^train\.resume=must: no checkpoint in .*; use resume=auto"):
        check(changed(config, {"train.resume": "must"}))
    save(config, 10)
    with pytest.raises(UserError, match=r"^train\.resume=never: run_dir=.* holds checkpoints"):
        check(changed(config, {"train.resume": "never"}))
