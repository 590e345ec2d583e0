"""docs/finetune.md at tiny sizes: published weights and a dataset become a served policy, by its own commands."""

import json
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support.command_ranks import run_inside
from support.commands import TINY, command, environment

from kairos_train.checkpoint.adapters import MergedWeights
from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.checkpoint.resolve import resolve_best, resolve_checkpoint
from kairos_train.cli import main
from kairos_train.model.lora import is_adapter
from kairos_train.serving.client import PolicyClient

pytestmark = pytest.mark.slow

CAMERA = "observation.images.top"
SIZES = [
    *("model=tiny", "encoders=weight_free", *TINY[1:], f"data.window.cameras=[{CAMERA}]", "data.window.frames=5"),
    *(
        "data.window.action_video_freq_ratio=2",
        "train.precision=fp32",
        "train.zero_stage=0",
        "optimizer.warmup_steps=1",
    ),
    *("train.epochs=null", "train.steps=4", "train.validate_every=2", "train.validation_batches=1", "stage.lr=1e-3"),
    "data.workers=0",
]
"""What makes the page's commands small: a model, encoders and a run of seconds."""


def page_commands() -> list[str]:
    text = (Path(__file__).parents[2] / "docs/finetune.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```", text, re.S | re.M)
    return [line.removeprefix("kairos-train ") for block in blocks for line in block.splitlines()]


@pytest.fixture(scope="module")
def published(train, tmp_path_factory) -> Path:
    """One file of a video stream, as its authors would publish it."""
    folder = tmp_path_factory.mktemp("published")
    train(folder / "run", "stage=physical", "train.steps=1")
    public = ["--out", folder / "public", "--format", "public", "--dtype", "fp32"]
    assert main(["export", *map(str, [folder / "run", *public])]) == 0
    return folder / "public"


def test_every_command_of_the_page_runs(world, shards, published, tmp_path):
    places = {
        "MY_DATASET": shards / "dataset",
        "MY_UNSEEN_DATASET": shards / "dataset_unseen",
        "FILE": published / "model.safetensors",
    }
    serving = None
    for line in page_commands():
        words = [str(places.get(word, word)) for word in line.split()]
        words = [word for word in words if not word.startswith("encoders.")]
        words = [{"model.action.action_dim=7": "model.action.action_dim=2"}.get(word, word) for word in words]
        words = [{"model.action.state_dim=8": "model.action.state_dim=2"}.get(word, word) for word in words]
        words += {"train": [*SIZES, "stage.lora.rank=2"], "data": SIZES}.get(words[0], [])
        if words[0] == "serve":
            serving = [*words, "--port", "0", "--steps", "2"]
            continue
        run_inside(world(1), words, cwd=tmp_path)
    _check_training(tmp_path)
    _check_serving(serving, tmp_path)


def _check_training(folder: Path) -> None:
    best, base = (
        CheckpointReader(resolve_best(folder / "runs/finetune_custom/joint")),
        CheckpointReader(resolve_checkpoint(folder / "base")),
    )
    video = [name for name in base.names("model") if name.startswith("video_dit.")]
    assert video
    for name in video:
        assert (best.read("model", name) == base.read("model", name)).all(), "frozen below its adapters"
    adapters = [name for name in best.names("model") if is_adapter(name)]
    assert any(best.read("model", name).any() for name in adapters if name.endswith("lora_b")), "adapters have moved"
    exported = json.loads((folder / "policy" / "config.json").read_text())
    assert exported["step"] == best.step
    merged, name = MergedWeights(best), "video_dit.blocks.0.ffn.0.weight"
    assert not (merged.read("ema", name) == best.read("ema", name)).all()
    assert json.loads((folder / "report" / "open_loop.json").read_text())


def _check_serving(words: list[str], folder: Path) -> None:
    process = subprocess.Popen(
        command(*words), env=environment(), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        url = None
        for line in process.stdout:
            if found := re.search(r"ws://\S+", line):
                url = found[0].rstrip("/.,;")
                break
        assert url, "the server did not start"
        with PolicyClient(url) as policy:
            observation = {CAMERA: np.zeros((32, 32, 3), np.uint8), "observation.state": np.zeros(2, np.float32)}
            actions = policy.infer({**observation, "prompt": "push the red block", "seed": 1})["actions"]
        assert actions.shape == (8, 2)
        assert np.isfinite(actions).all()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0
