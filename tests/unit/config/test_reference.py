"""The settings in words: the page in docs/, `config --show`, `--origin`, and what `train --help` lists."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.terminal import on_a_terminal
from test_settings import FILLED

from kairos_train.basics.setting import POSITIVE, setting
from kairos_train.cli import build_parser, main
from kairos_train.config.groups import SHIPPED, about, groups_of
from kairos_train.config.keys import walk
from kairos_train.config.reference import comments, page, sections, settings_of

PAGE = Path(__file__).resolve().parents[3] / "docs/settings.md"
DOCS = {doc.key: doc for section in sections() for doc in section.settings}


def test_the_page_is_the_schemas():
    """Written again by `kairos-train config --reference > docs/settings.md`."""
    assert PAGE.read_text() == page()


def test_every_setting_there_is_stands_on_it_and_says_what_it_is():
    keys = {key.replace("[0]", "[N]") for key, _, _ in walk(FILLED)}
    assert {key for key, doc in DOCS.items() if doc.default != "a section"} == keys
    assert [key for key, doc in DOCS.items() if not doc.about] == []
    assert [section.key for section in sections() if not section.about] == []
    assert all(f"| `{key}` |" in page() for key in DOCS)


@pytest.mark.parametrize(
    ("key", "values", "default", "on_resume"),
    [
        ("train.steps", "an integer from 1 to 99,999,999 or null", "1000", "free"),
        ("train.precision", "one of bf16, fp32", "bf16", "fixed"),
        ("train.deadline", "a text or null", "null", "silent"),
        ("stage.cfg_dropout", "a number from 0 to 1", "0.1", "fixed"),
        ("stage.conditions", "a mapping of names to numbers, of t2v, ti2v, i2v, null2v", "{ti2v: 1.0}", "fixed"),
        ("data.shards", "a text", "", "fixed"),
        ("data.window.cameras", "a list of texts", "", "fixed"),
        ("data.sources[N].weight", "a number from 0 on or null", "null", "fixed"),
        ("model.action.action_dim", "an integer from 1 to 131,072", "", "fixed"),
    ],
)
def test_values_defaults_and_resumption_are_those_of_the_schema(key, values, default, on_resume):
    doc = DOCS[key]
    assert (doc.values, doc.default, doc.on_resume) == (values, default, on_resume)


@dataclass
class Example:
    # above, on
    # two lines
    one: int = setting(1, POSITIVE)
    two: int = 2  # behind
    three: list[int] = field(default_factory=lambda: [1])  # behind its end
    four: int = 4


def test_comments_stand_behind_a_setting_or_above_it():
    assert comments(Example) == {"one": "above, on two lines", "two": "behind", "three": "behind its end"}


def test_a_section_is_shown_with_values_and_words(monkeypatch, capsys):
    words = ["config", "experiment=demo", "train.steps=3", "--show", "train"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {key for key in DOCS if key.startswith("train.")}
    assert found["train.steps"]["value"] == 3
    assert found["train.steps"]["about"].startswith("the stage's length")
    screen = on_a_terminal(monkeypatch, *words)
    assert re.search(r"train\.steps +3 +an integer from", screen)


def test_origins_are_shown_beside_the_values(monkeypatch, capsys):
    words = ["config", "experiment=demo", "train.steps=3", "--origin", "--show", "train"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["train.steps"]["set_by"] == "override train.steps=3"
    assert found["train.precision"]["set_by"] == "configs/experiment/demo.yaml"
    assert found["train.keep_best"]["set_by"] == "the schema's default"
    screen = on_a_terminal(monkeypatch, "config", "experiment=demo", "--origin")
    assert re.search(r"cluster\.environment\.NCCL_DEBUG +WARN +configs/cluster/h", screen)


def test_one_setting_and_items_of_lists_are_shown_and_a_wrong_section_is_refused(capsys):
    assert [key for key, _, _ in settings_of(FILLED, "data.sources")][:2] == ["data.sources", "data.sources[0].shards"]
    assert [key for key, _, _ in settings_of(FILLED, "seed")] == ["seed"]
    assert main(["config", "experiment=demo", "--show", "trian"]) == 2
    assert "unknown key 'trian'; did you mean train? " in capsys.readouterr().err


def test_help_of_train_lists_every_experiment_and_group():
    parsers = next(action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
    text = parsers["train"].format_help()
    for group, options in groups_of().items():
        assert re.search(rf"^(  {group} |.*\({group}=NAME\))", text, re.M)
        assert all(option in text for option in options)
    for experiment in groups_of()["experiment"]:
        assert about("experiment", experiment).split()[0] in text
    assert "experiments (" not in parsers["export"].format_help()


@pytest.mark.parametrize("file", sorted((SHIPPED / "experiment").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_experiment_says_what_it_is_in_one_sentence(file):
    assert 20 < len(about("experiment", file.stem)) < 160
