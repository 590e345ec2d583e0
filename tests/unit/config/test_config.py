"""Composition, validation and storage of configurations."""

import dataclasses
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from kairos_train.basics.errors import UserError
from kairos_train.config.compose import load_config, load_saved, save_config, to_yaml
from kairos_train.config.keys import all_keys
from kairos_train.config.schema import Config, VideoStreamConfig

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
DEMO = "experiment=demo"
COMPANY = {  # model or encoders -> what goes with it
    "kairos_4b_robot_480p": ("stage=behaviour",),
    "kairos_4b_video": ("encoders=wan_qwen25", "stage=behaviour"),
    "kairos_4b_libero": ("encoders=wan_qwen25_no_image",),
    "wan_qwen25": ("model=kairos_4b_video", "stage=behaviour"),
    "wan_qwen25_no_image": ("model=kairos_4b_libero",),
}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


# --- composition ---


def test_demo_experiment_is_complete_and_overrides_apply():
    config = load_config([DEMO, "stage=joint", "train.steps=40"])
    assert (config.experiment, config.model.name, config.encoders.name, config.data.name) == (
        *("demo", "tiny", "weight_free", "demo"),
    )
    assert (config.train.steps, config.train.micro_batch, config.train.precision) == (40, 32, "fp32")
    assert config.data.shards == "runs/demo/shards"
    assert config.run_dir == "runs/demo/joint"
    assert isinstance(config, Config)
    assert isinstance(config.model.video, VideoStreamConfig)


def test_nested_experiment_keeps_the_groups_of_its_parent():
    config = load_config(["experiment=demo_push2d"])
    assert (config.model.name, config.model.action.action_dim, config.data.shards) == (
        *("tiny", 2, "runs/demo_push2d/shards"),
    )


def test_a_group_on_the_command_line_beats_the_experiments_and_keeps_its_values():
    config = load_config([DEMO, "model=small", "stage=behaviour"])
    assert (config.model.name, config.stage.name, config.stage.streams) == ("small", "behaviour", "video")
    assert config.model.action.action_dim == 4
    assert (config.stage.lr, config.optimizer.lr) == (1e-3, 1e-3)


def test_a_value_on_the_command_line_beats_the_experiments():
    config = load_config([DEMO, "stage.lr=2e-4"])
    assert (config.stage.lr, config.optimizer.lr) == (2e-4, 2e-4)


@pytest.mark.parametrize(
    ("stage", "published"),
    [("physical", (4e-5, 1e-3, "constant")), ("behaviour", (5e-6, 0, "constant")), ("joint", (1e-4, 1e-2, "cosine"))],
)
def test_a_stage_brings_its_published_learning_rate_and_schedule(stage, published):
    optimizer = load_config(["data.shards=x", f"stage={stage}"]).optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.schedule) == published


def test_an_optimizer_on_the_command_line_beats_the_stages():
    assert load_config(["data.shards=x", "stage=joint", "optimizer=adamw"]).optimizer.schedule == "constant"


def test_conditions_on_the_command_line_replace_those_of_the_stage():
    config = load_config([DEMO, "stage=behaviour", "stage.conditions={t2v: 1.0}"])
    assert config.stage.conditions == {"t2v": 1.0, "ti2v": 0.0, "i2v": 0.0, "null2v": 0.0}


@pytest.mark.parametrize("group", [path.name for path in sorted(CONFIGS.iterdir()) if list(path.glob("*.yaml"))])
def test_every_shipped_option_composes(group):
    assert options(group)
    for option in options(group):
        overrides = [f"{group}={option}", "data.shards=x", "data.window.cameras=[a,b,c]"]
        if option in ("small", "custom"):
            overrides += ["model.action.action_dim=3", "model.action.state_dim=3"]
        overrides += COMPANY.get(option, ())
        if option == "tiny":
            overrides += ["encoders=weight_free"]
        config = load_config(overrides)
        if group not in ("experiment", "optimizer", "parallel"):
            assert getattr(config, group).name == option


def test_full_size_model_has_the_published_sizes():
    model = load_config(["data.shards=x"]).model
    assert dataclasses.asdict(model) == dataclasses.asdict(Config().model)


