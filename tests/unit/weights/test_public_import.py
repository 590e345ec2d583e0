"""Weights as others publish them: their configurations in Python, their statistics, distilled ones, and round trips."""

import dataclasses
import json
import pprint

import pytest
import torch
from safetensors.torch import load_file
from support.public_structures import RELEASES, TOKENS, VIDEO
from support.public_weights import HEADER, SETTINGS, describe, same_bytes, save, tiny_weights
from support.tiny_export import random_weights, tiny_config

from kairos_train import cli
from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.canonical import CheckpointReader, checkpoint_path
from kairos_train.checkpoint.resolve import resolve_checkpoint
from kairos_train.config.compose import load_config, load_saved
from kairos_train.config.schema import ModelConfig, TextEncoderConfig
from kairos_train.inference.load import load
from kairos_train.model import WorldActionModel
from kairos_train.model.public_keys import public_keys
from kairos_train.weights.export import export
from kairos_train.weights.import_public import import_weights
from kairos_train.weights.public_words import network_settings, read_public_config
from kairos_train.weights.recognise import Word, recognise


def saved(folder):
    return load_saved(checkpoint_path(folder, 0) / "config.yaml", sections=())


def small_network(name: str) -> dict:
    """A release's `dit_config` at sizes of `small_weights`."""
    network = {stream: dict(value) for stream, value in RELEASES[name].items() if isinstance(value, dict)}
    for stream, value in network.items():
        value |= {"num_layers": 4, "layers_settings": value["layers_settings"][:4], "num_heads": 2, "freq_dim": 16}
        value |= {"dim": 32, "ffn_dim": 48} if stream == "video_dit" else {"dim": 16, "ffn_dim": 32}
        value |= {"attn_hidden_dim": 32} if stream == "action_dit" else {}
    return {"dit_type": "Simple_Multi_DIT_Wrapper", **network}


def small_model(name: str) -> ModelConfig:
    """A release's model with everything that is its own, and few and narrow layers."""
    model = load_config([f"model={name}"], sections=()).model
    model.num_layers, model.num_heads, model.freq_dim = 4, 2, 16
    model.video.dim, model.video.ffn_dim = 32, 48
    if model.action is not None:
        model.action.dim, model.action.ffn_dim = 16, 32
    return model


def small_weights(name: str) -> dict[str, torch.Tensor]:
    config = tiny_config()
    config.model = small_model(name)
    return {key: tensor.bfloat16() for key, tensor in random_weights(config).items()}


def write_config(path, network: dict, *, head: str = "", pipeline: str = "", arguments: str = ""):
    """A configuration written as those of the public code are: paths out of the environment, `dict(...)`, names."""
    path.write_text(
        f"""import os
MODELS = os.environ.get('KAIROS_MODEL_DIR')
pretrained_dit = f'{{MODELS}}/weights.safetensors'
vae_path = MODELS + '/Wan2.1_VAE.pth'
{head}
network = {pprint.pformat(network)}
pipeline = dict(
    type='KairosEmbodiedAPI',
    pretrained_dit=pretrained_dit,
    {pipeline}
    pipeline_args=dict(vae_path=vae_path, {arguments} dit_config=network),
)
"""
    )
    return path


# --- configurations of the public code ---


@pytest.mark.parametrize("name", RELEASES)
def test_a_configuration_of_the_public_code_says_all_that_shapes_do_not(name, tmp_path):
    model = load_config([f"model={name}"], sections=()).model
    words = read_public_config(write_config(tmp_path / "public.py", RELEASES[name]))
    assert not words.distilled
    shapes = {key: tuple(value.shape) for key, value in meta_weights(model).items()}
    found = recognise(shapes, {key: Word(value, "public.py") for key, value in words.settings.items()})
    assert dataclasses.replace(found, name=model.name) == model


