"""The public layout: weights that load strictly, and what the public code loads and runs them with."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.public_structures import (
    ENCODERS,
    PIPELINE_ARGUMENTS,
    RELEASES,
    V2_ARGUMENTS,
    WRAPPER_ARGUMENTS,
)
from support.tiny_export import random_weights, tiny_config, write_tiny_checkpoint

from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.checkpoint.writing import write_checkpoint
from kairos_train.config.compose import load_config, to_yaml
from kairos_train.config.schema import Config, EncodersConfig, ModelConfig, TextEncoderConfig, VideoStreamConfig
from kairos_train.inference.load import load
from kairos_train.inference.sampler import SamplerConfig
from kairos_train.model import WorldActionModel
from kairos_train.weights.export import export
from kairos_train.weights.public_config import public_config


def test_files_that_load_strictly_with_all_that_belongs_to_them(shards, tmp_path):
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
    assert json.loads((tmp_path / "public" / "config.json").read_text())["run"]["model"]["video"]["dilation"] == 2
    with pytest.raises(UserError, match="format is 'kairos-public-1', not 'kairos-export-2'"):
        load(tmp_path / "public")


def test_statistics_have_one_entry_per_group_called_default(shards, tmp_path):
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoints", shards)
    for form in ("public", "standalone"):
        export(checkpoint, tmp_path / form, form=form)
    own = json.loads((shards / "dataset_stats.json").read_text())
    public = json.loads((tmp_path / "public" / "dataset_stats.json").read_text())
    assert public["state"] == {"default": own["state"]["observation.state"]}
    assert public["action"] == {"default": own["action"]["action"]}
    assert {key: public[key] for key in own if key not in ("state", "action")} == {
        key: own[key] for key in own if key not in ("state", "action")
    }
    assert (tmp_path / "standalone" / "dataset_stats.json").read_text() == (shards / "dataset_stats.json").read_text()
    described = json.loads((tmp_path / "public" / "config.json").read_text())
    text = (tmp_path / "public" / "dataset_stats.json").read_bytes()
    assert described["statistics_sha256"] == hashlib.sha256(text).hexdigest()


def test_a_video_model_has_no_stream_prefix(tmp_path):
    config = tiny_config(streams="video", actions=False)
    export(write_tiny_checkpoint(tmp_path / "run", None, config=config), tmp_path / "public", form="public")
    weights = load_file(tmp_path / "public" / "model.safetensors")
    WorldActionModel(config.model).video_dit.load_state_dict(weights, strict=True)


# --- the network ---


@pytest.mark.parametrize("name", RELEASES)
def test_every_release_in_the_words_of_the_public_code(name):
    assert public_config(load_config([f"model={name}"], sections=()).model) == (RELEASES[name], "")


def full_size(*, actions: bool = True, num_layers: int = 32, **video) -> ModelConfig:
    config = ModelConfig(num_layers=num_layers, video=VideoStreamConfig(**video))
    return config if actions else dataclasses.replace(config, action=None)


def test_a_video_model_with_windows_in_frames_is_the_wrapper_too():
    found, _ = public_config(full_size(actions=False))
    expected = RELEASES["kairos_4b"]["video_dit"]
    assert found == {"dit_type": "Simple_Multi_DIT_Wrapper", "video_dit": expected}


@pytest.mark.parametrize("semantics", ["token", "frame"])
def test_other_orders_windows_and_dilations_are_taken(semantics):
    words = {"window_frames": 5, "dilation": 2, "window_semantics": semantics, "layer_cycle": ["FA", "DSWA"]}
    video = public_config(full_size(actions=False, num_layers=4, **words))[0]["video_dit"]
    assert video["layers_settings"] == ["FA", "DSWA", "FA", "DSWA"]
    assert (video["window_size"], video["dilated_lengths"]) == (5, [2])
    assert video["attn_method"] == {"token": "flash", "frame": "flex"}[semantics]


@pytest.mark.parametrize(("restrict", "attend"), [(True, True), (False, False)])
def test_history_rules_are_passed_on(restrict, attend):
    rules = {"restrict_history_query_to_history": restrict, "all_attend_history": attend}
    video = public_config(full_size(**rules))[0]["video_dit"]
    assert (video["restrict_history_query_to_history"], video["all_atten_history"]) == (restrict, attend)


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        ({"gdn_key_dim": 32, "gdn_value_dim": 64}, "GATED heads are 32/64"),
        ({"history_causal": True}, "history frames see earlier ones"),
        ({"patch_size": [1, 4, 4]}, "patches are [1, 4, 4]"),
        ({"window_semantics": "token"}, "windows are counted in tokens; the public code does so for the video alone"),
    ],
)
def test_a_network_that_the_public_code_lacks_has_no_configuration(video, reason):
    found, missing = public_config(full_size(**video))
    assert found is None
    assert reason in missing


# --- kairos_config.py ---

READ = """
import json, os, runpy, sys
os.environ.clear()
for file in sys.argv[1:]:
    names = runpy.run_path(file)
    found = {name: value for name, value in names.items() if isinstance(value, (dict, list, str)) and name[0] != "_"}
    print(json.dumps({"names": found, "text": open(file).read(), "environ": dict(os.environ)}))
