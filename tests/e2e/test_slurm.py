"""Jobs in a real Slurm on this machine, by `kairos-train submit`: two nodes, signal, requeue, chain, array."""

import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.commands import TINY, command, losses, train_overrides
from support.slurm_cluster import SlurmCluster, missing

from kairos_train.config.operation_schema import ClusterConfig
from kairos_train.launch.script import SlurmJob
from kairos_train.launch.submit import submit as send

pytestmark = [
    pytest.mark.waits,
    pytest.mark.skipif(missing() is not None, reason=f"no Slurm of our own here: {missing()}"),
]

STEPS = 16
CHAIN = """# @package _global_
defaults:
  - demo_push2d
  - _self_

experiment: two
curriculum:
  stages:
    - {name: first, set: [train.steps=2]}
    - {name: second, set: [train.steps=3]}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short path: sockets have short names
    try:
        with SlurmCluster(folder, nodes=2) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def site(tmp_path) -> list[str]:
    """What the settings of this cluster are: nodes of one process without GPUs."""
    return [
        *("cluster.gpus_per_node=1", "cluster.cpus_per_gpu=1", "cluster.time_limit=1:00:00", "cluster.max_restarts=3"),
        *("cluster.healthcheck=false", f"cluster.jobs_dir={tmp_path}/jobs", f"cluster.scratch={tmp_path}/scratch"),
        *("train.device=cpu", "data.workers=0", "train.validate_every=0", "train.sample_every=0"),
    ]


def submit(cluster: SlurmCluster, *words: object) -> list[tuple[str, Path]]:
    """Number and folder of each job."""
    jobs = json.loads(cluster.run(*command("submit", *words)))["jobs"]
    return [(str(job["job"]), Path(job["folder"])) for job in jobs]


def ended(cluster: SlurmCluster, job: str, job_dir: Path, *, state: str = "COMPLETED") -> dict[str, str]:
    """What Slurm says of a job once it is over."""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
    cluster.wait(f"the end of job {job}", lambda: cluster.job(job)["JobState"] in over, seconds=240)
    found = cluster.job(job)
    assert found["JobState"] == state, said(job_dir)
    return found


def said(job_dir: Path) -> str:
    """The ends of all logs of a job."""
    logs = sorted((job_dir / "logs").rglob("*"))
    return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in logs if path.is_file())


def events(run_dir: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_a_job_on_two_nodes_is_requeued_on_a_signal_and_finished_by_its_second_life(cluster, site, shards, tmp_path):
    run_dir = tmp_path / "run"
    # Slow in its first life only, so that the signal comes in time.
    slow = f"faults.inject=[{{kind: slow, step: 4, steps: {STEPS}, seconds: 0.5, life: 1}}]"
    settings = train_overrides(shards, run_dir, f"train.steps={STEPS}", "train.checkpoint_every=1000", slow)
    ((job, job_dir),) = submit(cluster, *settings, *site, "--nodes", 2)
    cluster.wait("four steps", lambda: (run_dir / "losses.jsonl").is_file() and len(losses(run_dir)) >= 4)
    (first,) = events(run_dir, "start")
    deadline = yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["deadline"]
    limit = re.search(r"EndTime=(\S+)", cluster.run("scontrol", "show", "job", job))[1]
    assert deadline == limit
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # to the script, which passes it on to the ranks
    final = ended(cluster, job, job_dir)

    assert final["Restarts"] == "1"
    assert [json.loads(line)["step"] for line in losses(run_dir)] == list(range(1, STEPS + 1))
    (interrupted, finished) = events(run_dir, "stop")
    assert (interrupted["outcome"], finished["outcome"]) == ("interrupted", "finished")
    assert 4 <= interrupted["step"] < STEPS
    lives = events(run_dir, "start")
    assert [life["world"] for life in lives] == [2, 2]
    assert {life["job"] for life in lives} == {job}
    assert lives[0] == first
    for life, code in ((0, "75"), (1, "0")):
        folder = job_dir / "logs" / f"{job}.{life}"
        assert [(folder / f"node-{n}").read_text().strip() for n in range(2)] == [code, code]
        assert {path.name for path in folder.glob("rank-*.out")} == {"rank-0000.out", "rank-0001.out"}
    log = (job_dir / "logs" / f"{job}.out").read_text()  # both lives: appended
    assert set(re.findall(r"n\d: train: node \d of 2.* life \d", log)) >= {
        f"n{n + 1}: train: node {n} of 2, 1 of 2 processes, life {life}" for n in range(2) for life in range(2)
    }
    assert re.findall(r", code (/\S+)\.\w{6}$", log, re.M) == [
        f"{tmp_path}/scratch/kairos-train-{job}-{life}-{n}" for life in range(2) for n in sorted_nodes(log, life)
    ]
    assert list((tmp_path / "scratch").iterdir()) == []


def sorted_nodes(log: str, life: int) -> list[int]:
    """Numbers of the nodes in the order in which they said so."""
    return [int(n) for n in re.findall(rf"train: node (\d) of 2.* life {life},", log)]


@pytest.mark.nightly
def test_a_chain_runs_each_stage_after_the_one_before(cluster, site, shards, tmp_path):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "two.yaml").write_text(CHAIN)
    settings = ["experiment=two", *train_overrides(shards, tmp_path / "run")[1:], *site]
    first, second = submit(cluster, *settings, "--config-dir", tmp_path / "own", "--chain")
    assert cluster.job(second[0])["Dependency"].startswith(f"afterok:{first[0]}")
    earlier, later = ended(cluster, *first), ended(cluster, *second)
    assert earlier["EndTime"] <= later["StartTime"]
    assert (earlier["JobName"], later["JobName"]) == ("two-first", "two-second")
    assert [len(losses(tmp_path / "run" / name)) for name in ("first", "second")] == [2, 3]
    saved = yaml.safe_load((tmp_path / "run" / "second" / "config.yaml").read_text())
    assert saved["stage"]["init_from"] == str(tmp_path / "run" / "first")


@pytest.mark.nightly
def test_an_array_packs_its_sources_and_repeats_a_task_that_was_killed(cluster, site, shards, tmp_path):
    names = ["a", "b", "c", "d"]
    for name in names:
        (tmp_path / "sources" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "sources" / name).symlink_to(shards / "dataset_unseen")
    (tmp_path / "list").write_text("# episodes\n" + "".join(f"{tmp_path}/sources/{name}\n" for name in names))
    words = ["--sources", tmp_path / "list", "--out", tmp_path / "packed", "--arguments", "--shard-samples 64"]
    ((job, job_dir),) = submit(cluster, "--job", "pack", *words, *TINY, *site)
    victim = cluster.wait("the third task", lambda: pid_of("pack", f"{tmp_path}/packed/c"))
    os.kill(victim, signal.SIGKILL)
    tasks = {name: ended(cluster, f"{job}_{i}", job_dir) for i, name in enumerate(names)}
    assert {name: task["Restarts"] for name, task in tasks.items()} == {"a": "0", "b": "0", "c": "1", "d": "0"}
    indices = [json.loads((tmp_path / "packed" / name / "index.json").read_text()) for name in names]
    assert len({index["samples"] for index in indices}) == 1
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == names  # no half-written folder beside them


def pid_of(*words: str) -> int | None:
    """The Python process that has these words in its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text().split("\0")
        except OSError:
            continue  # it has just ended
        if "python" in Path(line[0]).name and set(words) <= set(line):
            return int(path.parent.name)
    return None