def meta_weights(model: ModelConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return WorldActionModel(model).state_dict()


@pytest.mark.parametrize("name", RELEASES)
def test_the_full_key_lists_of_all_releases_are_those_of_the_model(name):
    model = load_config([f"model={name}"], sections=()).model
    assert public_keys(model) == {key: tuple(value.shape) for key, value in meta_weights(model).items()}


def test_the_older_network_reads_windows_in_tokens():
    older = {key: value for key, value in VIDEO.items() if key not in ("layers_settings", "window_size")}
    older |= {"dit_type": "KairosDiT", "dilated_lengths": [1, 1, 4, 1], "text_dim": 3584}
    assert network_settings(older, "x") == network_settings(RELEASES["kairos_4b_video"], "x")


def test_arguments_left_out_have_the_networks_defaults():
    """As the configuration of the 3.1 weights leaves out how windows are counted, and LIBERO's the history rule."""
    video = {key: value for key, value in VIDEO.items() if key not in ("window_size", "all_atten_history")}
    settings = network_settings({"dit_type": "Simple_Multi_DIT_Wrapper", "video_dit": {**video, "text_dim": 2048}}, "x")
    assert settings == network_settings(RELEASES["kairos_4b_robot_480p"], "x")
    frames = {**video, "attn_method": "flex", "text_dim": 2048}
    found = network_settings({"dit_type": "Simple_Multi_DIT_Wrapper", "video_dit": frames}, "x")
    assert (found["video.window_semantics"], found["video.restrict_history_query_to_history"]) == ("frame", True)


@pytest.mark.parametrize(
    "switch", ["use_first_frame_cond", "has_image_input", "has_ref_conv", "add_control_adapter", "attend_k0"]
)
def test_switches_without_a_counterpart_are_refused_by_name(switch, tmp_path):
    network = small_network("kairos_4b_robot_480p")
    network["video_dit"][switch] = True
    with pytest.raises(UserError, match=rf"public\.py: {switch}=True has no counterpart here"):
        read_public_config(write_config(tmp_path / "public.py", network))


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({"pipeline": "tea_cache_l1_thresh=0.1,"}, r"tea_cache_l1_thresh=0\.1: TeaCache .* is not implemented here"),
        ({"arguments": "selected_sampling_time=[1000, 750, 500, 250],"}, r"\[1000, 750, 500, 250\]: a distilled model"),
    ],
)
def test_samplers_without_a_counterpart_are_refused_by_name(parts, match, tmp_path):
    with pytest.raises(UserError, match=match):
        read_public_config(write_config(tmp_path / "public.py", small_network("kairos_4b_robot_480p"), **parts))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("pipeline = dict(", "is no Python file"),
        ("pipeline = dict(pipeline_args=dict(vae_path='x'))", "has no dit_config"),
        ("dit_config = dict(dit_type='WanModel', dim=3)", "dit_type 'WanModel' is no network that is known here"),
        ("dit_config = dict(dit_type='KairosDiT', dim=3)", "seperated_timestep=False has no counterpart"),
    ],
)
def test_configurations_of_something_else_are_refused(text, match, tmp_path):
    (tmp_path / "public.py").write_text(text)
    with pytest.raises(UserError, match=match) as error:
        read_public_config(tmp_path / "public.py")
    assert "\n" not in str(error.value)


def test_a_configuration_is_read_and_not_run(tmp_path):
    network = small_network("kairos_4b_robot_480p")
    head = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nimport shutil\nLAYERS = ['SWA'] * 2 + ['FA']"
    network["video_dit"]["dim"] = 64
    words = read_public_config(write_config(tmp_path / "public.py", network, head=head))
    assert words.settings["video.dim"] == 64
    assert not (tmp_path / "ran").exists()


def test_what_a_configuration_computes_counts_as_unknown(tmp_path):
    (tmp_path / "public.py").write_text(
        "import os\nWINDOW = int(os.environ['W'])\nKINDS = ['SWA', 'GATED'] * 2\n"
        "dit_config = dict(dit_type='KairosDiTV2', seperated_timestep=True, window_size=WINDOW, layers_settings=KINDS,"
        " attn_method='flex', dilated_lengths=[2], dim=max(3, 4))\n"
    )
    settings = read_public_config(tmp_path / "public.py").settings
    assert settings["video.layer_cycle"] == ["SWA", "GATED"]
    assert "video.window_frames" not in settings
    assert "video.dim" not in settings