@pytest.mark.parametrize(
    ("model", "encoders", "text_dim", "windows", "image"),
    [
        ("kairos_4b_video", "wan_qwen25", 3584, "token", True),
        ("kairos_4b_robot_480p", "wan_qwen35", 2048, "token", True),
        ("kairos_4b", "wan_qwen35", 2048, "frame", True),
        ("kairos_4b_libero", "wan_qwen25_no_image", 3584, "frame", False),
    ],
    ids=["3.0 video", "3.1 robot-480P", "RoboTwin", "LIBERO-Plus"],
)
def test_every_release_has_its_model_and_its_encoders(model, encoders, text_dim, windows, image):
    stage = "behaviour" if windows == "token" else "joint"
    config = load_config([f"model={model}", f"encoders={encoders}", f"stage={stage}", "data.shards=x"])
    assert config.model.text_dim == config.encoders.text.text_dim == text_dim
    assert (config.model.video.window_semantics, config.model.action is None) == (windows, windows == "token")
    assert config.model.video.restrict_history_query_to_history == (windows == "frame")
    assert (config.encoders.text.image, config.encoders.text.system_message) == (image, True)


def test_weights_of_token_windows_are_trained_in_frame_windows_by_one_override():
    """As the official trainer does."""
    words = ["model=kairos_4b_robot_480p", "stage=behaviour", "data.shards=x"]
    video = load_config([*words, "model.video.window_semantics=frame"]).model.video
    assert (video.window_semantics, video.restrict_history_query_to_history) == ("frame", False)


def test_composing_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_config([DEMO]) == load_config([DEMO])
    assert not GlobalHydra.instance().is_initialized()
    assert list(tmp_path.iterdir()) == []


def test_composing_works_where_hydra_is_in_use_already():
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        assert load_config([DEMO]).experiment == "demo"
    assert not GlobalHydra.instance().is_initialized()


def test_a_failure_leaves_no_trace_either():
    with pytest.raises(UserError, match="has the wrong type"):
        load_config([DEMO, "train.steps=abc"])
    assert not GlobalHydra.instance().is_initialized()
    assert load_config([DEMO]).train.steps == 200


def test_schema_needs_neither_hydra_nor_omegaconf():
    heavy = ("hydra", "omegaconf", "torch", "yaml")
    code = f"import sys, kairos_train.config.schema; print([m for m in sys.modules if m.split('.')[0] in {heavy}])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# --- own configurations ---


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_own_config_folder_adds_options(tmp_path):
    own = tmp_path / "it's mine, [really]"
    write(own / "model/mine.yaml", "defaults: [tiny, _self_]\nname: mine\nvideo: {ffn_dim: 256}\n")
    write(
        own / "experiment/mine.yaml",
        "# @package _global_\ndefaults: [demo, {override /model: mine}]\nexperiment: mine\n",
    )
    config = load_config(["experiment=mine"], config_dirs=[own])
    assert (config.experiment, config.model.name, config.model.video.ffn_dim, config.model.video.dim) == (
        *("mine", "mine", 256, 128),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae: x\n", r"unknown key 'model\.nmae'; did you mean .*\(in model/mine\.yaml\)"),
        (
            "video: {dim: wide}\n",
            r"model\.video\.dim=wide has the wrong type; .* \(in model/mine\.yaml\)",
        ),
        ("defaults: [tinny]\n", r"configuration model/tinny does not exist"),
        ("name: [\n", r"is no YAML"),
        ("- name\n", r"cannot be read|not a mapping"),
        ("text_dim: ${model.nothing}\n", r"model\.text_dim: Interpolation key 'model\.nothing' not found"),
    ],
)
def test_own_config_with_a_fault_is_named_in_one_line(tmp_path, text, message):
    write(tmp_path / "model/mine.yaml", text)
    with pytest.raises(UserError, match=message) as error:
        load_config([DEMO, "model=mine"], config_dirs=[tmp_path])
    assert "\n" not in str(error.value)


def test_own_config_may_not_shadow_a_shipped_one(tmp_path):
    write(tmp_path / "model/tiny.yaml", "name: other\n")
    with pytest.raises(UserError, match=r"model/tiny\.yaml already; rename yours"):
        load_config([DEMO], config_dirs=[tmp_path])


