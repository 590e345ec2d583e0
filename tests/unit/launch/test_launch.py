"""What a job is given: the launch derived from Slurm's variables, scripts; signals and exit codes."""

import os
import re
import shutil
import signal
import subprocess
import tarfile
from datetime import datetime
from pathlib import Path

import pytest

from kairos_train.basics.errors import Interrupted, UserError
from kairos_train.config.compose import load_config
from kairos_train.config.operation_schema import ClusterConfig
from kairos_train.launch import submit
from kairos_train.launch.environment import derive
from kairos_train.launch.node import Forwarder, listens
from kairos_train.launch.outcome import Ended, exit_code
from kairos_train.launch.script import TEMPLATES, SlurmJob, fill, render

ROOT = Path(__file__).resolve().parents[3]
TWO_NODES = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
    "SLURMD_NODENAME": "gpu08",
    "SLURM_CPUS_PER_TASK": "64",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_JOB_END_TIME": "1800000000",
    "SLURM_RESTART_COUNT": "3",
}
ONE_NODE = {  # as sbatch sets them, without a step of srun's own
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "laptop",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURMD_NODENAME": "laptop",
    "SLURM_NTASKS": "1",
    "SLURM_NODEID": "0",
    "SLURM_CPUS_ON_NODE": "6",
}


# --- the environment ---


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Slurm's program, with the least that it needs to be configured."""
    if shutil.which("scontrol") is None:
        pytest.skip("Slurm is not installed")
    (tmp_path / "slurm.conf").write_text("ClusterName=a\nSlurmctldHost=localhost\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("gpu[07-11,3],r[1-2]n[01-02],login", "gpu07"), ("r[3,1]n[02-04]", "r3n02"), ("b,a", "b")],
)
def test_slurm_says_which_node_is_the_first(scontrol, hosts, first):
    assert derive(TWO_NODES | {"SLURM_STEP_NODELIST": hosts}, ClusterConfig()).head == first


def test_a_node_list_that_slurm_cannot_read_is_one_line_with_a_remedy(scontrol):
    with pytest.raises(UserError, match=r"hostnames gpu\[x\]` .*\(.*Invalid hostlist.*\); name it by --head"):
        derive(TWO_NODES | {"SLURM_STEP_NODELIST": "gpu[x]"}, ClusterConfig())


def test_a_container_without_slurm_needs_the_head(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"`scontrol show hostnames gpu\[07-08\]` .*No such file.* by --head"):
        derive(TWO_NODES, ClusterConfig())
    assert derive(TWO_NODES, ClusterConfig(), head="gpu07").head == "gpu07"


def test_everything_is_derived_from_the_variables_of_a_task():
    cluster = ClusterConfig(environment={"NCCL_DEBUG": "WARN"})
    node = derive(TWO_NODES, cluster, head="gpu07")
    assert (node.job, node.life, node.nodes, node.node, node.name) == (12345, 3, 2, 1, "gpu08")
    assert (node.head, node.port, node.processes, node.world) == ("gpu07", 20345, 8, 16)
    assert datetime.fromisoformat(node.deadline).timestamp() == 1800000000
    assert node.variables == {"OMP_NUM_THREADS": "8", "NCCL_DEBUG": "WARN"}
    rendezvous = node.rendezvous
    assert (rendezvous["rdzv_backend"], rendezvous["rdzv_endpoint"]) == ("c10d", "gpu07:20345")
    assert (rendezvous["run_id"], rendezvous["rdzv_configs"]["is_host"]) == ("12345-3-train", False)
    assert (rendezvous["min_nodes"], rendezvous["max_nodes"], rendezvous["nproc_per_node"]) == (2, 2, 8)
    assert (
        derive({**TWO_NODES, "SLURM_NODEID": "0"}, cluster, head="gpu07").rendezvous["rdzv_configs"]["is_host"] is True
    )


def test_all_nodes_meet_at_one_place_and_lives_and_purposes_do_not():
    nodes = [derive({**TWO_NODES, "SLURM_NODEID": str(n)}, ClusterConfig(), head="gpu07") for n in range(2)]
    assert len({(n.rendezvous["rdzv_endpoint"], n.rendezvous["run_id"]) for n in nodes}) == 1
    later = derive({**TWO_NODES, "SLURM_RESTART_COUNT": "4"}, ClusterConfig(), head="gpu07")
    check = derive(TWO_NODES, ClusterConfig(), head="gpu07", purpose="check")
    assert len({n.rendezvous["run_id"] for n in (nodes[0], later, check)}) == 3


def test_one_node_without_limit_in_its_first_life():
    node = derive(ONE_NODE, ClusterConfig(gpus_per_node=4))
    assert (node.life, node.nodes, node.node, node.name, node.head) == (0, 1, 0, "laptop", "laptop")
    assert (node.deadline, node.overrides(None)) == (None, [])
    assert node.variables["OMP_NUM_THREADS"] == "1"


def test_the_head_may_be_named():
    assert derive(TWO_NODES, ClusterConfig(), head="10.0.0.7").rendezvous["rdzv_endpoint"] == "10.0.0.7:20345"


