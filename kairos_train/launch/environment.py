"""What a node's launcher must know, from the variables that Slurm gives to a task: the only place that reads them.

One task per node. Node 0 hosts the rendezvous; the agents of torchrun agree there on the ranks:

    rank = (place of the node in the rendezvous) · processes + local rank
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kairos_train.basics.errors import UserError, one_line
from kairos_train.config.operation_schema import ClusterConfig

FIRST_PORT, PORTS = 20000, 12000
"""Below those that Linux gives away by itself (32768 and up). Jobs that share a node have different ones."""

JOIN_SECONDS = 1800
"""How long nodes wait for each other: images are pulled in this time (ours)."""


@dataclass(frozen=True)
class NodeLaunch:
    """One node of a training job.

    Attributes:
        job: Slurm's number of the job.
        life: how often the job was put into the queue again.
        nodes: in all.
        node: number of this one, from 0.
        name: of this one.
        head: name or address of node 0.
        port: of the rendezvous on `head`.
        processes: on each node.
        purpose: of this step; each has a rendezvous of its own.
        deadline: local time in ISO format at which the job is killed; None: there is no limit.
        variables: what the processes find in their environment besides what is there.
    """

    job: int
    life: int
    nodes: int
    node: int
    name: str
    head: str
    port: int
    processes: int
    purpose: str
    deadline: str | None
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def world(self) -> int:
        """Processes of all nodes."""
        return self.nodes * self.processes

    @property
    def rendezvous(self) -> dict[str, Any]:
        """Arguments of torch's `LaunchConfig`: a c10d rendezvous of exactly these nodes, no restarts in place."""
        return {
            "min_nodes": self.nodes,
            "max_nodes": self.nodes,
            "nproc_per_node": self.processes,
            "run_id": f"{self.job}-{self.life}-{self.purpose}",
            "rdzv_backend": "c10d",
            "rdzv_endpoint": f"{self.head}:{self.port}",
            "rdzv_configs": {"is_host": self.node == 0, "timeout": JOIN_SECONDS, "join_timeout": JOIN_SECONDS},
            "max_restarts": 0,
        }

    def overrides(self, given: str | None) -> list[str]:
        """Settings that the job adds to those of the run.

        Args:
            given: `train.deadline` of the run; the earlier one counts.
        """
        deadlines = [text for text in (self.deadline, given) if text is not None]
        return [f"train.deadline='{min(deadlines, key=datetime.fromisoformat)}'"] if deadlines else []


def derive(
    slurm: Mapping[str, str], cluster: ClusterConfig, *, head: str | None = None, purpose: str = "train"
) -> NodeLaunch:
    """Everything, from the environment of one task of `srun`.

    Args:
        slurm: the environment.
        head: name or address of node 0; None: the first name of the job's node list, of which Slurm is asked.
        purpose: of this step.

    Raises:
        UserError: a variable is missing or cannot be read (named), or the step is not one task per node with the GPUs
            that `cluster.gpus_per_node` says; or `head` is not given where Slurm cannot be asked.
    """
    nodes, node = _number(slurm, "SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES"), _number(slurm, "SLURM_NODEID")
    tasks = _number(slurm, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if tasks != nodes:
        raise UserError(f"SLURM_STEP_NUM_TASKS={tasks} on {nodes} nodes; start one task per node: --ntasks-per-node=1")
    if node >= nodes:
        raise UserError(f"SLURM_NODEID={node} is not below the {nodes} nodes of the step; run this under srun")
    processes = cluster.gpus_per_node
    if "SLURM_GPUS_ON_NODE" in slurm and _number(slurm, "SLURM_GPUS_ON_NODE") < processes:
        raise UserError(
            f"SLURM_GPUS_ON_NODE={slurm['SLURM_GPUS_ON_NODE']} is less than cluster.gpus_per_node={processes}; "
            "ask for as many GPUs, or lower it"
        )
    job = _number(slurm, "SLURM_JOB_ID")
    threads = max(1, _number(slurm, "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE") // processes)
    name, hosts = _text(slurm, "SLURMD_NODENAME"), _text(slurm, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    return NodeLaunch(
        job=job,
        life=_number({"SLURM_RESTART_COUNT": "0", **slurm}, "SLURM_RESTART_COUNT"),
        nodes=nodes,
        node=node,
        name=name,
        port=FIRST_PORT + job % PORTS,
        processes=processes,
        purpose=purpose,
        deadline=_deadline(slurm.get("SLURM_JOB_END_TIME", "")),
        head=head or (name if nodes == 1 else _first_host(hosts)),
        variables={"OMP_NUM_THREADS": str(threads), **cluster.environment},
    )


def _first_host(hosts: str) -> str:
    """The first name of a list as Slurm shortens it, `gpu[07-08]`."""
    command = ["scontrol", "show", "hostnames", hosts]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if names := done.stdout.split():
            return names[0]
        why = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    except OSError as error:
        why = one_line(error)
    raise UserError(
        f"`{' '.join(command)}` does not say which node is the first ({why}); name it by --head, as in a container, "
        "where Slurm's programs are missing"
    )


def _text(slurm: Mapping[str, str], *names: str) -> str:
    """The value of the first of these variables that is there."""
    for name in names:
        if slurm.get(name):
            return slurm[name]
    raise UserError(f"{' (or '.join(names)}{')' * (len(names) - 1)} is not set; run this under srun in a Slurm job")


def _number(slurm: Mapping[str, str], *names: str) -> int:
    text = _text(slurm, *names)
    if not re.fullmatch(r"\d+", text):
        name = next(name for name in names if slurm.get(name))
        raise UserError(f"{name}={text} is no number; run this under srun in a Slurm job")
    return int(text)


def _deadline(end: str) -> str | None:
    """Local time of seconds since 1970; empty: no limit."""
    if not end:
        return None
    if not re.fullmatch(r"\d+", end):
        raise UserError(f"SLURM_JOB_END_TIME={end} is not in seconds since 1970; unset it, or fix it")
    return datetime.fromtimestamp(int(end)).isoformat(timespec="seconds")