FAKE = """#!/bin/bash
codes=({codes})
code=${{codes[${{SLURM_RESTART_COUNT:-0}}]}}
((code > 128)) && kill -$((code - 128)) $$
exit "$code"
"""


@pytest.mark.parametrize(
    ("codes", "state", "restarts"),
    [
        ("4 75 0", "COMPLETED", 2),
        ("137 0", "COMPLETED", 1),
        ("2", "FAILED", 0),
        ("4 3", "FAILED", 1),
        ("4 4 4", "FAILED", 2),  # no more than cluster.max_restarts
    ],
)
def test_exit_codes_decide_whether_a_job_goes_into_the_queue_again(cluster, tmp_path, codes, state, restarts):
    """With a program that only ends, in the place of Python. A second job waits for all lives of the first."""
    (tmp_path / "python").write_text(FAKE.format(codes=codes))
    (tmp_path / "fine").write_text(FAKE.format(codes="0"))
    for name in ("python", "fine"):
        (tmp_path / name).chmod(0o755)
    job = SlurmJob("export", "x", nodes=1, gpus=0, cpus=1, places={"words": ""})
    settings = ClusterConfig(max_restarts=2, scratch=str(tmp_path / "scratch"), time_limit=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        first = send(job, settings, tmp_path / "first", workdir=tmp_path, python=str(tmp_path / "python"))
        second = send(job, settings, tmp_path / "second", workdir=tmp_path, python=str(tmp_path / "fine"), after=first)
    final = ended(cluster, first, tmp_path / "first", state=state)
    assert final["Restarts"] == str(restarts)
    assert final["ExitCode"] == f"{codes.split()[restarts]}:0"
    ended(cluster, second, tmp_path / "second", state="COMPLETED" if state == "COMPLETED" else "CANCELLED")


@pytest.mark.nightly
def test_a_job_that_is_cancelled_saves_and_stays_cancelled(cluster, site, shards, tmp_path):
    run_dir = tmp_path / "run"
    slow = "faults.inject=[{kind: slow, step: 2, steps: 1000, seconds: 0.5, life: 1}]"
    settings = train_overrides(shards, run_dir, "train.steps=1000", "train.checkpoint_every=1000", slow)
    ((job, job_dir),) = submit(cluster, *settings, *site, "cluster.healthcheck=true")
    cluster.wait("two steps", lambda: (run_dir / "losses.jsonl").is_file() and len(losses(run_dir)) >= 2)
    cluster.run("scancel", job)
    cluster.wait("the job's end", lambda: not cluster.run("squeue", "--noheader", f"--job={job}", check=False).strip())
    assert cluster.job(job)["JobState"] == "CANCELLED", said(job_dir)
    assert "1 process(es) on 1 host(s): healthy" in (job_dir / "logs" / f"{job}.out").read_text()
    (end,) = events(run_dir, "stop")
    assert end["outcome"] == "interrupted"
    assert (run_dir / "checkpoints" / f"step-{end['step']:08d}").is_dir()
    time.sleep(2)
    assert cluster.job(job)["JobState"] == "CANCELLED"
