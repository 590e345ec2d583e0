"""The public layout: one file that loads strictly, and a configuration in the words of the public code."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_export import tiny_config, write_tiny_checkpoint

from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.config.compose import load_config
from kairos_train.inference.load import load
from kairos_train.inference.sampler import SamplerConfig
from kairos_train.model import WorldActionModel
from kairos_train.weights.export import export
from kairos_train.weights.public_config import public_config


def model(*overrides: str):
    return load_config(overrides, sections=()).model


def test_one_file_that_loads_strictly_with_all_that_belongs_to_it(shards, tmp_path):
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoints", shards)
    summary = export(checkpoint, tmp_path / "public", form="public")
    files = {path.name for path in (tmp_path / "public").iterdir()}
    assert files == {
        *("model.safetensors", "config.json", "sampler.json", "dataset_stats.json", "README.md", "manifest.json")
    }
    weights = load_file(tmp_path / "public" / "model.safetensors")
    network = WorldActionModel(tiny_config().model)
    network.load_state_dict(weights, strict=True)
    source = CheckpointReader(checkpoint).read_section("ema")
    assert all(torch.equal(weights[name], tensor.bfloat16()) for name, tensor in source.items())
    content = (tmp_path / "public" / "model.safetensors").read_bytes()
    assert summary["sha256"] == hashlib.sha256(content).hexdigest()
    settings = json.loads((tmp_path / "public" / "sampler.json").read_text())
    assert settings.pop("fingerprint") == summary["fingerprint"]
    SamplerConfig(**settings).check()
    statistics = (tmp_path / "public" / "dataset_stats.json").read_text()
    assert statistics == (shards / "dataset_stats.json").read_text()
    assert json.loads((tmp_path / "public" / "config.json").read_text())["run"]["model"]["video"]["dilation"] == 2
    with pytest.raises(UserError, match="format is 'kairos-public-1', not 'kairos-export-2'"):
        load(tmp_path / "public")


def test_a_video_model_has_no_stream_prefix(tmp_path):
    config = tiny_config(streams="video", actions=False)
    export(write_tiny_checkpoint(tmp_path / "run", None, config=config), tmp_path / "public", form="public")
    weights = load_file(tmp_path / "public" / "model.safetensors")
    WorldActionModel(config.model).video_dit.load_state_dict(weights, strict=True)


def test_the_published_sizes_in_the_words_of_the_public_code():
    """The values of its own configuration of the RoboTwin model; the names of arguments are an interface."""
    found, missing = public_config(model("model=kairos_4b"))
    assert missing == ""
    assert found["dit_type"] == "Simple_Multi_DIT_Wrapper"
    video, action = found["video_dit"], found["action_dit"]
    expected = {
        "dit_type": "KairosDiTV2",
        "patch_size": [1, 2, 2],
        **{"in_dim": 16, "out_dim": 16, "dim": 2560, "ffn_dim": 10240, "freq_dim": 256, "text_dim": 2048},
        **{"num_heads": 20, "num_layers": 32, "eps": 1e-6, "dilated_lengths": [4]},
        "layers_settings": ["SWA", "SWA", "DSWA", "GATED"] * 8,
        **{"seperated_timestep": True, "fuse_vae_embedding_in_latents": True},
        "restrict_history_query_to_history": True,
    }
    assert {key: video[key] for key in expected} == expected
    expected = {
        **{"dim": 1024, "ffn_dim": 4096, "attn_hidden_dim": 2560, "num_heads": 20, "num_layers": 32, "text_dim": 2048},
        "layers_settings": ["FA"] * 32,
        "action_head_cfg": {"action_state_dim": 14, "action_dim": 14},
        "seperated_timestep": False,
    }
    assert {key: action[key] for key in expected} == expected


def test_windows_in_tokens_are_the_older_network():
    found, _ = public_config(model("model=kairos_4b_robot_480p"))
    assert found["dit_type"] == "KairosDiT"
    assert (found["text_dim"], found["dilated_lengths"]) == (3584, [1, 1, 4, 1])
    assert "layers_settings" not in found


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model=tiny"], "GATED heads are 32/64"),
        (["model=kairos_4b", "model.video.history_causal=true"], "history frames see earlier ones"),
        (["model=kairos_4b_robot_480p", "model.video.window_frames=2"], "of 3"),
    ],
)
def test_a_network_that_the_public_code_lacks_has_no_configuration(overrides, reason):
    found, missing = public_config(model(*overrides))
    assert found is None
    assert reason in missing
