"""The launcher of a node: torchrun's agent, and in front of it what torchrun does not do for a job.

- SIGUSR1, SIGUSR2, SIGTERM and SIGINT reach the ranks. torchrun dies of the first two, and kills its processes half a
  minute after the others, which may be before their checkpoint is written. Here the agent runs in a thread, where it
  handles no signals, and the main thread passes them on.
- The exit code is that of the ranks (`outcome`), which torchrun makes a 1.
- Each rank writes to files of its own, named by its number in the world.
- The launchers of all nodes leave together (`farewell`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kairos_train.basics.errors import Interrupted, MachineFault
from kairos_train.basics.files import write_whole
from kairos_train.basics.log import logger
from kairos_train.launch.environment import NodeLaunch
from kairos_train.launch.farewell import hold_store, leave_together
from kairos_train.launch.outcome import MACHINE_FAULT, Ended, describe, exit_code

FORWARDED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
PATIENT = (signal.SIGUSR1, signal.SIGUSR2)
"""Requests that wait until a rank listens: one that is still starting would die of them."""

POLL = 0.1  # seconds
LEAVE_SECONDS = 30.0
"""For the ranks of other nodes to end when this one's have: what Slurm gives a task that it asks to end (KillWait)."""


class Forwarder:
    """Passes signals on to the ranks: to each once, and a request only when it listens for it.

    Args:
        ranks: the process numbers of the ranks, fewer than `size` while they start.
        size: how many they will be.
    """

    def __init__(self, ranks: Callable[[], Sequence[int]], size: int) -> None:
        self._ranks, self._size = ranks, size
        self._came: list[int] = []
        self._waiting: dict[int, set[int]] = {}
        self._started = False

    def note(self, number: int, frame: Any = None) -> None:
        """A signal came; a handler."""
        self._came.append(number)

    def deliver(self) -> None:
        """Pass on what has come. Called again and again: it must have seen the ranks to know that they have ended.

        Raises:
            Interrupted: asked to end before there was a rank.
        """
        while self._came:
            self._waiting[self._came.pop(0)] = set()
        ranks = set(self._ranks())
        self._started = self._started or bool(ranks)
        for number, told in list(self._waiting.items()):
            if number not in PATIENT and not self._started:
                raise Interrupted(f"{signal.Signals(number).name} before the processes had started; start it again")
            for pid in ranks - told:
                if number in PATIENT and not listens(pid, number):
                    continue
                told.add(pid)
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, number)
            if len(told) >= self._size or number not in PATIENT:
                del self._waiting[number]


def listens(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def children() -> list[int]:
    """The processes that this one has started and that are still there."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            found += map(int, (task / "children").read_text().split())
    return found


def run_node(node: NodeLaunch, command: Sequence[str], *, logs: Path) -> int:
    """Run `command` in as many processes as the node has ranks, wait for all; returns the exit code.

    When one of them fails, the others are sent SIGTERM and have half a minute, torchrun's, to end.

    Must be called by the main thread, whose signal handlers it replaces. Sets `node.variables` in this process's
    environment, which the ranks inherit.

    Args:
        command: program and arguments of a rank.
        logs: folder of this life of the job: rank-N.out, rank-N.err, and node-N with the exit code.

    Raises:
        Interrupted: asked to end before the ranks had started.
        MachineFault: the nodes do not meet, or one of them is gone.
    """
    logs.mkdir(parents=True, exist_ok=True)
    os.environ.update(node.variables)
    result: dict[str, Any] = {}
    agent = threading.Thread(target=_run_agent, args=(node, command, logs, result), daemon=True)
    forwarder = Forwarder(children, node.processes)
    for number in FORWARDED:
        signal.signal(number, forwarder.note)
    agent.start()
    while agent.is_alive():
        forwarder.deliver()
        time.sleep(POLL)
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN)  # the end of another node's task must not take this one's exit code away
    ended: dict[int, Ended] = result.get("ended", {})
    code = exit_code(ended) if "ended" in result else MACHINE_FAULT
    write_whole(logs / f"node-{node.node}", f"{code}\n")
    if ended:
        ends = "; ".join(describe(rank, ended[rank]) for rank in sorted(ended))
        logger.warning(f"{node.name}: {ends}: exit code {code}")
    leave_together(node, result.get("store"), seconds=LEAVE_SECONDS)
    if "ended" not in result:
        raise MachineFault(
            f"{node.name}: the nodes of job {node.job} lost each other: {result.get('error', 'see the traceback')}"
        )
    return code


def _run_agent(node: NodeLaunch, command: Sequence[str], logs: Path, result: dict[str, Any]) -> None:
    """What the thread does; leaves `ended` or `error` in `result`, and `store`, which must outlive the agent."""
    import logging

    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    from kairos_train.launch.rank_logs import RankLogs

    # It warns that it handles no signals in a thread, which is why it is in one; how ranks end is told by `run_node`.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        result["store"] = hold_store(node)
        config = LaunchConfig(
            **node.rendezvous,
            monitor_interval=POLL,
            logs_specs=RankLogs(logs),
            log_line_prefix_template="[rank ${rank}] ",
        )
        launch_agent(config, command[0], list(command[1:]))
        result["ended"] = {}
    except ChildFailedError as error:
        result["ended"] = {rank: Ended(failure.exitcode, failure.timestamp) for rank, failure in error.failures.items()}
    except (MachineFault, RendezvousError, torch.distributed.DistError) as error:  # told by the main thread
        result["error"] = error
