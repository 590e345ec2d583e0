"""Whether processes add up numbers rightly, and how fast; whether their clocks agree."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.consensus import from_all

REPEATS = 5
ROUNDS = 5  # of comparing clocks
PERIOD = 7  # of the numbers that are added
LEVELS = 16  # different contributions; small, so that sums of many ranks are exact in float32


@dataclass(frozen=True)
class Collective:
    """An all-reduce of float32 numbers as one rank saw it.

    `rate` is what each rank sends in a ring, 2 (n - 1) / n of the bytes, over the median time; None for one process.
    """

    nbytes: int
    rate: float | None  # bytes per second
    problem: str | None = None
    stuck: bool = False  # it never came back, and this process should not wait for it at its end


def try_all_reduce(
    device: torch.device, *, nbytes: int, rank: int, size: int, group: dist.ProcessGroup | None, patience: float
) -> Collective:
    """All-reduce known numbers, look at every sum, then take the time. Collective over `group`.

    Args:
        device: where the numbers are.
        nbytes: of them.
        rank, size: of this process in the group.
        group: with the backend of the device; None: the default one.
        patience: seconds for the first one.

    Raises:
        RuntimeError: as the backend raises it.
    """
    elements = nbytes // 4
    pattern = torch.arange(elements, device=device).remainder_(PERIOD).float()
    content = pattern + rank % LEVELS
    work = dist.all_reduce(content, group=group, async_op=True)
    deadline = time.monotonic() + patience
    while not work.is_completed():
        if time.monotonic() > deadline:
            problem = f"an all-reduce over {size} processes did not end within {patience:g} s"
            return Collective(nbytes, None, problem, stuck=True)
        time.sleep(0.001)
    work.wait()  # raises what went wrong
    expected = pattern.mul_(size).add_(sum(other % LEVELS for other in range(size)))
    if wrong := int((content != expected).sum()):
        return Collective(nbytes, None, f"{wrong} of {elements} sums over {size} processes are wrong")
    if size == 1:
        return Collective(nbytes, None)
    seconds = []
    content.zero_()
    for _ in range(REPEATS):
        _synchronize(device)
        begin = time.perf_counter()
        dist.all_reduce(content, group=group)
        _synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return Collective(nbytes, 2 * (size - 1) / size * nbytes / statistics.median(seconds))


def clock_offsets(size: int) -> list[float]:
    """Seconds by which each rank's clock is ahead of rank 0's: the least of a few rounds. Collective.

    A rank that comes late to a round seems to be ahead, by milliseconds; clocks that are wrong are off by more.
    """
    least = [float("inf")] * size
    for _ in range(ROUNDS):
        times = from_all(time.time(), size)
        least = [min(old, now - times[0], key=abs) for old, now in zip(least, times)]
    return least


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