def test_own_config_folder_must_exist(tmp_path):
    with pytest.raises(UserError, match=r"--config-dir .*nowhere: no such folder"):
        load_config([DEMO], config_dirs=[tmp_path / "nowhere"])


# --- overrides that are refused ---


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stesp=3", r"unknown key 'train\.stesp'; did you mean train\.steps\? train has: steps, epochs"),
        ("steps=3", r"unknown key 'steps'; did you mean train\.steps\?"),
        ("modle=tiny", r"unknown key 'modle'; did you mean model\?"),
        ("model.vidoe.dim=3", r"unknown key 'model\.vidoe\.dim'; did you mean model\.video\.dim\?"),
        ("model.video={dm: 3}", r"unknown key 'model\.video\.dm'; did you mean model\.video\.dim\?"),
        (
            "stage.conditions.tv2=1",
            r"unknown key 'stage\.conditions\.tv2'; .*stage\.conditions has: t2v, ti2v",
        ),
        ("stage.conditions={v2t: 1.0}", r"unknown key 'stage\.conditions\.v2t'"),
        ("train.steps.now=3", r"train\.steps is an integer or null and has no keys"),
        ("hydra.verbose=true", r"unknown key 'hydra\.verbose'"),
        ("model=tinny", r"model=tinny is unknown; did you mean tiny\? it is one of: kairos_4b, "),
        ("experiment=dmo", r"experiment=dmo is unknown; did you mean demo\?"),
        ("model=[tiny]", r"model takes a name"),
        ("model={name: x}", r"model takes a name"),
        ("model=tiny,small", r"names several values; give one"),
        ("train=3", r"train is a section; set its keys, for example train\.steps=VALUE"),
        ("train.steps=abc", r"train\.steps=abc has the wrong type; it expects an integer"),
        ("train.steps=4.5", r"train\.steps=4\.5 has the wrong type; it expects an integer"),
        ("train.steps=null", r"train\.steps, .* are all null; give one"),
        ("stage.train_video=maybe", r"stage\.train_video=maybe has the wrong type; it expects true or false"),
        ("model.video.patch_size=[1,x]", r"patch_size\[1\]=x has the wrong type; it expects a list of integers"),
        ("model.video.layer_cycle=SWA", r"model\.video\.layer_cycle.*it expects a list of texts"),
        ("stage.conditions={ti2v: x}", r"stage\.conditions\.ti2v=x has the wrong type; it expects a number"),
        ("data.shards=${nothing}", r"data\.shards: Interpolation key 'nothing' not found"),
        ("train.steps", r"override 'train\.steps' is malformed; write KEY=VALUE"),
        ("train.steps=1=2", r"is malformed; write KEY=VALUE"),
        ("=3", r"is malformed; write KEY=VALUE"),
        ("+train.foo=3", r"keys are neither added, removed nor moved"),
        ("~model", r"keys are neither added, removed nor moved"),
        ("model@data=tiny", r"keys are neither added, removed nor moved"),
        (
            "model.action.action_dim=???",
            r"model\.action\.action_dim has no value; give",
        ),
    ],
)
def test_bad_override_is_refused_in_one_line(override, message):
    with pytest.raises(UserError, match=message) as error:
        load_config([DEMO, override])
    assert "\n" not in str(error.value)


def test_a_key_below_a_null_section_is_refused():
    with pytest.raises(UserError, match=r"this model has model\.action=null"):
        load_config(["model=kairos_4b_robot_480p", "stage=behaviour", "data.shards=x", "model.action.dim=64"])


def test_every_key_of_the_schema_can_be_named():
    assert {"train.steps", "model.action.action_dim", "data.window.frames"} <= set(all_keys())


# --- mandatory values and paths ---


def test_a_missing_value_is_asked_for():
    with pytest.raises(UserError, match=r"^data\.shards has no value; give data\.shards=VALUE \(a text\)$"):
        load_config()
    with pytest.raises(UserError, match=r"^model\.action\.action_dim has no value"):
        load_config(["experiment=custom", "data.shards=x"])
    with pytest.raises(UserError, match=r"^data\.window\.cameras has no value; .* \(a list of texts\)$"):
        load_config(["data=robotwin", "data.shards=x"])


