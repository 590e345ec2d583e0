"""Which file or override set a setting."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from kairos_train.basics.errors import UserError
from kairos_train.config.compose import load_config, schema_of_files
from kairos_train.config.groups import groups_of
from kairos_train.config.keys import MAPPINGS, walk
from kairos_train.config.origin import SCHEMA, origin_of, origins

OVERRIDES = ["seed=7", "stage.conditions={ti2v: 0.5, i2v: 0.5}", "data.window.cameras=[a,b,c]"]


def valued(content, key: str):
    """The value of a dotted key in nested mappings."""
    for name in key.split("."):
        content = content[name]
    return content


@pytest.mark.parametrize("experiment", groups_of()["experiment"])
def test_every_value_is_that_of_its_origin(experiment):
    """Nothing else sets it later: the file's own text, the override or the schema has the value that is used."""
    words = [f"experiment={experiment}", *OVERRIDES]
    found, config = origins(words), load_config(words, sections=())
    defaults, seen = asdict(schema_of_files()), set()
    for key, value in settings(config):
        origin = origin_of(key, found)
        seen.add(origin.where)
        if isinstance(origin.written, str) and "${" in origin.written:
            continue
        if origin.where == SCHEMA:
            assert value == valued(defaults, key) or "${" in str(valued(defaults, key)), key
        elif origin.where.startswith("configs/"):
            assert is_meant(origin.written, value), key
        else:
            assert origin.where.removeprefix("override ") in OVERRIDES, key
    assert {f"override {text}" for text in OVERRIDES} <= seen
    assert f"configs/experiment/{experiment}.yaml" in seen


def settings(config) -> Iterator[tuple[str, Any]]:
    """Every setting but items of lists; of mappings that take any name the entries, which may be of several files."""
    for key, section, field in walk(config):
        value = getattr(section, field.name)
        if isinstance(value, dict) and key not in MAPPINGS:
            yield from ((f"{key}.{name}", entry) for name, entry in value.items())
        elif "[" not in key:
            yield key, value


def is_meant(written, value) -> bool:
    """Whether a file's value is the one that is used, which has more names (at 0) and the defaults of list items."""
    if isinstance(written, dict):
        return {name: n for name, n in value.items() if n} == {name: n for name, n in written.items() if n}
    if isinstance(written, list):
        return len(written) == len(value)
    return written == value


@pytest.mark.parametrize(
    ("words", "key", "shown"),
    [
        (["experiment=demo"], "model.name", "configs/model/tiny.yaml"),
        (["experiment=demo"], "train.steps", "configs/experiment/demo.yaml"),
        (["experiment=demo_push2d"], "train.steps", "configs/experiment/demo.yaml"),
        (["experiment=demo", "model=small"], "model.name", "configs/model/small.yaml"),
        (["experiment=demo", "train.steps=3", "train.steps=4"], "train.steps", "override train.steps=4"),
        (["experiment=demo"], "optimizer.lr", "configs/optimizer/adamw.yaml: ${stage.lr}"),
        (["experiment=demo"], "stage.lr", "configs/experiment/demo.yaml"),
        (["experiment=demo"], "stage.history_frames", "configs/stage/joint.yaml"),
        (["model=kairos_4b_video"], "model.action", "configs/model/kairos_4b_robot_480p.yaml"),
        (["experiment=demo"], "watch.heartbeat", SCHEMA),
        (["experiment=demo", "stage.conditions.ti2v=1.0"], "stage.conditions", "override stage.conditions.ti2v=1.0"),
        (
            ["experiment=demo", "cluster.environment={A: 1}"],
            "cluster.environment",
            "override cluster.environment={A: 1}",
        ),
    ],
)
def test_the_last_one_that_set_it_is_named(words, key, shown):
    assert str(origin_of(key, origins(words))) == shown


def test_own_files_are_named_by_their_path(tmp_path):
    file = tmp_path / "stage/mine.yaml"
    file.parent.mkdir()
    file.write_text("defaults: [joint, _self_]\nname: mine\nlr: 0.5\n")
    found = origins(["experiment=demo", "stage=mine"], config_dirs=[tmp_path])
    assert origin_of("stage.name", found).where == str(file)
    assert origin_of("stage.lr", found).where == "configs/experiment/demo.yaml"


def test_what_cannot_be_composed_is_refused_as_ever():
    with pytest.raises(UserError, match=r"did you mean tiny\?"):
        origins(["model=tinny"])