"""


def small(kind: str) -> tuple[Config, dict]:
    """A small model whose network the public code has, and what its checkpoint's state says."""
    actions = kind == "joint"
    config = tiny_config(streams="joint" if actions else "video", actions=actions)
    video = dataclasses.replace(config.model.video, gdn_key_dim=256, gdn_value_dim=512)
    if kind in ("tokens", "distilled"):
        video = dataclasses.replace(video, window_semantics="token", restrict_history_query_to_history=False)
    text_dim = {"joint": 2048, "frames": 2048, "weight-free": 24}.get(kind, 3584)
    config.model = dataclasses.replace(config.model, video=video, text_dim=text_dim)
    text = TextEncoderConfig(kind="qwen", text_dim=text_dim, image=kind != "tokens", system_message=kind != "frames")
    if kind != "weight-free":
        config.encoders = EncodersConfig(name="real", text=text)
    return config, {"distilled": True} if kind == "distilled" else {}


KINDS = ("joint", "tokens", "frames", "distilled", "weight-free")


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, dict]:
    """{kind: what its kairos_config.py says to a Python without any package, in an empty environment}."""
    folder = tmp_path_factory.mktemp("public")
    for kind in KINDS:
        config, state = small(kind)
        checkpoint = write_checkpoint(
            folder / f"{kind}-run",
            3,
            sections={"ema": random_weights(config)},
            state={"encoders": None, **state},
            files={"config.yaml": to_yaml(config)},
        )
        export(checkpoint, folder / kind, form="public")
    files = [str(folder / kind / "kairos_config.py") for kind in KINDS]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", READ, *files], capture_output=True, text=True, check=True, cwd=os.sep
    )
    found = dict(zip(KINDS, map(json.loads, done.stdout.splitlines())))
    for kind in KINDS:
        found[kind]["folder"] = folder / kind
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_python_configuration_constructs_the_wrapper_and_no_more(configs, kind):
    names = configs[kind]["names"]
    pipeline, config = names["pipeline"], small(kind)[0]
    network = pipeline["pipeline_args"]["dit_config"]
    assert pipeline["type"] == "KairosEmbodiedAPI"
    assert names["pipeline_type"] == pipeline["pipeline_type"] == "KairosEmbodiedWAMPipeline"
    assert pipeline["pipeline_args"]["load_dit_fn"] == names["load_dit_fn"] == "strict_load"
    assert pipeline["pipeline_args"].keys() <= PIPELINE_ARGUMENTS
    assert network == names["dit_config"]
    assert network["dit_type"] == "Simple_Multi_DIT_Wrapper"
    streams = {"video_dit", "action_dit"} if kind == "joint" else {"video_dit"}
    assert network.keys() == {"dit_type"} | streams
    for stream in streams:
        assert network[stream].keys() <= V2_ARGUMENTS | WRAPPER_ARGUMENTS
        assert network[stream]["dit_type"] == "KairosDiTV2"
        assert network[stream]["num_layers"] == len(network[stream]["layers_settings"]) == 4
    video, described = dict(network["video_dit"]), json.loads((configs[kind]["folder"] / "config.json").read_text())
    video.pop("pretrained_path", None)
    assert described["dit_config"] == {**network, "video_dit": video}
    assert video["attn_method"] == {"tokens": "flash", "distilled": "flash"}.get(kind, "flex")
    assert (video["window_size"], video["dilated_lengths"]) == (3, [2])
    assert video["layers_settings"] == ["SWA", "SWA", "DSWA", "GATED"]
    assert video["text_dim"] == config.model.text_dim