def test_a_source_without_shards_is_asked_for_by_number():
    with pytest.raises(UserError, match=r"^data\.sources\[0\] has no shards; name its folder$"):
        load_config([DEMO, "data.sources=[{weight: 1}]"])


def test_a_command_that_needs_no_data_does_not_ask_for_it():
    assert load_config([], sections=["model"]).data.shards == "???"
    with pytest.raises(UserError, match=r"model\.action\.action_dim has no value"):
        load_config(["experiment=custom"], sections=["model"])
    assert load_config(["experiment=custom"], sections=[]).model.action.action_dim == "???"


@pytest.mark.parametrize("key", ["encoders.video.path", "encoders.text.path", "stage.init_from"])
def test_a_path_that_is_given_must_exist(key, tmp_path):
    missing = tmp_path / "nowhere"
    with pytest.raises(UserError, match=rf"^{re.escape(f'{key}={missing}')} does not exist"):
        load_config([DEMO, f"{key}={missing}"])
    assert load_config([DEMO, f"{key}={missing}"], sections=["model"])
    assert load_config([DEMO, f"{key}={tmp_path}"])


# --- storing ---


def test_saved_configuration_reads_back_equal(tmp_path):
    config = load_config([DEMO, "stage.lr=1e-5", "stage.conditions={ti2v: 0.7, i2v: 0.3}"])
    save_config(config, tmp_path / "config.yaml")
    assert load_saved(tmp_path / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert "${" not in (tmp_path / "config.yaml").read_text()


def test_saved_configuration_has_the_secrets_of_urls_for_those_alone_that_open_them(tmp_path):
    config = load_config([DEMO, "data.shards='https://user:SECRET@host/shards?signature=SECRET'"])
    save_config(config, tmp_path / "config.yaml", secrets=True)
    assert load_saved(tmp_path / "config.yaml") == config
    save_config(config, tmp_path / "config.yaml")
    assert "SECRET" not in (tmp_path / "config.yaml").read_text()
    assert load_saved(tmp_path / "config.yaml").data.shards == "https://host/shards"


def test_a_file_of_an_earlier_version_has_defaults_for_what_it_does_not_say(tmp_path):
    text = to_yaml(load_config([DEMO]))
    start = text.index("  image_conditions:")
    (tmp_path / "config.yaml").write_text(text[:start] + text[text.index("  captions:", start) :])
    assert load_saved(tmp_path / "config.yaml").stage.image_conditions == {"t2i": 1.0}


def test_saved_conditions_are_not_mixed_with_defaults(tmp_path):
    config = dataclasses.replace(load_config([DEMO, "stage=behaviour"]))
    config.stage.conditions = {"t2v": 1.0}
    save_config(config, tmp_path / "config.yaml")
    assert load_saved(tmp_path / "config.yaml").stage.conditions == {"t2v": 1.0}


def test_saved_configuration_does_not_ask_for_paths_of_another_machine(tmp_path):
    config = load_config([DEMO, f"stage.init_from={tmp_path}"])
    config.stage.init_from = "elsewhere/checkpoint"
    save_config(config, tmp_path / "config.yaml")
    assert load_saved(tmp_path / "config.yaml").stage.init_from == "elsewhere/checkpoint"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 200", "stpes: 200", r"config\.yaml: unknown key 'train\.stpes'; did you mean train\.steps\?"),
        ("steps: 200", "steps: many", r"config\.yaml: train\.steps=many has the wrong type"),
        ("action_dim: 4", "action_dim: ???", r"model\.action\.action_dim has no value"),
        ("frames: 5", "frames: 6", r"data\.window\.frames=6 is not 4k\+1"),
        ("seed: 0", "seed: [", r"config\.yaml: is no YAML"),
    ],
)
def test_damaged_saved_configuration_is_refused_in_one_line(tmp_path, old, new, message):
    text = to_yaml(load_config([DEMO]))
    assert old in text
    (tmp_path / "config.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message) as error:
        load_saved(tmp_path / "config.yaml")
    assert "\n" not in str(error.value)


def test_absent_saved_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml: no such file"):
        load_saved(tmp_path / "config.yaml")
