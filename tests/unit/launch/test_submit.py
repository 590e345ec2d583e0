"""`kairos-train submit`: what it refuses before anything is submitted, and the jobs that it makes of a command."""

import json
import re
from dataclasses import replace

import pytest
from support.toy_shards import write_folder

from kairos_train.basics.errors import UserError
from kairos_train.cli import main
from kairos_train.config.compose import load_config
from kairos_train.config.operation_schema import ClusterConfig
from kairos_train.launch import submit
from kairos_train.launch.script import SlurmJob

DEMO = ["experiment=demo", "data.shards=shards", "data.validation_shards=null"]


def write_shards(folder, **index):
    """Shards that the demo could train on, as far as is looked at before it starts."""
    sizes = {"window": load_config(DEMO).data.window, "action_dim": 4, "state_dim": 4}
    write_folder(folder, [2], **(sizes | index))
    fields = {f"global_{name}": [value] * 4 for name, value in {"min": -1.0, "max": 1.0}.items()}
    statistics = {"action": {"action": fields}, "state": {"observation.state": fields}}
    (folder / "dataset_stats.json").write_text(json.dumps(statistics))


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """The settings of a demo whose shards are there, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "shards")
    return DEMO


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.stesp=3"], "unknown key 'train.stesp'"),
        (["cluster=h2000"], "cluster=h2000 is unknown"),
        (["data.shards=nowhere"], "nowhere: no packed shards are there"),
        (["parallel.context=3", "--nodes", "2"], "2 × cluster.gpus_per_node=8 = 16 processes .* = 3; use --nodes 3"),
        (["parallel.context=16", "--nodes", "3"], "use --nodes 2, 4, or lower one"),
        (["--chain"], "--chain: this experiment is one stage"),
        (["--gpus", "1"], "--gpus means nothing for --job train"),
        (["cluster.time_limit=0:04:00"], "cluster.time_limit=0:04:00 is no longer than cluster.signal_seconds=300"),
        (["--job", "pack"], "--job pack needs --sources FILE"),
        (
            ["--job", "pack", "--sources", "none", "--out", "x", "data.window.cameras=[]"],
            "--sources none: no such file",
        ),
        (["--job", "export"], "--job export needs --arguments"),
        (["--job", "export", "--arguments", "runs/x"], "the following arguments are required: --out"),
        (["--job", "export", "--arguments", "runs/x --out y --bets"], "has no '--bets'"),
        (
            ["--job", "export", "--arguments", "runs/x --out 'y"],
            r"--arguments: .* cannot be split into words \(No closing quotation\)",
        ),
        (['prepare=["data pack \'x --out y"]'], r"prepare: .* cannot be split into words \(No closing quotation\)"),
        (["--job", "evaluate", "--arguments", "x --input y --out z", "--gpus", "9"], "--gpus 9 is above"),
        (
            ["--job", "evaluate", "--arguments", "x --input y --out z", "--chain"],
            "--chain means nothing for --job eval",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_submitted(shards, capsys, tmp_path, words, message):
    assert main(["submit", *shards, *words]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"window": replace(load_config(DEMO).data.window, height=96)}, "data.window.height=128: shards was packed"),
        ({"action_dim": 3}, "model.action.action_dim=4: shards holds 3"),
        ({"statistics_sha256": "0"}, "is not the file that these shards were packed with"),
        ({"encoders": {"video": {"kind": "wan"}, "text": {"kind": "qwen"}}}, "encoders.video.kind=block_dct: the shar"),
        (lambda folder: (folder / "shard-000000.tar").write_bytes(b""), "shard-000000.tar: has 0 bytes"),
        (lambda folder: (folder / "dataset_stats.json").unlink(), "dataset_stats.json: does not exist"),
        (lambda folder: (folder / "index.json").write_text("{}"), "format None is not"),
    ],
)
def test_what_training_would_refuse_is_refused_before(tmp_path, monkeypatch, capsys, damage, message):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "shards", **(damage if isinstance(damage, dict) else {}))
    if callable(damage):
        damage(tmp_path / "shards")
    errors = []
    for command in ("submit", "train"):
        assert main([command, *DEMO, "train.device=cpu"]) == 2
        errors.append(capsys.readouterr().err)
    assert message in errors[0]
    assert errors[0] == errors[1], "in the same words"
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_that_must_not_hold_a_run_is_refused_before(shards, tmp_path, capsys):
    (tmp_path / "runs/x/checkpoints/step-00000001").mkdir(parents=True)
    assert main(["submit", *shards, "run_dir=runs/x", "train.resume=never", "--print"]) == 2
    assert "train.resume=never: run_dir=runs/x holds checkpoints" in capsys.readouterr().err
    assert main(["submit", *shards, "run_dir=runs/y", "train.resume=must", "--print"]) == 2
    assert "train.resume=must: no checkpoint in" in capsys.readouterr().err


def test_the_home_folder_is_meant_in_the_script_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "shards")
    words = ["experiment=demo", "data.shards=~/shards", "data.validation_shards=null", "cluster.jobs_dir=~/jobs"]
    assert main(["submit", "--print", *words, "cluster.venv=~/env"]) == 0
    script = capsys.readouterr().out
    assert f"#SBATCH --output={tmp_path}/jobs/" in script
    assert f"{tmp_path}/env/bin/python" in script
    assert "data.shards=~/shards" in script, "the job's own composition reads it in the same way"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no source"),
        ("a\nb/a\n", "two sources would be packed into out/a"),
        ("https://h/a.tar?sig=SECRET\nhttps://u:SECRET@h/b/a.tar\n", "two sources would be packed into out/a;"),
        ("gone\n", "gone does not exist"),
    ],
)
def test_a_list_of_sources_that_cannot_be_packed_is_refused(shards, capsys, tmp_path, lines, message):
    for folder in ("a", "b/a"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "list").write_text(lines)
    assert main(["submit", "--job", "pack", "--sources", "list", "--out", "out", *shards]) == 2
    assert message in capsys.readouterr().err


def test_prepared_data_that_is_missing_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "experiment=curriculum_demo"]) == 2
    assert "is still to be made; run `kairos-train data prepare`" in capsys.readouterr().err


def test_without_slurm_the_script_can_still_be_seen(shards, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", *shards]) == 2
    assert "sbatch is not found" in capsys.readouterr().err
    assert main(["submit", *shards, "--print", "--nodes", "2"]) == 0
    assert "\n#SBATCH --nodes=2\n" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_a_refusal_of_slurm_is_one_line_and_leaves_nothing(shards, tmp_path):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    job = SlurmJob("export", "x", 1, 0, 1, {"words": "runs/x --out policy"})
    with pytest.raises(UserError, match="Slurm refuses the job x: sbatch: error: invalid partition") as error:
        submit.submit(
            job,
            replace(ClusterConfig(), jobs_dir="jobs"),
            tmp_path / "jobs/x",
            workdir=tmp_path,
            python="python3",
            sbatch=str(tmp_path / "sbatch"),
        )
    assert "\n" not in str(error.value)
    assert list((tmp_path / "jobs").iterdir()) == []


def test_the_jobs_of_a_chain_walk_one_stage_each(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["experiment=curriculum_demo", "--chain", "--after", "5", "--print", "curriculum.last=behaviour"]
    assert main(["submit", *words]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^# after (.*) has ended well$", said, re.M) == ["5", "job curriculum_demo-physical"]
    launches = re.findall(r"launch --logs .* (experiment.*)$", said, re.M)
    assert launches == [
        f"experiment=curriculum_demo curriculum.first={name} curriculum.last={name}"
        for name in ("physical", "behaviour")
    ]


def test_folders_of_jobs_have_names_of_their_own(tmp_path):
    first = submit.new_job_dir(ClusterConfig(), "x", workdir=tmp_path)
    first.mkdir(parents=True)
    assert submit.new_job_dir(ClusterConfig(), "x", workdir=tmp_path) != first
    assert first.parent == tmp_path / "runs/jobs"