@pytest.mark.parametrize("kind", KINDS)
def test_the_keys_are_those_that_the_configuration_loads(configs, kind):
    """Strictly into the wrapper from `pretrained_dit`; into one network, bare, from its `pretrained_path`."""
    names, folder = configs[kind]["names"], configs[kind]["folder"]
    weights = load_file(folder / names["pretrained_dit"])
    network = WorldActionModel(small(kind)[0].model)
    video = names["dit_config"]["video_dit"]
    if kind == "joint":
        assert names["pipeline"]["pretrained_dit"] == "model.safetensors"
        assert "pretrained_path" not in video
        network.load_state_dict(weights, strict=True)
    else:
        assert video["pretrained_path"] == "model.safetensors"
        assert "pretrained_dit" not in names["pipeline"]
        network.video_dit.load_state_dict(weights, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_encoders_scheduler_and_paths_are_named(configs, kind):
    names, text = configs[kind]["names"], configs[kind]["text"]
    assert names["vae"] == {"type": "WanVideoVAE", "path": names["vae_path"]}
    assert names["pipeline"]["pipeline_args"]["vae_path"].endswith("Wan2.1_VAE.pth")
    encoder = names["pipeline"]["pipeline_args"]["text_encoder_config"]
    if kind == "weight-free":
        assert encoder is None
        assert "text_encoder_config is None" in text
    else:
        expected = ENCODERS[names["dit_config"]["video_dit"]["text_dim"]]
        assert encoder == {"type": expected, "from_pretrained": names["text_encoder_path"]}
    scheduler = names["scheduler"]
    assert scheduler.items() >= {"shift": 5, "sigma_min": 0.0, "extra_one_step": True}.items()
    distilled = kind == "distilled"
    assert scheduler["type"] == ("DMDFlowMatchScheduler" if distilled else "FlowMatchScheduler")
    assert scheduler["exponential_shift"] is not distilled
    assert names.get("selected_sampling_time") == ([1000, 800, 500, 100] if distilled else None)
    assert "import" not in text.replace("__import__", "")  # mmengine reads files with import statements otherwise
    above = text[: text.index("environ")]
    assert all(f"{name} = " in above for name in ("pretrained_dit", "vae_path", "text_encoder_path"))


@pytest.mark.parametrize(
    ("kind", "no_image", "no_system"), [("joint", "0", "0"), ("tokens", "1", "0"), ("frames", "0", "1")]
)
def test_the_vlms_settings_are_set_as_the_public_code_takes_them(configs, kind, no_image, no_system):
    expected = {"QW_DROP_IMG_IN_VLM": no_image, "QW_RM_SYS_PROMPT_IN_VLM": no_system}
    assert configs[kind]["environ"].items() >= expected.items()
    card = (configs[kind]["folder"] / "README.md").read_text()
    assert ("without image" in card, "without system message" in card) == (no_image == "1", no_system == "1")


def test_a_distilled_export_carries_its_sampler(configs):
    settings = json.loads((configs["distilled"]["folder"] / "sampler.json").read_text())
    assert (settings["schedule"], settings["steps"], settings["guidance"]) == ("distilled", 4, 1.0)
    assert configs["distilled"]["names"]["sampling"]["num_inference_steps"] == 4
    assert "distilled, 4 fixed steps, no guidance" in (configs["distilled"]["folder"] / "README.md").read_text()


def test_without_a_network_there_is_no_configuration_but_the_reason(tmp_path):
    config = tiny_config(streams="video", actions=False)
    export(write_tiny_checkpoint(tmp_path / "run", None, config=config), tmp_path / "public", form="public")
    assert not (tmp_path / "public" / "kairos_config.py").exists()
    described = json.loads((tmp_path / "public" / "config.json").read_text())
    assert described["dit_config"] is None
    assert described["dit_config_missing"] in (tmp_path / "public" / "README.md").read_text()


# --- guidance ---


@pytest.mark.parametrize(
    ("stage", "guidance", "negative", "card"),
    [
        ({}, 5.0, None, "10 steps, guidance 5 against a context of zeros"),
        ({"cfg_dropout_form": "empty_prompt"}, 5.0, "", "10 steps, guidance 5 against the empty prompt"),
        ({"cfg_dropout_form": "empty_prompt", "cfg_dropout": 0.0}, 1.0, None, "10 steps, no guidance"),
    ],
)
def test_the_sampler_guides_against_what_dropped_contexts_became(tmp_path, stage, guidance, negative, card):
    config = tiny_config(streams="video", actions=False, **stage)
    export(write_tiny_checkpoint(tmp_path / "run", None, config=config), tmp_path / "out")
    sampler = load(tmp_path / "out").sampler
    assert (sampler.guidance, sampler.negative_prompt) == (guidance, negative)
    assert card in (tmp_path / "out" / "README.md").read_text()
