"""From a template in `slurm/` to a batch script: every `{{place}}` is filled, by values quoted for the shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kairos_train.basics.errors import UserError
from kairos_train.config.operation_schema import ClusterConfig

TEMPLATES = {"train": "train", "pack": "data_pack", "export": "export", "evaluate": "evaluate"}
"""Kind of job → its template, without `.sbatch`."""

FUNCTIONS = "functions.sh"
BESIDE = ("on_node.sh", "healthcheck.sh")
"""Scripts that lie beside the batch script of a job."""

_PLACE = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class SlurmJob:
    """One job to be submitted.

    Attributes:
        kind: train, pack, export or evaluate.
        name: of the job.
        nodes: machines.
        gpus: on each; 0: none.
        cpus: on each.
        places: what the template of this kind asks for beyond what all do, quoted for the shell.
        files: further files of the job's folder, by name.
    """

    kind: str
    name: str
    nodes: int
    gpus: int
    cpus: int
    places: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def render(job: SlurmJob, cluster: ClusterConfig, *, templates: Path, job_dir: Path, workdir: Path, python: str) -> str:
    """The batch script of a job.

    Args:
        templates: the folder `slurm/`.
        job_dir: absolute folder of the job's files, which all machines see.
        workdir: absolute folder in which relative paths are meant.
        python: interpreter of the virtual environment; in a container it is the image's.

    Raises:
        UserError: a path that cannot be written into a batch script's options.
    """
    places = {
        "options": "\n".join(f"#SBATCH {option}" for option in options(job, cluster, job_dir, workdir)),
        "job_dir": shlex.quote(str(job_dir)),
        "python": shlex.quote(interpreter(cluster, python)),
        "scratch": shlex.quote(cluster.scratch),
        "srun": shlex.join([*_tasks(job), *_step(job), *container(cluster, job_dir, workdir), *cluster.srun]),
        "srun_plain": shlex.join(_tasks(job)),
        "max_restarts": str(cluster.max_restarts),
        "signal_seconds": str(cluster.signal_seconds),
        "healthcheck": "true" if cluster.healthcheck else "false",
        **job.places,
    }
    functions = fill((templates / FUNCTIONS).read_text(), places).rstrip("\n")
    return fill((templates / f"{TEMPLATES[job.kind]}.sbatch").read_text(), {**places, "functions": functions})


def fill(template: str, places: Mapping[str, str]) -> str:
    """The template with a value in every place.

    Raises:
        KeyError: a place without a value.
    """
    return _PLACE.sub(lambda match: places[match[1]], template)


def options(job: SlurmJob, cluster: ClusterConfig, job_dir: Path, workdir: Path) -> list[str]:
    """The options of sbatch, without what only a template's own kind has."""
    log = "%A_%a" if job.kind == "pack" else "%j"
    for path in (job_dir, workdir):
        if re.search(r"[\s\"'\\%#]", str(path)):
            raise UserError(
                f"{path}: sbatch does not take a path with spaces, quotes, % or #; submit from another folder"
            )
        if cluster.container is not None and re.search("[,:]", str(path)):
            raise UserError(f"{path}: a container sees no folder with , or : in its name; submit from another folder")
    asked = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": job.cpus,
        "gpus-per-node": job.gpus if cluster.gpus_option == "gpus-per-node" and job.gpus else None,
        "gres": f"gpu:{job.gpus}" if cluster.gpus_option == "gres" and job.gpus else None,
        "mem-per-cpu": cluster.memory_per_cpu,
        "time": cluster.time_limit,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "chdir": workdir,
        "output": job_dir / "logs" / f"{log}.out",
        "open-mode": "append",
    }
    given = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    exclusive = ["--exclusive"] if cluster.exclusive and job.kind == "train" else []
    return [*given, "--requeue", *exclusive, *cluster.sbatch]


def interpreter(cluster: ClusterConfig, python: str) -> str:
    """What runs the project: the image's Python, that of `cluster.venv`, or the one that submits."""
    if cluster.container is not None:
        return "python3"
    return python if cluster.venv is None else str(Path(cluster.venv).absolute() / "bin" / "python")


def container(cluster: ClusterConfig, job_dir: Path, workdir: Path) -> list[str]:
    """pyxis' options of srun: the image, and the folders that it sees under their own names."""
    if cluster.container is None:
        return []
    own = dict.fromkeys(f"{path}:{path}" for path in (workdir, job_dir, cluster.scratch))
    return [
        f"--container-image={cluster.container}",
        f"--container-mounts={','.join([*own, *cluster.container_mounts])}",
        f"--container-workdir={workdir}",
        "--no-container-mount-home",
    ]


def _tasks(job: SlurmJob) -> Sequence[str]:
    return [f"--nodes={job.nodes}", f"--ntasks={job.nodes}", "--ntasks-per-node=1"]


def _step(job: SlurmJob) -> Sequence[str]:
    return [f"--cpus-per-task={job.cpus}", "--cpu-bind=none", "--kill-on-bad-exit=1"]
