"""Which process is slower than the others at its own work. Waiting for others is nobody's own work.

All ranks of a step take equally long: the fast ones wait in collectives for the slow. What tells them apart is how long
each was busy, its step without its time in collectives (`CollectiveTimes.busy`).
"""

from __future__ import annotations

import socket
import statistics
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.consensus import from_all
from parallel.topology import Topology


@dataclass(frozen=True)
class Straggler:
    """A process that was busy for much longer than most.

    Attributes:
        factor: its busy seconds over the median.
    """

    rank: int
    host: str
    factor: float

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} is busy {self.factor:.1f} times as long as the median rank"


@dataclass(frozen=True)
class Comparison:
    """Busy times of all ranks in one step, equal on all ranks.

    Attributes:
        seconds: by rank.
        median: of them; of an even number the lower of the two in the middle, so that of two ranks one can be slow.
        stragglers: the slowest first.
    """

    seconds: tuple[float, ...]
    median: float
    stragglers: tuple[Straggler, ...]

    def values(self) -> dict[str, float]:
        """For metrics."""
        return {"time/busy_max": max(self.seconds), "time/busy_median": self.median}


class BusyTimes:
    """Compares busy times over the ranks. Making one is collective.

    Args:
        factor: a rank that is busy for longer than this times the median is a straggler.
    """

    def __init__(self, topology: Topology, *, factor: float) -> None:
        self._topology, self._factor = topology, factor
        self._hosts = from_all(socket.gethostname(), topology.size)

    def compare(self, busy: float) -> Comparison:
        """Collective.

        Args:
            busy: seconds of this rank.
        """
        seconds = torch.zeros(self._topology.size, dtype=torch.float64, device=self._topology.device)
        seconds[self._topology.rank] = busy
        if self._topology.size > 1:
            dist.all_reduce(seconds)
        return self.judge(seconds.tolist())

    def judge(self, seconds: list[float]) -> Comparison:
        """Find the stragglers among busy seconds by rank."""
        median = statistics.median_low(seconds)
        slow = [
            Straggler(rank, self._hosts[rank], own / median)
            for rank, own in enumerate(seconds)
            if median > 0 and own > self._factor * median
        ]
        slow.sort(key=lambda straggler: -straggler.factor)
        return Comparison(tuple(seconds), median, tuple(slow))
