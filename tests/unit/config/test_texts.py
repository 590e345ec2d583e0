"""Text settings keep what was typed, on the command line and in files; `~` is the home folder in every path."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from kairos_train.basics.errors import UserError
from kairos_train.cli import main
from kairos_train.config.compose import load_config, load_saved, save_config
from kairos_train.config.keys import walk
from kairos_train.config.schema import Config
from kairos_train.config.texts import check_file, kept, quoted

DEMO = "experiment=demo"
CONFIGS = Path(__file__).resolve().parents[3] / "configs"
TEXTS = [
    *("2024_11_30", "1e3", "1.10", "0123", "007", "true", "on", "Off", "1_000", "+5", "-0", "nan", ".5", "0x10"),
    *("12:30:05", "a,b", "a=b", "a: b", "it's", 'say "x"', "back\\slash", "ends\\", "{task}: go", "a b", "~x", "50%"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_kept_as_it_was_typed(text, tmp_path):
    config = load_config([DEMO, f"data.name={text}", f"cluster.environment={{A: {quoted(text)}}}"])
    assert (config.data.name, config.cluster.environment["A"]) == (text, text)
    save_config(config, tmp_path / "config.yaml")
    assert load_saved(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("text", ["2024_11_30", "1e3", "1.10", "true", "1_0", "+5"])
def test_texts_in_lists_mappings_and_sections_are_kept(text):
    config = load_config(
        [
            DEMO,
            f"data.window.cameras=[{text}, b]",
            f"cluster.environment={{A: {text}, B: x, C: '1.0'}}",
            f"data.sources=[{{shards: {text}, weight: 1e1, max_epochs: 2}}]",
            f"encoders.name={text}",
        ]
    )
    assert config.data.window.cameras == [text, "b"]
    assert {name: config.cluster.environment[name] for name in "ABC"} == {"A": text, "B": "x", "C": "1.0"}
    assert set(config.cluster.environment) - set("ABC") == set(load_config([DEMO]).cluster.environment)
    (source,) = config.data.sources
    assert (source.shards, source.weight, source.max_epochs) == (text, 10.0, 2)
    assert config.encoders.name == text


@pytest.mark.parametrize(
    "override",
    [
        *("train.steps=1_000", "stage.lr=1e-3", "stage.train_video=true", "cluster.account=null", "run_dir='a b'"),
        *(
            "model=tiny",
            "model=tiny,small",
            "train.steps=1=2",
            "steps=3",
            "train.steps",
            "run_dir=runs/${experiment}/x",
        ),
        *("stage.conditions={ti2v: 0.7}", "data.clips.aspects=[1, 1.5]", "cluster.environment={A: x}", "=3"),
    ],
)
def test_what_is_no_retyped_text_is_left_to_hydra(override):
    assert kept(override, {"model": [], "cluster": []}) == override


def test_null_is_no_text_where_it_may_be_given():
    assert load_config([DEMO, "cluster.account=x", "cluster.qos=null"]).cluster.qos is None


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("cluster/site.yaml", "account: 0123\n", r'cluster\.account: 0123 is read as 83; .* write "0123" in quotes'),
        ("cluster/site.yaml", "partition: on\n", r"cluster\.partition: on is read as True"),
        ("cluster/site.yaml", "qos: 1e3\n", r"cluster\.qos: 1e3 is read as 1000\.0"),
        ("cluster/site.yaml", "time_limit: 24:00:00\n", r"cluster\.time_limit: 24:00:00 is read as 86400"),
        ("cluster/site.yaml", "environment: {A: yes}\n", r"cluster\.environment\.A: yes is read as True"),
        ("cluster/site.yaml", "sbatch: [a, 0x1F]\n", r"cluster\.sbatch\[1\]: 0x1F is read as 31"),
        ("experiment/my.yaml", "# @package _global_\ndata: {shards: 2024_11}\n", r"data\.shards: 2024_11 is read as"),
        ("experiment/my.yaml", "# @package _global_\nrun_dir: 1.10\n", r"run_dir: 1\.10 is read as 1\.1;"),
        ("data/mine.yaml", "sources: [{shards: 12, weight: 1}]\n", r"data\.sources\[0\]\.shards: 12 is read as 12"),
        ("train/mine.yaml", "steps: 0100\n", r"train\.steps: 0100 is read as 64; write it without zeros"),
        ("train/mine.yaml", "steps: 1:30\n", r"train\.steps: 1:30 is read as 90"),
    ],
)
def test_a_file_whose_text_yaml_reads_as_something_else_is_refused(tmp_path, file, text, message):
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_config([DEMO], config_dirs=[tmp_path])
    assert "\n" not in str(error.value)


def test_a_file_with_quotes_is_taken(tmp_path):
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/site.yaml").write_text(
        'defaults: [h200, _self_]\nname: site\naccount: "0123"\npartition: "on"\ngpus_per_node: 8\nmfu: .5\nqos: null\n'
    )
    cluster = load_config([DEMO, "cluster=site"], config_dirs=[tmp_path]).cluster
    assert (cluster.account, cluster.partition, cluster.qos, cluster.mfu) == ("0123", "on", None, 0.5)


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_keeps_its_texts(file):
    check_file(file, CONFIGS)


# --- paths ---


def test_every_setting_that_is_a_path_may_begin_with_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("video", "text", "init"):
        (tmp_path / name).mkdir()
    paths = {key for key, section, field in walk(Config()) if field.metadata.get("path")} - {"cluster.container_mounts"}
    assert {"run_dir", "data.shards", "data.validation_shards", "monitor.prometheus_file", "cluster.jobs_dir"} <= paths
    given = {key: f"~/{key}" for key in sorted(paths - {"cluster.venv"})}
    given |= {"encoders.video.path": "~/video", "encoders.text.path": "~/text", "stage.init_from": "~/init"}
    words = [f"{key}={path}" for key, path in given.items()]
    words += ["data.sources=[{shards: '~/a'}]", "cluster.container_mounts=['~/b:/b']"]
    config = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(load_config([DEMO, *words]))))
    for key, path in given.items():
        assert OmegaConf.select(config, key) == path.replace("~", str(tmp_path)), key
    assert config.data.sources[0].shards == f"{tmp_path}/a"
    assert config.cluster.container_mounts == [f"{tmp_path}/b:/b"]
    assert load_config([DEMO, "cluster.venv=~/env", "run_dir=~x/y"]).cluster.venv == f"{tmp_path}/env"


def test_arguments_that_are_paths_may_too(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["data", "inspect", "~/none", "--out=~/page", "data=custom"]) == 2
    assert f"{tmp_path}/none: does not exist" in capsys.readouterr().err
    (tmp_path / "page").mkdir()
    assert main(["data", "inspect", "~/none", "--out=~/page", "data=custom"]) == 2
    assert f"{tmp_path}/page: exists" in capsys.readouterr().err


def test_an_option_may_have_a_name_like_a_number(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/1e3.yaml").write_text('# @package _global_\ndefaults: [demo]\nexperiment: "1e3"\n')
    assert load_config(["experiment=1e3"], config_dirs=[tmp_path]).experiment == "1e3"
