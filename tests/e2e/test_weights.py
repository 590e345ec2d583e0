"""From published weights to a policy by the command line: import, train, export in few bits, predict."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.commands import TINY, losses

from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.cli import main
from kairos_train.config.compose import load_config
from kairos_train.inference.load import load
from kairos_train.inference.predict import Predictor
from kairos_train.model import WorldActionModel

pytestmark = pytest.mark.slow


def test_video_only_weights_become_a_policy_in_few_bits(train, tmp_path):
    model = load_config(TINY, sections=()).model
    torch.manual_seed(0)
    video = WorldActionModel(model).video_dit.state_dict()
    published = {f"pipe.dit.{name}": (tensor + 0.01).bfloat16() for name, tensor in video.items()}
    save_file(published, tmp_path / "published.safetensors")
    base, joint, policy = (tmp_path / name for name in ("base", "joint", "policy"))
    words = [*TINY, "stage=physical", "model.action=null"]
    assert main(["import", str(tmp_path / "published.safetensors"), "--out", str(base), *words]) == 0
    train(joint, "stage=joint", "train.steps=1", f"stage.init_from={base}")
    assert len(losses(joint)) == 1
    trained = CheckpointReader(joint / "checkpoints" / "step-00000001")
    name = "video_dit.blocks.0.ffn.0.weight"
    start = published[f"pipe.dit.{name.removeprefix('video_dit.')}"].float()
    assert 0 < (trained.read("model", name) - start).abs().max() < 1e-3  # one step away
    assert any(key.startswith("action_dit.") for key in trained.names("model"))
    assert main(["export", str(joint), "--out", str(policy), "--quantize", "int8"]) == 0
    state = np.zeros(model.action.state_dim, np.float32)
    chunk = Predictor(load(policy)).predict(np.zeros((32, 32, 3), np.uint8), state, "push", seed=0)
    assert np.isfinite(chunk.actions).all()
