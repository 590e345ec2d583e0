"""A node's launcher without Slurm: the variables of a job on this machine alone, and ranks that are small programs."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from support.commands import command, environment

pytestmark = pytest.mark.waits

JOB = {"SLURM_JOB_ID": "31000", "SLURM_JOB_NODELIST": "localhost", "SLURM_NODEID": "0", "SLURM_NTASKS": "1"}
JOB |= {"SLURM_CPUS_ON_NODE": "4", "SLURMD_NODENAME": "here", "SLURM_JOB_NUM_NODES": "1"}
LAUNCHER = """
import os, sys
from pathlib import Path
from kairos_train.config.operation_schema import ClusterConfig
from kairos_train.launch.environment import derive
from kairos_train.launch.node import run_node

node = derive(os.environ, ClusterConfig(gpus_per_node=2), head="localhost")
sys.exit(run_node(node, [sys.executable, "-c", sys.argv[2]], logs=Path(sys.argv[1])))
"""
RANK = """
import os, signal, sys, time
asked = []
signal.signal(signal.SIGUSR1, lambda *_: (asked.append(1), print("asked", flush=True), time.sleep(1), sys.exit(75)))
signal.signal(signal.SIGTERM, lambda *_: None if asked else sys.exit(4))  # torchrun's, when another rank has failed
print(os.getpid(), os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"], flush=True)
print("an error of rank", os.environ["RANK"], file=sys.stderr, flush=True)
time.sleep(60)
"""


@pytest.fixture
def launch(tmp_path):
    """`launch(rank, *changes)`: launchers of a job, one for each change of its variables, with two ranks each that are
    there; and their numbers."""
    started = []

    def run(rank, *changes):
        words = [sys.executable, "-c", LAUNCHER, str(tmp_path / "logs"), rank]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        for change in changes:
            started.append(subprocess.Popen(words, env={**environment(), **JOB, **change}, **pipes))
        logs = [tmp_path / "logs" / f"rank-{rank:04d}.out" for rank in range(2 * len(changes))]
        end = time.monotonic() + 120
        while not all(log.is_file() and log.read_text().endswith("\n") for log in logs):
            assert all(process.poll() is None for process in started)
            assert time.monotonic() < end
            time.sleep(0.1)
        return started, [int(log.read_text().split()[0]) for log in logs]

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def launched(launch):
    """A launcher with two ranks that are there, and their numbers."""
    (process,), ranks = launch(RANK, {})
    return process, ranks


def test_a_request_to_the_launcher_reaches_its_ranks_and_their_exit_code_is_its_own(launched, tmp_path):
    process, _ = launched
    os.kill(process.pid, signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75
    for rank in range(2):
        assert re.fullmatch(r"\d+ 2 2\nasked\n", (tmp_path / f"logs/rank-{rank:04d}.out").read_text())
        assert (tmp_path / f"logs/rank-{rank:04d}.err").read_text() == f"an error of rank {rank}\n"
    assert (tmp_path / "logs/node-0").read_text() == "75\n"
    assert "[rank 0] asked" in out  # rank 0 alone is shown
    assert "rank 1" not in out
    # The first rank to end has the other one sent SIGTERM, which may find it without its handler: at its own end.
    assert re.search(r"^here: rank [01]: (exit code 75|SIGTERM).*: exit code 75$", err, re.M)


def test_a_rank_that_is_killed_is_named_and_asks_for_another_start(launched, tmp_path):
    process, ranks = launched
    os.kill(ranks[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 4
    assert re.search(r"rank 1: SIGKILL.*: exit code 4$", err, re.M)
    assert (tmp_path / "logs/node-0").read_text() == "4\n"


def test_no_launcher_leaves_before_the_ranks_of_all_nodes_have_ended(launch, tmp_path):
    """Not even node 0's, which holds the rendezvous: the other agent would lose it, and Slurm end the other task."""
    slow = RANK.replace("time.sleep(1)", "time.sleep(4 * int(os.environ['SLURM_NODEID']))")
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2"}
    nodes = [{**job, "SLURM_NODEID": str(node), "SLURMD_NODENAME": f"n{node}"} for node in range(2)]
    launchers, ranks = launch(slow, *nodes)
    for pid in ranks:
        os.kill(pid, signal.SIGUSR1)
    ended = [launcher.communicate(timeout=60) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [75, 75], ended
    assert [(tmp_path / f"logs/node-{node}").read_text() for node in range(2)] == ["75\n", "75\n"]
    assert not any("not waiting any longer" in err for _, err in ended)


def test_the_health_check_runs_in_the_processes_of_the_job(tmp_path):
    settings = ["experiment=demo", "train.device=cpu", "cluster.gpus_per_node=2", f"run_dir={tmp_path}/run"]
    words = command("launch", "--check", "--head", "localhost", "--logs", tmp_path / "logs", *settings)
    done = subprocess.run(words, env={**environment(), **JOB}, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "here: healthcheck: node 0 of 1, 2 of 2 processes, life 0, until they are done" in done.stdout
    assert "2 process(es) on 1 host(s): healthy" in done.stdout


def test_outside_of_a_job_the_launcher_says_what_is_missing(tmp_path):
    done = subprocess.run(
        command("launch", "--logs", tmp_path, "experiment=demo"),
        env={key: value for key, value in environment().items() if not key.startswith("SLURM_")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("kairos-train: error: SLURM_STEP_NUM_NODES (or SLURM_JOB_NUM_NODES) is not set; run")
