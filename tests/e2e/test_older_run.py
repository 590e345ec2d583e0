"""What an older version left is read as it was meant: its run goes on, its shards feed it, its export predicts.

`fixtures/before_moves` was written before the modules moved to where they are: shards, a run of six steps cut to what a
kill in step 4 leaves, its export, and in `expected.json` the six steps' losses and a prediction of the export.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.command_ranks import run_inside
from support.commands import losses

from kairos_train.cli import main
from kairos_train.inference.load import load
from kairos_train.inference.predict import Predictor

LEFT = Path(__file__).parents[1] / "fixtures" / "before_moves"
EXPECTED = json.loads((LEFT / "expected.json").read_text())
SETTINGS = (
    "experiment=demo_push2d stage=joint data.shards=shards data.validation_shards=null data.window.height=32 "
    "data.window.width=32 data.window.stride=16 train.steps=6 train.validate_every=0 train.sample_every=0 "
    "data.workers=0 train.micro_batch=4 train.checkpoint_every=3 train.keep_last=5 train.keep_best=false "
    "optimizer.warmup_steps=2 train.log_every=3 model.num_layers=4 model.num_heads=2 model.text_dim=16 "
    "model.freq_dim=16 model.video.dim=16 model.video.ffn_dim=16 model.action.dim=8 model.action.ffn_dim=8 "
    "model.video.gdn_key_dim=8 model.video.gdn_value_dim=16 run_dir=run"
)
"""The command of the older version, word for word."""

WEIGHTS = "model-00001-of-00001.safetensors"
ROUNDING = 1e-6
"""Relative. The same build of torch on the same kind of processor repeats every bit, another rounds sums of float32
otherwise; a moment, a sample or a random number read wrongly shows in the first digits."""


def test_a_run_that_an_older_version_began_goes_on_to_the_same_losses(world, tmp_path):
    for name in ("run", "shards"):
        shutil.copytree(LEFT / name, tmp_path / name)
    result = run_inside(world(1), ["train", *SETTINGS.split()], cwd=tmp_path)
    assert "resumed at step 3" in result.stderr
    assert "changed setting" not in result.stderr
    lines = [json.loads(line) for line in losses(tmp_path / "run")]
    assert lines[:3] == EXPECTED["losses"][:3], "what the older version wrote stays"
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line, expected in zip(lines[3:], EXPECTED["losses"][3:]):
        assert line == pytest.approx(expected, rel=ROUNDING)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "export"), "--dtype", "fp32"]) == 0
    averaged, expected = (load_file(folder / "export" / WEIGHTS) for folder in (tmp_path, LEFT))
    torch.testing.assert_close(averaged, expected, rtol=ROUNDING, atol=ROUNDING)


def test_an_export_of_an_older_version_predicts_the_same_actions():
    frames = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    state = np.array([12.0, 20.0], np.float32)
    found = Predictor(load(LEFT / "export")).predict(frames, state, "push the red block", seed=3, mode="action")
    np.testing.assert_allclose(found.actions, EXPECTED["actions"], rtol=10 * ROUNDING, atol=10 * ROUNDING)
