"""An experiment's list of stages as one configuration each, all of them checked before the first begins.

A stage's configuration is the experiment's own with the stage's `set` on top, and the command line on top of that. It
is complete in itself: what is saved with a stage can be run again alone. Stage NAME has `run_dir`/NAME, and starts from
the weights and averages of the stage before it unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kairos_train.basics.errors import UserError
from kairos_train.config.compose import check, load_config
from kairos_train.config.schema import Config, CurriculumConfig, CurriculumStage
from kairos_train.config.stage_rules import LENGTHS

INIT = "stage.init_from"


@dataclass(frozen=True)
class Curriculum:
    """The stages of a run.

    Attributes:
        stages: one configuration each.
        names: of them; empty when the run is one stage.
        walk: numbers of the stages that are to be walked.
        prepare: commands that make the data.
    """

    stages: list[Config]
    names: tuple[str, ...]
    walk: range
    prepare: list[str]


def load_curriculum(overrides: Sequence[str] = (), **where: Any) -> Curriculum:
    """Compose every stage of a run; a run without a list of stages is one.

    Args:
        overrides: as on the command line; they hold for every stage, `stage.init_from` for the first that is walked.
        where: `config_dirs` of `load_config`.

    Raises:
        UserError: as `load_config`, with the stage's name.
    """
    root = load_config(overrides, sections=(), **where)
    entries = root.curriculum.stages
    if not entries:
        check(root)
        return Curriculum([root], (), range(1), root.prepare)
    names = tuple(entry.name for entry in entries)
    first = names.index(root.curriculum.first or names[0])
    last = names.index(root.curriculum.last or names[-1])
    parent = _parent(root, overrides)
    stages = [
        _stage(entry, parent / entry.name, [text for text in overrides if i == first or _key(text) != INIT], where)
        for i, entry in enumerate(entries)
    ]
    given = {i for i, entry in enumerate(entries) if INIT in map(_key, entry.set)}
    given |= {first} if INIT in map(_key, overrides) else set()
    for i, stage in enumerate(stages):
        if i and i not in given:
            handed = any(_key(text) == "stage.init_weights" for text in [*entries[i].set, *overrides])
            weights = stage.stage.init_weights if handed else "both"
            stage.stage = replace(stage.stage, init_from=stages[i - 1].run_dir, init_weights=weights)
    return Curriculum(stages, names, range(first, last + 1), root.prepare)


def _stage(entry: CurriculumStage, run_dir: Path, overrides: Sequence[str], where: dict[str, Any]) -> Config:
    """A stage's configuration; what the command line sets, the entry does not."""
    above = {_key(text) for text in overrides}
    lengths = {f"train.{unit}" for unit in LENGTHS}
    if above & lengths:
        above |= lengths  # a length takes the place of another one
    own = [text for text in entry.set if _key(text) not in above]
    rest = [text for text in overrides if not _key(text).startswith("curriculum.")]
    try:
        config = load_config([*own, *rest], **where)
    except UserError as error:
        raise UserError(f"curriculum stage {entry.name}: {error}") from error
    return replace(config, run_dir=str(run_dir), curriculum=CurriculumConfig(), prepare=[])


def _parent(root: Config, overrides: Sequence[str]) -> Path:
    """The folder that the stages' folders are in: `run_dir` where it is given, else runs/EXPERIMENT."""
    return Path(root.run_dir if "run_dir" in map(_key, overrides) else f"runs/{root.experiment}")


def _key(override: str) -> str:
    return override.partition("=")[0].strip()