def test_a_cluster_decides_its_threads():
    assert derive(ONE_NODE, ClusterConfig(environment={"OMP_NUM_THREADS": "3"})).variables["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("given", "wanted"), [(None, "job"), ("2020-01-01T00:00:00", "given"), ("2100-01-01T00:00:00", "job")]
)
def test_the_earlier_deadline_counts_and_is_a_setting_that_composes(given, wanted):
    node = derive(TWO_NODES, ClusterConfig(), head="gpu07")
    config = load_config(["experiment=demo", *node.overrides(given)], sections=())
    assert config.train.deadline == {"job": node.deadline, "given": given}[wanted]


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        (TWO_NODES, "SLURM_JOB_ID"),
        (TWO_NODES, "SLURM_STEP_NODELIST"),
        (TWO_NODES, "SLURM_NODEID"),
        (TWO_NODES, "SLURM_STEP_NUM_NODES"),
        (TWO_NODES, "SLURM_STEP_NUM_TASKS"),
        (TWO_NODES, "SLURMD_NODENAME"),
        (TWO_NODES, "SLURM_CPUS_PER_TASK"),
        (ONE_NODE, "SLURM_JOB_NODELIST"),
        (ONE_NODE, "SLURM_JOB_NUM_NODES"),
        (ONE_NODE, "SLURM_NTASKS"),
    ],
)
def test_a_missing_variable_is_named(environment, missing):
    rest = {name: value for name, value in environment.items() if name != missing}
    with pytest.raises(UserError, match=rf"{missing}.* is not set; run this under srun"):
        derive(rest, ClusterConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_JOB_ID": "12_3"}, "SLURM_JOB_ID=12_3 is no number"),
        ({"SLURM_STEP_NUM_TASKS": "16"}, "SLURM_STEP_NUM_TASKS=16 on 2 nodes; start one task per node"),
        ({"SLURM_NODEID": "2"}, "SLURM_NODEID=2 is not below the 2 nodes"),
        ({"SLURM_GPUS_ON_NODE": "4"}, "SLURM_GPUS_ON_NODE=4 is less than cluster.gpus_per_node=8"),
        ({"SLURM_JOB_END_TIME": "N/A"}, "SLURM_JOB_END_TIME=N/A is not in seconds"),
    ],
)
def test_variables_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        derive(TWO_NODES | changes, ClusterConfig())


# --- exit codes and signals ---


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ([], 0),
        ([(75, 5), (75, 5)], 75),
        ([(75, 5), (-signal.SIGTERM, 5)], 75),
        ([(-signal.SIGTERM, 5), (-signal.SIGTERM, 5)], 75),
        ([(-signal.SIGKILL, 5), (4, 25), (4, 25)], 4),
        ([(-signal.SIGKILL, 5), (1, 5)], 4),
        ([(4, 5), (75, 5)], 4),
        ([(1, 5), (4, 25)], 1),
        ([(4, 5), (1, 25)], 4),
        ([(4, 5), (1, 5)], 1),
        ([(3, 5), (3, 5)], 3),
        ([(2, 5), (-signal.SIGTERM, 5)], 2),
    ],
)
def test_the_rank_that_ends_first_decides_the_exit_code(ends, code):
    assert exit_code({rank: Ended(*end) for rank, end in enumerate(ends)}) == code


WAITS = """
import signal, sys
print("here", flush=True)
sys.stdin.readline()
signal.signal(signal.SIGUSR1, lambda *_: print("asked", flush=True))
print("listens", flush=True)
sys.stdin.readline()
"""


