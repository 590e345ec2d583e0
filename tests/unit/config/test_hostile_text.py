"""Settings from strangers and odd ones of our own: bounded, in one line, and never answered by the reader's machine."""

import re
import resource

import pytest
import yaml

from kairos_train.basics.errors import UserError
from kairos_train.basics.yaml_text import MAX_BYTES, MAX_DEPTH, MAX_VALUES, yaml_text
from kairos_train.config.compose import load_config, load_saved, save_config, to_yaml

DEMO = "experiment=demo"
SECRET = "${oc.env:KAIROS_TEST_SECRET}"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
MERGED = "a0: &a0 {a: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
HOSTILE = {
    "an unclosed quote": ("run_dir: 'abc\n", "is no YAML"),
    "an unclosed double quote": ('run_dir: "abc\n', "is no YAML"),
    "deep lists": ("a: " + "[" * 100_000 + "]" * 100_000, f"is nested more than {MAX_DEPTH} deep"),
    "deep mappings": ("".join(" " * i + "a:\n" for i in range(500)), f"is nested more than {MAX_DEPTH} deep"),
    "an alias bomb": (BOMB, f"holds more than {MAX_VALUES:,} values, its aliases written out"),
    "a bomb of merged mappings": (MERGED, f"holds more than {MAX_VALUES:,} values"),
    "an alias within its anchor": ("a: &a\n  b: *a\n", r"\*a stands before its anchor or within it"),
    "an alias of nothing": ("a: *b\n", r"\*b stands before its anchor or within it"),
    "a long file": ("# " + "x" * MAX_BYTES, "is longer than 4 MiB"),
    "a control character": ("a: b\0c\n", "is no YAML"),
    "bytes that are no UTF-8": (b"a: \xe9\n", "cannot be read .* give a text file in UTF-8"),
    "a number without end": (
        "train: {steps: " + "9" * 5000 + "}\n",
        r"cannot be read: Exceeds the limit|has the wrong",
    ),
    "a tag": ("run_dir: !!python/object/apply:os.getcwd []\n", "cannot be read: could not determine a constructor"),
}


def message_of(error: pytest.ExceptionInfo) -> str:
    """One line of a readable length."""
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 1000
    return text


def as_bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


# --- files ---


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_saved_configuration_is_refused_in_one_line(tmp_path, name):
    text, message = HOSTILE[name]
    (tmp_path / "config.yaml").write_bytes(as_bytes(text))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=message) as error:
        load_saved(tmp_path / "config.yaml")
    assert str(tmp_path) in message_of(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18, "in KiB"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_of_a_user_is_refused_in_one_line(tmp_path, name):
    text, message = HOSTILE[name]
    (tmp_path / "experiment").mkdir()
    head = b"# @package _global_\ndefaults: [demo, _self_]\n"
    (tmp_path / "experiment/x.yaml").write_bytes(head + as_bytes(text))
    with pytest.raises(UserError, match=message) as error:
        load_config(["experiment=x"], config_dirs=[tmp_path], sections=())
    message_of(error)


def test_anchors_that_stand_for_little_are_taken(tmp_path):
    (tmp_path / "config.yaml").write_text("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}\n")
    values = yaml.safe_load(yaml_text(tmp_path / "config.yaml"))
    assert values == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}


