"""The folder of a job, and its submission.

JOBS_DIR/NAME-TIME/  job.sbatch       what Slurm runs
                     on_node.sh       what runs on each node; healthcheck.sh
                     code.tar.gz      the project as it was at submission: every life of the job runs this
                     logs/JOB.out     what the job says
                     logs/JOB.LIFE/   rank-N.out, rank-N.err, node-N (exit code)
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import kairos_train
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import new_folder, replacing
from kairos_train.config.operation_schema import ClusterConfig
from kairos_train.config.schema import Config
from kairos_train.launch.script import BESIDE, SlurmJob, render

CODE = ("kairos_train", "parallel", "dataloaders", "evaluation", "configs")
SCRIPT = "job.sbatch"


def project() -> Path:
    """The folder of the project's packages and of `slurm/`.

    Raises:
        UserError: the project was installed without its checkout.
    """
    root = Path(kairos_train.__file__).resolve().parents[1]
    if not (root / "slurm").is_dir():
        raise UserError(f"{root} has no slurm/: submit from an editable install of the checkout (pip install -e)")
    return root


def check_world(config: Config, nodes: int) -> None:
    """Raise UserError when the processes of a job do not divide into the layout."""
    processes, d = config.cluster.gpus_per_node, config.parallel
    model = d.tensor * d.context
    if (nodes * processes) % model:
        fits = [n for n in range(1, nodes + model + 1) if n * processes % model == 0]
        near = ", ".join(str(n) for n in ([n for n in fits if n < nodes][-1:] + [n for n in fits if n > nodes][:1]))
        raise UserError(
            f"--nodes {nodes} × cluster.gpus_per_node={processes} = {nodes * processes} processes do not divide into "
            f"parallel.tensor={d.tensor} × parallel.context={d.context} = {model}; use --nodes {near}, or lower one"
        )


def new_job_dir(cluster: ClusterConfig, name: str, *, workdir: Path) -> Path:
    """A name for a job's folder that is not taken; nothing is made."""
    stem = (workdir / cluster.jobs_dir / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    number, path = 1, stem
    while path.exists():
        number += 1
        path = stem.with_name(f"{stem.name}-{number}")
    return path


def script_of(job: SlurmJob, cluster: ClusterConfig, job_dir: Path, *, workdir: Path, python: str) -> str:
    """The batch script of a job in its folder."""
    return render(job, cluster, templates=project() / "slurm", job_dir=job_dir, workdir=workdir, python=python)


def submit(
    job: SlurmJob,
    cluster: ClusterConfig,
    job_dir: Path,
    *,
    workdir: Path,
    python: str,
    after: str | None = None,
    sbatch: str = "sbatch",
) -> str:
    """Make the folder and hand the script to Slurm; returns the job's number.

    Args:
        after: number of a job that must have ended well before this one starts.
        sbatch: the program.

    Raises:
        UserError: there is no `sbatch` here, or it refuses the job. The folder is removed again.
    """
    if shutil.which(sbatch) is None:
        raise UserError(f"{sbatch} is not found; submit where Slurm is installed, or look at the script with --print")
    script = script_of(job, cluster, job_dir, workdir=workdir, python=python)
    with new_folder(job_dir) as building:
        (building / "logs").mkdir()
        for name in BESIDE:
            shutil.copy(project() / "slurm" / name, building / name)
        for name, text in job.files.items():
            (building / name).write_text(text, encoding="utf-8")
        (building / SCRIPT).write_text(script, encoding="utf-8")
        pack_code(building / "code.tar.gz")
    dependency = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after is not None else []
    command = [sbatch, "--parsable", *dependency, str(job_dir / SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(job_dir)
        why = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"Slurm refuses the job {job.name}: {why}; fix the cluster section, or add cluster.sbatch=[…]")
    return done.stdout.strip().split(";")[0]


def pack_code(path: Path) -> None:
    """Write the project's packages as a tar; the file appears complete or not at all."""
    with replacing(path) as temporary, tarfile.open(temporary, "w:gz", compresslevel=6) as tar:
        for name in CODE:
            tar.add(project() / name, arcname=name, filter=_source_only)


def _source_only(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Without compiled files; owned by the user who unpacks it."""
    if member.name.rsplit("/", 1)[-1] == "__pycache__":
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member
