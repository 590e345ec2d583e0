"""Is everything there that a run needs: GPUs, network, disk, versions, clocks. Looked at from all processes at once.

Each process looks at its own machine first and only notes what is wrong there; then all tell each other, so that every
one knows the whole report, and a process that does not come is named instead of waited for.

    device      the GPU is visible, unused by others, without memory errors, and multiplies rightly
    disk        the run directory has room and can be written, by one process of each host
    versions    the same on all hosts
    clock       within a few seconds of each other
    collective  an all-reduce of known numbers is right
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kairos_train.basics.errors import MachineFault, one_line
from kairos_train.operations.preflight.agreement import different_versions, versions
from kairos_train.operations.preflight.collective import Collective, clock_offsets, try_all_reduce
from kairos_train.operations.preflight.devices import Gpu, list_gpus
from kairos_train.operations.preflight.disk import DiskSpeed, existing_folder, free_bytes, measure_speed
from parallel.consensus import from_all

PATIENCE = 120.0  # seconds for processes to join, for their own checks, and for a collective
LEAST_FREE = 10**9  # bytes in the run directory's file system
LARGEST_OFFSET = 2.0  # seconds between clocks
DISK_BYTES = 2**28
REDUCED_BYTES = {"cuda": 2**28, "cpu": 2**24}
GB = 1e9


@dataclass
class RankHealth:
    """One process and its machine."""

    rank: int
    host: str
    device: str = "cpu"  # or cuda
    name: str = "CPU"
    used: int | None = None  # bytes of the GPU that were in use before this process came
    total: int | None = None
    free: int | None = None  # bytes of the disk
    speed: DiskSpeed | None = None
    versions: dict[str, str] = field(default_factory=dict)
    offset: float = 0.0  # of the clock, seconds
    collective: Collective | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)  # (check, what is wrong)


@dataclass(frozen=True)
class HealthReport:
    """What was found, the same on every process.

    Attributes:
        folder: whose disk was tried.
        ranks: by rank.
        failed: (check, where, what is wrong).
    """

    folder: str
    ranks: list[RankHealth]
    failed: list[tuple[str, str, str]]

    @property
    def ok(self) -> bool:
        return not self.failed

    @property
    def stuck(self) -> bool:
        """Whether a collective never came back somewhere."""
        return any(rank.collective is not None and rank.collective.stuck for rank in self.ranks)

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        failed = [dict(zip(("check", "where", "text"), failure)) for failure in self.failed]
        return {"ok": self.ok, "failed": failed, "dir": self.folder, "ranks": [asdict(rank) for rank in self.ranks]}

    def table(self) -> str:
        """For people."""
        head = ("rank", "host", "device", "in use", "disk free", "write", "read", "clock")
        rows = [head, *(_row(rank) for rank in self.ranks)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        first = self.ranks[0]
        lines += ["", f"disk        {self.folder}", f"collective  {_reduced(self.ranks)}"]
        lines.append(f"versions    {', '.join(f'{name} {value}' for name, value in first.versions.items())}")
        lines += [f"FAILED      {check}: {where}: {text}" for check, where, text in self.failed]
        hosts = len({rank.host for rank in self.ranks})
        verdict = "healthy" if self.ok else f"{len(self.failed)} check(s) failed"
        return "\n".join([*lines, f"{len(self.ranks)} process(es) on {hosts} host(s): {verdict}"])


def check_health(
    device: str, folder: Path, *, patience: float = PATIENCE, disk_bytes: int = DISK_BYTES
) -> HealthReport:
    """Look at everything. Collective over all processes of torchrun, or alone without it; joins them if need be.

    Args:
        device: "auto", "cpu" or "cuda"; "auto" takes the GPU where torch sees one.
        folder: the run directory; the nearest folder above it that is there is tried.
        patience: as PATIENCE.
        disk_bytes: written and read by one process of each host.

    Returns:
        The same report on every process.

    Raises:
        MachineFault: processes do not come or cannot talk to each other.
    """
    rank, size = _join(patience)
    me = RankHealth(rank, socket.gethostname())
    with _named(me):
        hosts = from_all(me.host, size)
    _look_at_device(me, device)
    _look_at_disk(me, folder, disk_bytes if hosts.index(me.host) == rank else 0)
    with _noted(me, "versions"):
        me.versions = versions()
    _await_all(me, hosts, patience)
    with _named(me):
        me.offset = clock_offsets(size)[rank]
        ready = from_all(None if _failed(me, "device") else me.device, size)
        group = None
        if set(ready) == {"cuda"}:
            # Talk goes by gloo, which works where GPUs do not. No layout: this group has all processes.
            group = dist.new_group(backend="nccl")
        if set(ready) in ({"cuda"}, {"cpu"}):
            _reduce(me, size, group, patience)
        ranks = from_all(me, size)
    return HealthReport(str(folder), ranks, find_failures(ranks))


def _join(patience: float) -> tuple[int, int]:
    """Rank and size of the world, by gloo."""
    if not dist.is_initialized():
        launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        alone = {} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        try:
            dist.init_process_group("gloo", timeout=timedelta(seconds=patience), **alone)
        except (RuntimeError, ValueError) as error:
            who = f"rank {os.environ.get('RANK', 0)} of {os.environ.get('WORLD_SIZE', 1)} on {socket.gethostname()}"
            raise MachineFault(
                f"{who}: the processes did not come together within {patience:g} s ({one_line(error)}); "
                "see that all were started and that MASTER_ADDR and MASTER_PORT can be reached"
            ) from None
    return dist.get_rank(), dist.get_world_size()


def _look_at_device(me: RankHealth, device: str) -> None:
    with _noted(me, "device"):
        gpus: list[Gpu] | MachineFault = []
        if device != "cpu":
            try:
                gpus = list_gpus()  # before torch touches any
            except MachineFault as error:
                gpus = error
        if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
            return
        me.device = "cuda"
        if not torch.cuda.is_available():
            me.name = "none"
            problem = "torch sees no GPU"
            if torch.version.cuda is None:
                problem += f", and this torch ({torch.__version__}) is built without CUDA"
            me.problems.append(("device", f"{problem}; install the driver and torch for its CUDA, or use --device cpu"))
            return
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(own)
        properties = torch.cuda.get_device_properties(own)
        me.name, me.total = properties.name, properties.total_memory
        if isinstance(gpus, MachineFault):
            raise gpus
        mine = [gpu for gpu in gpus if gpu.uuid.removeprefix("GPU-") == str(properties.uuid).removeprefix("GPU-")]
        for gpu in mine:  # none for a slice of a GPU (MIG), which nvidia-smi does not list so
            me.used = gpu.used
            me.problems += [("device", f"GPU {gpu.index}: {problem}") for problem in gpu.problems()]
        ones = torch.ones(1024, 1024, device=own)
        if not bool((ones @ ones == 1024).all()):
            me.problems.append(("device", f"{own} multiplies wrongly; drain the node"))


def _look_at_disk(me: RankHealth, folder: Path, nbytes: int) -> None:
    with _noted(me, "disk"):
        me.free = free_bytes(folder)
        if me.free < LEAST_FREE + nbytes:
            me.problems.append(("disk", f"{folder}: {me.free / GB:.2f} GB are free; make room"))
        elif nbytes:
            me.speed = measure_speed(existing_folder(folder), nbytes)


def _await_all(me: RankHealth, hosts: Sequence[str], patience: float) -> None:
    """Wait until all have looked at their own machines: a disk or a driver that hangs shows here.

    Raises:
        MachineFault: some did not come; named on rank 0.
    """
    try:
        dist.monitored_barrier(timeout=timedelta(seconds=patience), wait_all_ranks=True)
    except RuntimeError as error:
        late = re.search(r"Ranks? ([\d, ]+) failed", str(error))
        if me.rank > 0 or late is None:
            raise MachineFault(f"rank {me.rank} on {me.host}: not all processes came; see what rank 0 says") from None
        names = ", ".join(f"rank {rank} on {hosts[int(rank)]}" for rank in re.findall(r"\d+", late[1]))
        raise MachineFault(
            f"{names} did not finish looking at device and disk within {patience:g} s; look at that machine"
        ) from None


def _reduce(me: RankHealth, size: int, group: dist.ProcessGroup | None, patience: float) -> None:
    device = torch.device("cuda", torch.cuda.current_device()) if me.device == "cuda" else torch.device("cpu")
    with _noted(me, "collective"):
        settings = {"nbytes": REDUCED_BYTES[me.device], "rank": me.rank, "size": size, "group": group}
        me.collective = try_all_reduce(device, **settings, patience=patience)
        if me.collective.problem:
            me.problems.append(("collective", me.collective.problem))


def find_failures(ranks: Sequence[RankHealth]) -> list[tuple[str, str, str]]:
    """What is wrong, each once."""
    found = [(check, f"{rank.host} (rank {rank.rank})", text) for rank in ranks for check, text in rank.problems]
    hosts = [rank.host for rank in ranks]
    if all(rank.versions for rank in ranks) and (problem := different_versions([r.versions for r in ranks], hosts)):
        found.append(("versions", "all hosts", problem))
    if len(kinds := sorted({rank.device for rank in ranks})) > 1:
        where = ", ".join(sorted({rank.host for rank in ranks if rank.device == "cpu"}))
        found.append(("device", where, f"no GPU here, but elsewhere ({' and '.join(kinds)}); leave these hosts out"))
    seen = set()
    for rank in ranks:
        if abs(rank.offset) > LARGEST_OFFSET and rank.host not in seen:
            seen.add(rank.host)
            text = f"{abs(rank.offset):.1f} s {'ahead of' if rank.offset > 0 else 'behind'} {hosts[0]}"
            found.append(("clock", rank.host, f"{text}; start its time service (chrony, ntpd)"))
    return found


def _row(rank: RankHealth) -> tuple[str, ...]:
    used = "-" if rank.used is None or rank.total is None else f"{rank.used / GB:.1f} of {rank.total / GB:.0f} GB"
    speeds = ("-", "-") if rank.speed is None else (_rate(rank.speed.write), _rate(rank.speed.read))
    free = "-" if rank.free is None else f"{rank.free / GB:.1f} GB"
    return str(rank.rank), rank.host, rank.name, used, free, *speeds, f"{rank.offset:+.3f} s"


def _reduced(ranks: Sequence[RankHealth]) -> str:
    """The slowest rank's all-reduce."""
    tried = [rank.collective for rank in ranks if rank.collective is not None]
    if len(tried) < len(ranks):
        return "not tried, not every process has its device"
    rates = [collective.rate for collective in tried if collective.rate is not None]
    backend = "nccl" if ranks[0].device == "cuda" else "gloo"
    what = f"all-reduce of {tried[0].nbytes / 2**20:.0f} MiB by {backend} over {len(ranks)} process(es)"
    if any(collective.problem for collective in tried):
        return f"{what}: failed"
    return f"{what}: right" + (f", {_rate(min(rates))}" if rates else "")


def _rate(value: float) -> str:
    return f"{value / GB:.2f} GB/s"


def _failed(me: RankHealth, check: str) -> bool:
    return any(name == check for name, _ in me.problems)


@contextlib.contextmanager
def _noted(me: RankHealth, check: str) -> Iterator[None]:
    """Keep what goes wrong as a problem: a process that left would let the others wait."""
    try:
        yield
    except Exception as error:
        me.problems.append((check, one_line(error)))


@contextlib.contextmanager
def _named(me: RankHealth) -> Iterator[None]:
    """A failure of the talk itself, with the name of who saw it."""
    try:
        yield
    except RuntimeError as error:
        raise MachineFault(
            f"rank {me.rank} on {me.host}: the processes cannot talk to each other ({one_line(error)}); one of them "
            "may have died, or the network between the hosts fails"
        ) from None