def test_weights_are_imported_by_a_configuration_of_the_public_code(tmp_path, capsys):
    weights = small_weights("kairos_4b_robot_480p")
    file = save(tmp_path / "in", {key.removeprefix("video_dit."): value for key, value in weights.items()})
    config = write_config(tmp_path / "public.py", small_network("kairos_4b_robot_480p"))
    words = ["import", str(file), "--out", str(tmp_path / "out"), "--public-config", str(config)]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["video"]["window_semantics"] == "token"
    assert (found["encoders"], found["distilled"]) == ("wan_qwen35", False)
    assert found["stated_by"]["video.dilation"] == str(config)
    words[3], words[5] = str(tmp_path / "none"), str(tmp_path / "absent.py")
    assert cli.main(words) == 2
    assert "absent.py: cannot be read" in capsys.readouterr().err


def test_a_public_configuration_beside_the_weights_must_agree_with_the_rest(tmp_path):
    weights = small_weights("kairos_4b_robot_480p")
    file = save(tmp_path / "in", weights)
    config = tiny_config(actions=False)
    config.model = small_model("kairos_4b_robot_480p")
    describe(tmp_path / "in", config)
    write_config(tmp_path / "in" / "kairos_config.py", small_network("kairos_4b_robot_480p"))
    assert import_weights(file, tmp_path / "out")["model"] == dataclasses.asdict(config.model)
    other = small_network("kairos_4b_robot_480p")
    other["video_dit"]["dilated_lengths"] = [2]
    write_config(tmp_path / "in" / "kairos_config.py", other)
    with pytest.raises(UserError, match=r"model\.video\.dilation is 4 by .*config\.json and 2 by .*kairos_config\.py"):
        import_weights(file, tmp_path / "other")


# --- distilled weights ---


@pytest.mark.parametrize("how", ["flag", "configuration", "export"])
def test_distilled_weights_bring_their_sampler(tmp_path, capsys, how):
    weights = small_weights("kairos_4b_video")
    file = save(tmp_path / "in", {key.removeprefix("video_dit."): value for key, value in weights.items()})
    network = small_network("kairos_4b_video")
    words = []
    if how == "flag":
        words = ["--distilled"]
        write_config(tmp_path / "in" / "kairos_config.py", network)
    elif how == "configuration":
        arguments = "selected_sampling_time=[1000, 800, 500, 100],"
        write_config(tmp_path / "in" / "kairos_config.py", network, arguments=arguments)
    else:
        write_config(tmp_path / "in" / "kairos_config.py", network)
        import_weights(file, tmp_path / "first", distilled=True)
        export(tmp_path / "first", tmp_path / "exported")  # its config.json says so
        file = tmp_path / "exported" / "model.safetensors.index.json"
    assert cli.main(["import", str(file), "--out", str(tmp_path / "base"), *words]) == 0
    assert json.loads(capsys.readouterr().out)["distilled"] is True
    export(tmp_path / "base", tmp_path / "policy")
    sampler = load(tmp_path / "policy").sampler
    assert (sampler.schedule, sampler.steps, sampler.guidance) == ("distilled", 4, 1.0)
    names = load_saved(checkpoint_path(tmp_path / "base", 0) / "config.yaml", sections=()).encoders
    assert names.name == "wan_qwen25"


def test_other_weights_are_not_distilled(tmp_path):
    summary = import_weights(save(tmp_path / "in", tiny_weights(), metadata=HEADER), tmp_path / "out")
    assert summary["distilled"] is False
    assert CheckpointReader(resolve_checkpoint(tmp_path / "out")).state["distilled"] is False


# --- guidance and encoders ---


