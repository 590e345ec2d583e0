"""A setting's one line in the schema: the rule of its values, what a resumed run may do with it, what it is."""

import ast
import inspect
import re
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest
from support.settings import changed

from dataloaders.config import DataConfig, SourceConfig
from kairos_train.basics.errors import UserError
from kairos_train.basics.setting import POSITIVE, setting
from kairos_train.config.keys import on_resume, walk
from kairos_train.config.operation_schema import FaultConfig, FaultsConfig
from kairos_train.config.schema import CaptionShare, Config, CurriculumConfig, CurriculumStage, StageConfig
from kairos_train.config.validate import values_are_legal

FILLED = Config(
    data=DataConfig(sources=[SourceConfig("a")]),
    stage=StageConfig(captions=[CaptionShare("a")]),
    curriculum=CurriculumConfig([CurriculumStage("a")]),
    faults=FaultsConfig([FaultConfig("nan")]),
)
"""One item in every list of sections, so that `walk` comes to every setting there is."""

RULED = {key: field.metadata["rule"] for key, _, field in walk(FILLED) if field.metadata.get("rule")}

COMPARED = {
    *("model.video.latent_channels", "stage.lora.rank", "stage.lora.alpha", "data.sources[0].max_epochs"),
    *(f"faults.inject[0].{name}" for name in ("step", "rank", "life", "steps", "seconds")),
}
"""Numbers without a rule, because a function of `kairos_train.config.validate` has more to say on them."""


@pytest.mark.parametrize("key", sorted(RULED))
def test_the_rule_of_a_setting_refuses_another_value(key):
    """-1 is legal nowhere, be it a number or one of a few names; null is nobody's fault here."""
    values_are_legal(changed(FILLED, {key: None}))
    with pytest.raises(UserError, match=rf"^{re.escape(f'{key}=-1 {RULED[key].fault}')}$"):
        values_are_legal(changed(FILLED, {key: -1}))


def test_every_number_has_a_rule():
    hints = {key: get_type_hints(type(section))[field.name] for key, section, field in walk(FILLED)}
    numbers = {key for key, hint in hints.items() if hint in (int, float, int | None, float | None)}
    assert numbers - RULED.keys() == COMPARED


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("train.steps", "free"),
        ("train.precision", "fixed"),  # in a section that is free, but it decides the numbers
        ("train.deadline", "silent"),
        ("run_dir", "free"),
        ("prepare", "free"),
        ("kernels.attention", "free"),
        ("parallel.tensor", "free"),
        ("precision.fp8.recipe", "fixed"),
        ("cluster.environment.NCCL_DEBUG", "free"),
        ("faults.inject", "free"),
        ("data.shards", "fixed"),
        ("data.window.frames", "fixed"),
        ("data.workers", "free"),
        ("stage.init_from", "free"),
        ("stage.action_init", "fixed"),
        ("stage.conditions.t2v", "fixed"),
        ("model.action", "fixed"),
        ("experiment", "fixed"),
    ],
)
def test_what_a_resumed_run_may_change(key, answer):
    assert on_resume(key) == answer


def test_words_that_nobody_reads_are_refused():
    with pytest.raises(AssertionError, match="fre"):
        setting(1, POSITIVE, on_resume="fre")
    with pytest.raises(AssertionError, match="exist"):
        setting("a", path="exist")


# --- every setting says what it is ---


def schema_classes(kind: Any = Config) -> set[type]:
    """The dataclass and those of its fields, of lists and alternatives too."""
    found = {kind}
    for hint in get_type_hints(kind).values():
        for inner in {hint, *get_args(hint)}:
            found |= schema_classes(inner) if is_dataclass(inner) else set()
    return found


def undocumented(kind: type, source: str) -> list[str]:
    """The settings of a class that no comment explains, behind them or on the lines above; sections have docstrings."""
    lines, hints = source.splitlines(), get_type_hints(kind)
    silent = [] if ast.get_docstring(ast.parse(source).body[0]) else [kind.__name__]
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        above = lines[node.lineno - 2].strip().startswith("#")
        behind = any("  # " in line for line in lines[node.lineno - 1 : node.end_lineno])
        section = any(is_dataclass(k) for k in {hints[node.target.id], *get_args(hints[node.target.id])})
        if not (above or behind or section):
            silent.append(f"{kind.__name__}.{node.target.id}")
    return silent


@pytest.mark.parametrize("kind", sorted(schema_classes(), key=str), ids=lambda kind: kind.__name__)
def test_every_setting_is_documented_where_it_stands(kind):
    assert undocumented(kind, inspect.getsource(kind)) == []


@dataclass
class Example:
    # above
    one: int = setting(1, POSITIVE)
    two: int = 2  # behind
    three: int = 3


def test_a_setting_without_a_comment_is_found():
    assert undocumented(Example, inspect.getsource(Example)) == ["Example", "Example.three"]
    assert [field.name for field in fields(Example)] == ["one", "two", "three"]
