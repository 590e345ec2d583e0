"""Every text of the cluster's settings reaches Slurm and the node as it was given, or is refused in one line."""

import os
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from kairos_train.basics.errors import UserError
from kairos_train.config.compose import load_config
from kairos_train.config.operation_schema import ClusterConfig
from kairos_train.config.schema import Config
from kairos_train.config.validate import validate
from kairos_train.launch.script import SlurmJob, options, render

ROOT = Path(__file__).resolve().parents[3]
HINTS = get_type_hints(ClusterConfig)
KEYS = [field.name for field in fields(ClusterConfig) if "str" in str(HINTS[field.name])]
BROKEN = ["a\nb", "a\n#SBATCH --wrap=b", "a\rb", "a\tb", "a\0b", "a\u2028b", "a\udc80b", "a\n"]
ODD = [
    "a b",
    " a",
    "a  b ",
    "a'b",
    'a"b',
    "$(touch x)",
    "`touch x`",
    "a;b",
    "a#b",
    "a&b",
    "*",
    "~x",
    "a\\b",
    "é",
    "-x",
    "{{x}}",
]
SLURM = """#!/bin/bash
printf '%s\\0' "$@" > "$0.words"
"""


def as_value(key: str, text: str) -> Any:
    """A text in the place of the setting: as it is, behind an option, or as the value of a variable."""
    if HINTS[key] == dict[str, str]:
        return {"A": text}
    if HINTS[key] == list[str]:
        return [f"{text}:/b" if key == "container_mounts" else f"--comment={text}"]
    return text


def cluster_with(key: str, text: str) -> ClusterConfig:
    container = {"container": "image"} if key == "container_mounts" else {}
    return replace(ClusterConfig(healthcheck=False), **container, **{key: as_value(key, text)})


@pytest.fixture(scope="module")
def demo() -> Config:
    return load_config(["experiment=demo"], sections=())


@pytest.mark.parametrize("key", KEYS)
def test_a_text_of_several_lines_is_refused(demo, key):
    for text in BROKEN:
        with pytest.raises(UserError, match=rf"^cluster\.{key}") as error:
            validate(replace(demo, cluster=cluster_with(key, text)))
        assert "\n" not in str(error.value)


def is_accepted(config: Config) -> bool:
    try:
        validate(config)
    except UserError:
        return False
    return True


def arrived(key: str, given: Any, words: list[str], lines: list[str]) -> bool:
    """Whether a setting's value is among srun's words or the script's options."""
    if key == "scratch":
        return words[words.index("bash") + 2] == given
    if key == "venv":
        return words[words.index("-m") - 1] == f"{Path(given).absolute()}/bin/python"
    if key == "container":
        return f"--container-image={given}" in words
    if key == "container_mounts":
        return any(word.endswith(f",{given[0]}") for word in words)
    if key in ("srun", "sbatch"):
        return given[0] in {"srun": words, "sbatch": lines}[key]
    return any(line.endswith(f"={given}") for line in lines)


@pytest.mark.parametrize("key", sorted({*KEYS} - {"name", "environment", "gpus_option", "jobs_dir", "time_limit"}))
def test_a_text_that_is_accepted_arrives_as_it_is(demo, tmp_path, key):
    """The script is run by bash, with programs in the place of Slurm's that write down their words."""
    (tmp_path / "bin").mkdir()
    for name in ("srun", "scontrol", "squeue", "scancel", "timeout"):
        (tmp_path / "bin" / name).write_text(SLURM)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n"}
    job = SlurmJob("export", "x", nodes=1, gpus=1, cpus=1, places={"words": "a --out b"})
    clusters = [cluster_with(key, text) for text in ODD]
    for cluster in [cluster for cluster in clusters if is_accepted(replace(demo, cluster=cluster))]:
        where = {"job_dir": tmp_path / "job", "workdir": tmp_path, "python": "/venv/bin/python"}
        text = render(job, cluster, templates=ROOT / "slurm", **where)
        lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
        assert lines == options(job, cluster, tmp_path / "job", tmp_path)
        subprocess.run(["bash"], input=text, text=True, check=True, env=environment, cwd=tmp_path)
        words = (tmp_path / "bin/srun.words").read_bytes().decode().split("\0")[:-1]
        assert arrived(key, getattr(cluster, key), words, lines), words
    assert not (tmp_path / "x").exists()


def test_a_containers_folders_are_named_without_what_separates_mounts(demo, tmp_path):
    job = SlurmJob("export", "x", nodes=1, gpus=1, cpus=1, places={"words": "a"})
    for name in ("a,b", "a:b"):
        cluster = ClusterConfig(container="image")
        with pytest.raises(UserError, match="a container sees no folder with , or : in its name"):
            options(job, cluster, tmp_path / name / "job", tmp_path)
        assert options(job, ClusterConfig(), tmp_path / name / "job", tmp_path)