def test_a_request_waits_until_each_rank_listens_and_reaches_it_once():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(["python3", "-c", WAITS], **pipes) for _ in range(2)]
    try:
        forwarder = Forwarder(lambda: [rank.pid for rank in ranks], size=2)
        for rank in ranks:
            assert rank.stdout.readline() == "here\n"
        assert not listens(ranks[0].pid, signal.SIGUSR1)
        forwarder.note(signal.SIGUSR1)
        forwarder.deliver()  # nobody listens, nobody dies
        for rank in ranks:
            rank.stdin.write("go on\n")
            rank.stdin.flush()
            assert rank.stdout.readline() == "listens\n"
            assert listens(rank.pid, signal.SIGUSR1)
            forwarder.deliver()
            assert rank.stdout.readline() == "asked\n"
            forwarder.deliver()
        for rank in ranks:
            assert rank.communicate("end\n")[0] == ""  # it was asked once
            assert rank.returncode == 0
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_a_job_that_is_asked_to_end_before_its_ranks_are_there_says_so():
    forwarder = Forwarder(list, size=2)
    forwarder.note(signal.SIGUSR1)
    forwarder.deliver()
    forwarder.note(signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM before the processes had started"):
        forwarder.deliver()


def test_a_job_that_is_asked_to_end_when_its_ranks_have_ended_goes_on_to_say_how():
    """As Slurm does when another node's task has ended, while torchrun's agent still tidies up."""
    ranks = [os.getpid()]
    forwarder = Forwarder(lambda: ranks, size=1)
    forwarder.deliver()
    ranks.clear()
    forwarder.note(signal.SIGTERM)
    forwarder.deliver()


def test_a_process_that_is_gone_does_not_listen():
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert not listens(gone.pid, signal.SIGUSR1)


# --- scripts ---

PLACES = {
    "train": {"overrides": "experiment=demo 'a b'"},
    "pack": {"array": "0-3", "words": "--encode"},
    "export": {"words": "runs/x --out policy"},
    "evaluate": {"words": "policy --input shards --out report"},
}


def script(kind: str, tmp_path: Path, cluster: ClusterConfig = ClusterConfig(), **job) -> str:  # noqa: B008
    settings = {"kind": kind, "name": "x", "nodes": 1, "gpus": 1, "cpus": 8, "places": PLACES[kind]} | job
    where = {"job_dir": tmp_path / "job", "workdir": tmp_path, "python": "/venv/bin/python"}
    return render(SlurmJob(**settings), cluster, templates=ROOT / "slurm", **where)


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("cluster", [ClusterConfig(), ClusterConfig(container="a#b:c", time_limit=None)])
def test_every_place_is_filled_and_the_shell_reads_it(kind, cluster, tmp_path):
    text = script(kind, tmp_path, cluster)
    assert "{{" not in text
    assert text.startswith("#!/usr/bin/env bash\n")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("kind", [*TEMPLATES, "on_node.sh", "healthcheck.sh"])
def test_shellcheck_finds_nothing(kind, tmp_path):
    text = script(kind, tmp_path) if kind in TEMPLATES else (ROOT / "slurm" / kind).read_text()
    # Expressions in single quotes are for the nodes' shells; constants come from rendering.
    command = ["shellcheck", "--shell=bash", "--exclude=SC2016,SC2034,SC2050,SC2078", "-"]
    found = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
    assert found.returncode == 0, found.stdout


def test_the_options_of_a_training_job(tmp_path):
    cluster = ClusterConfig(
        partition="gpu",
        account="lab",
        qos="long",
        memory_per_cpu="4G",
        exclusive=True,
        sbatch=["--constraint=h200"],
        srun=["--mpi=none"],
        scratch="/local",
        max_restarts=7,
    )
    text = script("train", tmp_path, cluster, nodes=4, gpus=8, cpus=64)
    options = re.findall(r"^#SBATCH (.*)$", text, re.M)
    assert options == [
        *("--job-name=x", "--nodes=4", "--ntasks-per-node=1", "--cpus-per-task=64", "--gpus-per-node=8"),
        *("--mem-per-cpu=4G", "--time=24:00:00", "--partition=gpu", "--account=lab", "--qos=long"),
        *(f"--chdir={tmp_path}", f"--output={tmp_path}/job/logs/%j.out", "--open-mode=append", "--requeue"),
        *("--exclusive", "--constraint=h200", "--signal=USR1@300"),
    ]
    assert "--nodes=4 --ntasks=4 --ntasks-per-node=1" in text
    assert "--kill-on-bad-exit=1 --mpi=none bash" in text
    assert 'on_node.sh" /local ' in text
    assert "< 7)" in text


def test_gpus_are_asked_for_as_the_site_wants():
    assert "--gres=gpu:1" in script("evaluate", Path("/w"), ClusterConfig(gpus_option="gres"))
    for text in (
        script("evaluate", Path("/w"), ClusterConfig(gpus_option="none")),
        script("export", Path("/w"), gpus=0),
    ):
        assert not re.search(r"--(gres|gpus)", text)


def test_a_container_sees_the_job_and_brings_its_python(tmp_path):
    cluster = ClusterConfig(container="/images/k.sqsh", container_mounts=["/data:/data:ro"], scratch="/local")
    text = script("train", tmp_path, cluster)
    assert "--container-image=/images/k.sqsh" in text
    assert (
        f"--container-mounts={tmp_path}:{tmp_path},{tmp_path}/job:{tmp_path}/job,/local:/local,/data:/data:ro" in text
    )
    assert "\npython=python3\n" in text
    assert "--container" not in script("train", tmp_path)
    assert "\npython=/shared/env/bin/python\n" in script("train", tmp_path, ClusterConfig(venv="/shared/env"))


def test_a_place_without_a_value_is_an_error():
    with pytest.raises(KeyError):
        fill("a {{b}} {{c}}", {"b": "1"})


def test_a_path_that_sbatch_does_not_take_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not take a path with spaces"):
        script("train", tmp_path / "my jobs")


def test_the_code_of_a_job_is_whole_and_without_compiled_files(tmp_path):
    submit.pack_code(tmp_path / "code.tar.gz")
    with tarfile.open(tmp_path / "code.tar.gz") as tar:
        names = tar.getnames()
    assert {"kairos_train/cli.py", "configs/config.yaml", "parallel/topology.py"} <= set(names)
    assert not [name for name in names if "__pycache__" in name]
    assert [path.name for path in tmp_path.iterdir()] == ["code.tar.gz"]