def test_published_weights_are_guided_against_the_empty_prompt(tmp_path):
    file = save(tmp_path / "in", tiny_weights(actions=False), metadata=HEADER)
    for words, expected in (
        ([], "empty_prompt"),
        (["stage=behaviour"], "empty_prompt"),
        (["stage.cfg_dropout_form=zeros"], "zeros"),
    ):
        import_weights(file, tmp_path / "out", words)
        assert saved(tmp_path / "out").stage.cfg_dropout_form == expected
        export(tmp_path / "out", tmp_path / "policy")
        assert load(tmp_path / "policy").sampler.negative_prompt == ("" if expected == "empty_prompt" else None)
        for folder in ("out", "policy"):
            (tmp_path / folder).rename(tmp_path / f"{folder}-{len(list(tmp_path.iterdir()))}")


@pytest.mark.parametrize(
    ("name", "encoders", "image"),
    [
        ("kairos_4b_video", "wan_qwen25", True),
        ("kairos_4b_robot_480p", "wan_qwen35", True),
        ("kairos_4b", "wan_qwen35", True),
        ("kairos_4b_libero", "wan_qwen25_no_image", False),
    ],
)
def test_the_layouts_of_all_releases_go_in_out_and_in_again(tmp_path, name, encoders, image):
    """Bare keys for the video alone, both prefixes for two streams: small sizes, heads of GATED layers as they are."""
    weights = small_weights(name)
    alone = not any(key.startswith("action_dit.") for key in weights)
    published = {key.removeprefix("video_dit."): value for key, value in weights.items()} if alone else weights
    file = save(tmp_path / "in", published)
    config = write_config(tmp_path / "in" / "kairos_config.py", small_network(name))
    first = import_weights(file, tmp_path / "first")
    assert (first["encoders"], first["prefix"]) == (encoders, "" if alone else "video_dit.")
    assert dataclasses.replace(saved(tmp_path / "first").model, name=name) == small_model(name)
    assert saved(tmp_path / "first").encoders.text.image is image
    export(tmp_path / "first", tmp_path / "public", form="public")
    assert same_bytes(load_file(tmp_path / "public" / "model.safetensors"), published)
    assert read_public_config(tmp_path / "public" / "kairos_config.py") == read_public_config(config)
    second = import_weights(tmp_path / "public" / "model.safetensors", tmp_path / "second")
    assert second["model"] == first["model"]
    assert saved(tmp_path / "second").encoders == saved(tmp_path / "first").encoders
    stored = CheckpointReader(resolve_checkpoint(tmp_path / "second")).read_section("model")
    assert same_bytes(stored, weights)


def test_an_exports_encoders_data_and_stage_come_back_with_it(tmp_path, exported):
    described = json.loads((exported / "config.json").read_text())
    index = exported / "model.safetensors.index.json"
    import_weights(index, tmp_path / "base")
    config, run = saved(tmp_path / "base"), described["run"]
    assert dataclasses.asdict(config.data.window) == run["data"]["window"]
    assert config.data.prompt_template == run["data"]["prompt_template"] == "Robot: {task}"
    assert dataclasses.asdict(config.encoders) == run["encoders"]
    assert config.data.shards == "???"
    assert CheckpointReader(resolve_checkpoint(tmp_path / "base")).state["encoders"] == described["encoders"]
    import_weights(index, tmp_path / "other", ["data.normalize_action=zscore", "encoders.text.max_tokens=8"])
    config = saved(tmp_path / "other")
    assert (config.data.normalize_action, config.data.normalize_state) == ("zscore", "minmax")
    assert config.encoders.text == TextEncoderConfig(kind="hashed_ngrams", text_dim=24, max_tokens=8)
    import_weights(index, tmp_path / "third", ["data=libero", "encoders=weight_free", "model.text_dim=24"])
    assert saved(tmp_path / "third").data.name == "libero"
    assert CheckpointReader(resolve_checkpoint(tmp_path / "third")).state["encoders"] is None


def test_words_of_a_token_reading_have_no_history_rule():
    assert (
        network_settings(RELEASES["kairos_4b_video"], "x").items()
        >= {
            "video.window_semantics": "token",
            "video.restrict_history_query_to_history": False,
        }.items()
    )
    assert TOKENS["attn_method"] == "flash"
    assert "model.video.window_semantics=frame" in SETTINGS
