"""A real Slurm on this machine: munge, a controller, and several nodes that are all this host.

with SlurmCluster(folder, nodes=2) as cluster:
    cluster.run("squeue")

The daemons end with the block, however it ends. They need root, as slurmd does.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={munge},cred_expire=60
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,bf_interval=1,sched_interval=1,sched_min_interval=100000
ReturnToService=2
JobRequeue=1
KillWait=20
MinJobAge=600
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=1000\n"


def missing() -> str | None:
    """Why no Slurm can be started here; None when it can."""
    if os.geteuid() != 0:
        return "a Slurm of its own needs root"
    gone = [name for name in PROGRAMS if shutil.which(name) is None]
    if gone:
        return f"{', '.join(gone)} not installed (Debian: apt install slurm-wlm munge)"
    return None


class SlurmCluster:
    """Nodes n1, n2, … of this host.

    Args:
        folder: empty; short, for it holds a socket.
    """

    def __init__(self, folder: Path, *, nodes: int = 2) -> None:
        self.folder = folder
        self.names = [f"n{i + 1}" for i in range(nodes)]
        self._daemons: list[subprocess.Popen] = []
        self._held: dict[str, float] = {}  # jobs that wait for their begin time, since when
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, *words: object, check: bool = True) -> str:
        """The output of a Slurm command."""
        done = subprocess.run(
            [str(word) for word in words], env=self.environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: object) -> dict[str, str]:
        """What Slurm says of a job, or of one task of an array (as 7_3)."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", number)))

    def wait(self, what: str, done: Callable[[], object], *, seconds: float = 240) -> object:
        """Wait until `done()` is true; its value. Jobs that wait for their begin time are let go meanwhile."""
        end = time.monotonic() + seconds
        while not (value := done()):
            if time.monotonic() > end:
                raise AssertionError(f"{what}: not within {seconds} s\n{self.report()}")
            self._release()
            time.sleep(0.3)
        return value

    def report(self) -> str:
        """Queue, and the ends of the logs, for a test that fails."""
        logs = [f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in self.folder.glob("*.log")]
        return "\n".join([self.run("squeue", check=False), *logs])

    def close(self) -> None:
        """End all jobs and all daemons."""
        if len(self._daemons) > 2:
            self.run("scancel", "--signal=KILL", "--full", "--user=root", check=False)
            self.run("scancel", "--user=root", check=False)
            with contextlib.suppress(AssertionError):
                self.wait("the end of all jobs", lambda: not self.run("squeue", "--noheader", check=False), seconds=30)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons = []

    def _release(self) -> None:
        """A job that was put into the queue again may not begin for a while; here it may after three seconds.

        No sooner: the nodes refuse a job whose new credential is not younger than the end of its last life.
        """
        lines = self.run("squeue", "--noheader", "--states=PENDING", "--format=%A %r", check=False).splitlines()
        held = [line.split()[0] for line in lines if line.endswith("BeginTime")]
        now = time.monotonic()
        self._held = {number: self._held.get(number, now) for number in held}
        for number, since in self._held.items():
            if now - since > 3:
                self.run("scontrol", "update", f"JobId={number}", "StartTime=now", check=False)

    def _start(self) -> None:
        host, folder = socket.gethostname().split(".")[0], self.folder
        for name in ("state", *(f"spool.{name}" for name in self.names)):
            (folder / name).mkdir(parents=True)
        self._start_munge(folder / "munge")
        ports = _free_ports(1 + len(self.names))
        nodes = [
            NODE.format(name=name, host=host, port=port, cpus=_cpus()) for name, port in zip(self.names, ports[1:])
        ]
        text = CONFIG.format(host=host, port=ports[0], folder=folder, munge=folder / "munge/socket")
        (folder / "slurm.conf").write_text("".join(nodes) + text)
        self._daemon("slurmctld", "-D", "-f", folder / "slurm.conf")
        for name in self.names:
            self._daemon("slurmd", "-D", "-N", name, "-f", folder / "slurm.conf")
        self.wait("all nodes idle", self._all_idle, seconds=60)

    def _start_munge(self, folder: Path) -> None:
        """A daemon of its own, so that one of the machine's is not in the way."""
        folder.mkdir(mode=0o755)
        key = folder / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        words = ["munged", "--foreground", f"--key-file={key}", f"--socket={folder}/socket"]
        words += [f"--pid-file={folder}/pid", f"--log-file={folder}/log", f"--seed-file={folder}/seed", "--force"]
        self._daemon(*words)
        end = time.monotonic() + 20
        while not (folder / "socket").exists():
            assert self._daemons[0].poll() is None, (self.folder / "munged.output").read_text()
            assert time.monotonic() < end, "munged has made no socket"
            time.sleep(0.05)

    def _daemon(self, *words: object) -> None:
        with (self.folder / f"{words[0]}.output").open("ab") as output:
            daemon = subprocess.Popen([str(word) for word in words], env=self.environment, stdout=output, stderr=output)
        self._daemons.append(daemon)

    def _all_idle(self) -> bool:
        for daemon in self._daemons:
            assert daemon.poll() is None, f"{daemon.args} ended\n{self.report()}"
        states = self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()
        return states == ["idle"] * len(self.names)


def _cpus() -> int:
    """What a node may say that it has."""
    said = subprocess.run(["slurmd", "-C"], capture_output=True, text=True, check=True).stdout
    return min(2, int(re.search(r"CPUs=(\d+)", said)[1]))


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
