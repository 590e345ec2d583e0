"""The processes of one run, from their start to their end: its ranks, and the store at which they meet.

Ranks are real processes, forked from one that has imported everything already (start-up is seconds of imports
otherwise), each running `kairos-train train` with a launcher's environment. The store is a process of its own, as it is
where a launcher holds it. While a run's `slow` file exists, its ranks' and loaders' calls to the disk take longer.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from chaos_parts.slow_disk import slow_while

RANKS = 4
STEPS, EVERY = 30, 4  # optimiser steps of a run, and between two checkpoints
STUCK = 10.0  # seconds without progress, for which a rank counts as stuck
RESTART = 4  # exit code: a process, a machine or a disk failed
HUNG = 6.0  # seconds without a batch, for which a loader counts as hung: the others wait for its rank that long
SLOW = 0.03  # seconds that a call to a slow disk takes longer
PATIENCE = 120.0  # seconds for a life to come to where it must come

SETTINGS = (
    "experiment=demo_push2d stage=joint model.video.dim=32 model.video.ffn_dim=64 model.video.gdn_key_dim=8 "
    "model.video.gdn_value_dim=16 model.action.dim=32 model.action.ffn_dim=64 model.num_heads=2 "
    "data.window.height=32 data.window.width=32 data.window.stride=1 data.validation_shards=null data.workers=1 "
    f"train.micro_batch=2 train.steps={STEPS} train.checkpoint_every={EVERY} train.log_every=5 train.device=cpu "
    "train.zero_stage=1 parallel.context=2 monitor.log_samples=true train.failed_checkpoints=1000 "
    f"watch.heartbeat=0.2 watch.silence=4 watch.stuck={STUCK} data.timeout={HUNG}"
).split()
PRELOAD = (
    *("torch._dynamo", "torch.utils.tensorboard", "deepspeed", "deepspeed.runtime.zero.muon.original_muon"),
    *("kairos_train.training.build_run", "kairos_train.training.loop", "kairos_train.commands.training"),
)
"""What a rank imports by and by, the optimisers' dependence on the compiler included: more than half of its start."""


class Attempt:
    """The ranks of one run, from their start to their end."""

    def __init__(self, run_dir: Path, settings: Sequence[str], *, ranks: int = RANKS) -> None:
        self.settings, self.size = settings, ranks
        self.run_dir, self.logs = run_dir, run_dir.parent / f"{run_dir.name}-logs"
        self.logs.mkdir(exist_ok=True)
        self.number = len(list(self.logs.glob("*-rank0.log")))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        words = ["train", *SETTINGS, f"run_dir={run_dir}", *settings]
        port = _free_port()
        self.begun = time.monotonic()
        self.slow = self.logs / "slow"
        self.store = context.Process(target=_hold_store, args=(port,), daemon=True)
        self.ranks = [
            context.Process(target=_rank, args=(rank, ranks, port, words, str(self.log(rank)), self.slow))
            for rank in range(ranks)
        ]
        for process in (self.store, *self.ranks):
            process.start()

    def again(self) -> Attempt:
        """The next life."""
        return Attempt(self.run_dir, self.settings, ranks=self.size)

    def log(self, rank: int) -> Path:
        return self.logs / f"{self.number:03d}-rank{rank}.log"

    def wait_for(self, condition: Callable[[], bool], *, seconds: float = PATIENCE) -> bool:
        """Whether a condition came true while any rank lived.

        Raises:
            AssertionError: neither in that time: the run hangs.
        """
        end = time.monotonic() + seconds
        while not condition():
            if not any(process.is_alive() for process in self.ranks):
                return condition()
            if time.monotonic() > end:
                texts = "\n".join(self.log(rank).read_text()[-1500:] for rank in range(self.size))
                raise AssertionError(f"the run neither came there nor ended within {seconds} s\n{texts}")
            time.sleep(0.002)
        return True

    def end(self) -> list[int]:
        """Kill what is left, and take the exit codes."""
        for process in self.ranks:
            if process.is_alive():
                process.kill()
        return self._codes()

    def _codes(self) -> list[int]:
        for process in self.ranks:
            process.join()
        self.store.kill()
        self.store.join()
        return [process.exitcode for process in self.ranks]

    def wait(self, *, seconds: float = PATIENCE) -> list[int]:
        """Wait for all ranks to end by themselves; their exit codes."""
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        if any(process.is_alive() for process in self.ranks):
            self.end()
            texts = "\n".join(self.log(rank).read_text()[-1500:] for rank in range(self.size))
            raise AssertionError(f"ranks did not end within {seconds} s\n{texts}")
        return self._codes()

    def loaders(self, rank: int) -> list[int]:
        """The loader processes of a rank: what it has forked, and has started by no other command."""
        found = []
        with contextlib.suppress(OSError):  # a process or a thread that has just ended
            parent = self.ranks[rank].pid
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
            command = Path(f"/proc/{parent}/cmdline").read_bytes()
            return [child for child in found if Path(f"/proc/{child}/cmdline").read_bytes() == command]
        return []


def _hold_store(port: int) -> None:
    """The store at which ranks meet, for as long as this process lives."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    signal.pause()
    del store


def _rank(rank: int, size: int, port: int, words: list[str], log: str, slow: Path) -> None:
    """One rank: a launcher's environment, its output in a file, the command, its exit code."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"},
    }
    slow_while(slow, SLOW)
    multiprocessing.set_start_method("fork", force=True)  # as in any other rank: loader workers end with their parent
    sys.argv = ["kairos-train", *words]
    runpy.run_module("kairos_train.cli", run_name="__main__")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def steps_done(run_dir: Path) -> int:
    """The last step of the run's losses; a line cut short does not count."""
    path = run_dir / "losses.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def finish(life: Attempt) -> None:
    """To the end of the run."""
    codes = life.wait(seconds=300)
    assert codes == [0] * life.size, f"{codes}\n{life.log(0).read_text()[-3000:]}"