def test_what_cannot_be_opened_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml: cannot be read \(.*No such file"):
        yaml_text(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    "text", [SECRET, r"\${a}", r"\\${a}", "a ${ b", "${", "${${experiment}}", "c:\\d ${run_dir}\\", "'${seed}'"]
)
def test_a_saved_configuration_is_read_as_it_stands(tmp_path, monkeypatch, text):
    """`${…}` in it is text: its reader's environment and other settings do not answer."""
    monkeypatch.setenv("KAIROS_TEST_SECRET", "secret")
    config = load_config([DEMO], sections=())
    config.experiment = config.data.window.action_key = text
    config.cluster.sbatch = [f"--comment={text}".replace(" ", "").replace("\\", "").replace("'", "")]
    save_config(config, tmp_path / "config.yaml")
    assert load_saved(tmp_path / "config.yaml", sections=()) == config


@pytest.mark.parametrize("key", ["seed: 0", "kernels:\n  attention: auto\n  gated_delta: auto"])
def test_a_saved_number_or_section_is_no_interpolation(tmp_path, monkeypatch, key):
    monkeypatch.setenv("KAIROS_TEST_SECRET", "0")
    text = to_yaml(load_config([DEMO], sections=()))
    assert key in text
    (tmp_path / "config.yaml").write_text(text.replace(key, f"{key.partition(':')[0]}: {SECRET}"))
    with pytest.raises(UserError, match=r"config\.yaml: ") as error:
        load_saved(tmp_path / "config.yaml", sections=())
    message_of(error)


# --- the command line ---


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.prompt_template='{task}", "is malformed; write KEY=VALUE, and quote"),
        ('data.prompt_template="{task}', "is malformed"),
        ("cluster.environment={A: 'b}", "is malformed"),
        ("cluster.sbatch=" + "[" * 5000 + "]" * 5000, f"is nested more than {MAX_DEPTH} deep"),
        ("cluster.environment=" + "{a: " * 50 + "1" + "}" * 50, f"is nested more than {MAX_DEPTH} deep"),
        ("cluster.sbatch=[[--a]]", r"cluster\.sbatch\[0\]=\['--a'\] has the wrong type; it expects a text"),
        ("run_dir=" + "x" * 100_000, "has 100,008 characters, and 32,768 are the most"),
        ("model.num_layers=" + "4" * 5000, r"cannot be read \(Exceeds the limit"),
        ("model.num_layers=4000000000", r"num_layers=4000000000 is outside \[1, 1024\]"),
        ("train.steps=1" + "0" * 400, r"train\.steps=10{79}… is outside \[1, 99999999\]"),
        (".".join(["a"] * 3000) + "=1", "unknown key 'a.a.a"),
        ("run_dir=a\nb", r"run_dir holds 'a\\nb'; give one line of text"),
    ],
)
def test_an_absurd_override_is_refused_in_one_line(override, message):
    with pytest.raises(UserError, match=message) as error:
        load_config([DEMO, override], sections=())
    message_of(error)


# --- what a file and the command line say of Slurm ---

VALUES = {
    "environment": {"NCCL_SOCKET_IFNAME": "ib0", "A": "two  blanks ", "B": 'it\'s "$(id)" `x` #;*', "C": "a\\"},
    "container": "/images/my image.sqsh",
    "container_mounts": ["/data$x:/data:ro"],
    "sbatch": ["--constraint=h200&nvme", "--requeue"],
    "scratch": "/local/my 'own'",
    "account": "a$b",
    "time_limit": "1-00:00:00",
}


def test_a_file_and_the_command_line_say_the_same_of_a_cluster(tmp_path):
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/site.yaml").write_text("defaults: [h200, _self_]\n" + yaml.safe_dump(VALUES))
    from_file = load_config([DEMO, "cluster=site"], config_dirs=[tmp_path], sections=()).cluster
    words = [f"cluster.{name}={hydra(value)}" for name, value in VALUES.items()]
    from_line = load_config([DEMO, "cluster=h200", *words], sections=()).cluster
    assert from_file == from_line
    for name, value in VALUES.items():
        found = getattr(from_line, name)
        assert {key: found[key] for key in value} == value if isinstance(value, dict) else found == value, name


def hydra(value) -> str:
    """A value in the grammar of overrides: JSON, with names without quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {hydra(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(hydra, value))}]"
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"


def test_the_documented_override_works(capsys):
    from kairos_train.cli import main

    assert main(["config", DEMO, "data.shards=x", "cluster.environment={NCCL_SOCKET_IFNAME: ib0}"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["cluster"]["environment"]["NCCL_SOCKET_IFNAME"] == "ib0"
