"""A setting's one line in the schema: the rule of its values, what a resumed run may do with it, what it is."""

import re
from typing import get_type_hints

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
