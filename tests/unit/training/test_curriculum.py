"""A list of stages composed into one configuration each; budgets; what makes data."""

import math
import sys
from pathlib import Path

import pytest

from kairos_train.basics.errors import UserError
from kairos_train.config.compose import load_config
from kairos_train.config.curriculum import load_curriculum
from kairos_train.config.schema import TrainConfig
from kairos_train.config.validate import validate
from kairos_train.launch.prepare import prepare
from kairos_train.training.budget import Budget, Progress
from kairos_train.training.engine.optimizer import lr_at

DEMO = "experiment=curriculum_demo"
ROWS = {  # learning rate and weight decay of the published stages
    "physical_images": (5e-5, 1e-3),
    "physical": (4e-5, 1e-3),
    "physical_480p": (3e-5, 0),
    "physical_720p": (2e-5, 0),
    "physical_720p_long": (1e-5, 0),
    "physical_domain": (1e-5, 0),
    "behaviour_human": (1e-5, 0),
    "behaviour": (5e-6, 0),
    "behaviour_target": (1e-6, 0),
    "joint": (1e-4, 1e-2),
}


def test_every_published_stage_has_a_file_with_its_rate_and_decay():
    assert {path.stem for path in Path("configs/stage").glob("*.yaml")} == set(ROWS)
    for name, row in ROWS.items():
        config = load_config([f"stage={name}"], sections=())
        assert config.stage.name == name
        assert (config.optimizer.lr, config.optimizer.weight_decay) == row
        assert config.optimizer.schedule == ("cosine" if name == "joint" else "constant")
        assert config.stage.streams == ("joint" if name == "joint" else "video")


def test_the_full_curriculum_is_the_published_table():
    stages = load_curriculum(["experiment=curriculum"]).stages
    assert [stage.stage.name for stage in stages] == list(ROWS)
    sizes = [(stage.data.clips.short_side, stage.data.clips.most_frames) for stage in stages]
    assert sizes[:6] == [(256, 1), (256, 81), (480, 81), (720, 81), (720, 241), (720, 241)]
    assert [stage.optimizer.lr for stage in stages] == [lr for lr, _ in ROWS.values()]
    shares = {source.shards.rsplit("_", 1)[0].rsplit("/", 1)[-1]: source.weight for source in stages[1].data.sources}
    assert shares == {"images": 0.1, "videos": 0.9}


def test_stages_follow_one_another():
    found = load_curriculum([DEMO])
    assert found.names == ("physical", "behaviour", "joint")
    assert [stage.run_dir for stage in found.stages] == [f"runs/curriculum_demo/{name}" for name in found.names]
    assert [stage.stage.init_from for stage in found.stages] == [
        None,
        *(f"runs/curriculum_demo/{n}" for n in found.names[:2]),
    ]
    assert [stage.stage.init_weights for stage in found.stages] == ["ema", "both", "both"]
    assert all(not stage.curriculum.stages and not stage.prepare for stage in found.stages)
    assert len(found.prepare) == 4
    for stage in found.stages:
        validate(stage)


def test_the_command_line_stands_above_the_list(tmp_path):
    words = [DEMO, "train.steps=7", "stage.lr=3e-4", "stage.init_weights=raw", f"run_dir={tmp_path}/a=b, c"]
    words[-1] = f"run_dir='{tmp_path}/a=b, c'"
    stages = load_curriculum([*words, "curriculum.first=behaviour", f"stage.init_from={tmp_path}"]).stages
    assert [(s.train.steps, s.train.samples, s.train.tokens) for s in stages] == [(7, None, None)] * 3
    assert {stage.optimizer.lr for stage in stages} == {3e-4}
    assert [Path(stage.run_dir).parent for stage in stages] == [tmp_path / "a=b, c"] * 3
    starts = [None, str(tmp_path), f"{tmp_path}/a=b, c/behaviour"]
    assert [stage.stage.init_from for stage in stages] == starts
    assert [stage.stage.init_weights for stage in stages][1:] == ["raw", "raw"]


@pytest.mark.parametrize(
    ("words", "walk"),
    [([], range(3)), (["curriculum.first=behaviour"], range(1, 3)), (["curriculum.last=physical"], range(1))],
)
def test_a_walk_can_begin_and_end_at_any_stage(words, walk):
    assert load_curriculum([DEMO, *words]).walk == walk


def test_a_run_without_a_list_is_one_stage(tmp_path):
    found = load_curriculum(["experiment=demo", f"run_dir={tmp_path}"])
    assert (found.names, found.walk, found.stages[0].run_dir) == ((), range(1), str(tmp_path))


def test_an_error_in_a_stage_names_it():
    with pytest.raises(UserError, match=r"curriculum stage behaviour: train\.accumulation=0 is outside"):
        load_curriculum([DEMO, 'curriculum.stages=[{name: behaviour, set: ["train.accumulation=0"]}]'])
    with pytest.raises(UserError, match=r"curriculum stage a: unknown key 'train\.stesp'"):
        load_curriculum([DEMO, 'curriculum.stages=[{name: a, set: ["train.stesp=1"]}]'])


@pytest.mark.parametrize(
    ("unit", "progress", "share", "total"),
    [
        ("steps", Progress(25, 1, 1), 0.25, 100),
        ("steps", Progress(99, 999, 999), 0.99, 100),
        ("steps", Progress(100, 1, 1), 1.0, 100),
        ("samples", Progress(10, 100, 1), 1.0, 10),
        ("samples", Progress(10, 25, 1), 0.25, 40),
        ("tokens", Progress(10, 1, 50), 0.5, 20),
        ("tokens", Progress(10, 1, 130), 1.0, 1000 / 130),
    ],
)
def test_a_budget_knows_its_share_and_the_steps_it_takes(unit, progress, share, total):
    budget = Budget.of(TrainConfig(**{"steps": None, unit: 100}), epoch=7)
    assert budget.share(progress) == share
    assert budget.total_steps(progress) == pytest.approx(total)
    assert budget.finished(progress) == (share == 1)


def test_epochs_are_samples_of_all_sources():
    assert Budget.of(TrainConfig(steps=None, epochs=3), epoch=70) == Budget("samples", 210)


def test_the_rate_falls_with_a_budget_of_samples_as_with_one_of_steps():
    optimizer = load_config(["experiment=demo"]).optimizer
    steps, samples = Budget("steps", 100), Budget("samples", 3200)
    done = [Progress(i, 32 * i, 0) for i in range(1, 100)]
    by_steps, by_samples = ([lr_at(p.steps, optimizer, b.total_steps(p)) for p in done] for b in (steps, samples))
    assert by_samples == pytest.approx(by_steps)
    assert samples.total_steps(Progress()) == math.inf
    assert lr_at(0, optimizer, math.inf) == optimizer.lr / optimizer.warmup_steps


def test_data_is_made_where_it_is_missing(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")  # nothing may be run
    prepare([f"data simulate --out {tmp_path}/there"])
    monkeypatch.undo()
    with pytest.raises(UserError, match="has no --out DIR"):
        prepare(["data simulate"])
    line = f"data pack {tmp_path}/nothing --out {tmp_path}/out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="is still to be done; run `kairos-train data prepare`"):
        prepare([line])
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match="ended with exit code 2"):
        prepare([line])
