"""Who takes part in a run: ranks, their machines and processes; what `/proc` says of a process on this machine."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
DEAD = "ZX"  # states: a zombie has ended, only its parent has not asked for its exit code yet
STOPPED = "Tt"
STATE_WORDS = {
    **dict.fromkeys(STOPPED, "its process is stopped"),
    "D": "its process waits for a disk or a device",
}


@dataclass(frozen=True)
class Member:
    """One rank.

    Attributes:
        rank: of the world.
        host: name of its machine.
        pid: of its process there.
        started: when that process started, in clock ticks since the machine did; 0 where there is no `/proc`. A process
            that has the pid, but not this time, is another one.
        space: machine and pid namespace. Processes with the same can see each other; "" where there is no `/proc`.
    """

    rank: int
    host: str
    pid: int
    started: int = 0
    space: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    def sees(self, other: Member) -> bool:
        """Whether `/proc` here shows the other's process."""
        return bool(self.space) and (self.host, self.space) == (other.host, other.space)


def this_member(rank: int, *, host: str | None = None) -> Member:
    """This process.

    Args:
        rank: of it.
        host: name of the machine; None: what it calls itself.
    """
    pid, host = os.getpid(), host or socket.gethostname()
    try:
        space = f"{(PROC / 'sys/kernel/random/boot_id').read_text().strip()} {os.readlink(PROC / 'self/ns/pid')}"
        return Member(rank, host, pid, int(_stat(pid)[19]), space)
    except OSError:
        return Member(rank, host, pid)


def process_state(member: Member) -> str | None:
    """The one letter of a process that `/proc` shows here; None: it has ended."""
    try:
        fields = _stat(member.pid)
    except OSError:
        return None
    return None if fields[0] in DEAD or int(fields[19]) != member.started else fields[0]


def _stat(pid: int) -> list[str]:
    """The fields of `/proc/PID/stat` from the third (state) on; the second may hold blanks and brackets itself."""
    return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
