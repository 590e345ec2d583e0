"""What is done to a run of several processes, and how it is put back on its feet. Used by chaos.py and the tests.

A run is a sequence of lives. Ranks are real processes, forked from one that has imported everything already (start-up
is seconds of imports otherwise), each running `kairos-train train` with a launcher's environment. A fault comes at a
step; the life ends, or goes on; the next life continues from the newest intact checkpoint.

    kill_rank      SIGKILL of one rank; the others must name it and end by themselves, with exit code 4
    kill_all       SIGKILL of all at once
    kill_in_save   SIGKILL of one or all while a checkpoint is being written
    stop_rank      SIGSTOP of one rank; the others must find it stuck and end by themselves
    disk_full      the run's file system takes no more for a while
    corrupt        SIGKILL of all, then the newest checkpoint is truncated, has a bit flipped or loses a file
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kairos_train.checkpoint.canonical import find_problem, list_checkpoints
from kairos_train.operations.events import read_events

RANKS = 4
STEPS, EVERY = 30, 4  # optimiser steps of a run, and between two checkpoints
KINDS = ("kill_rank", "kill_all", "kill_in_save", "stop_rank", "disk_full", "corrupt")
STUCK = 10.0  # seconds without progress, for which a rank counts as stuck
RESTART = 4  # exit code: a process, a machine or a disk failed
PATIENCE = 120.0  # seconds for a life to come to where it must come
TMPFS_MB = 48

SETTINGS = (
    "experiment=demo_push2d stage=joint model.video.dim=32 model.video.ffn_dim=64 model.video.gdn_key_dim=8 "
    "model.video.gdn_value_dim=16 model.action.dim=32 model.action.ffn_dim=64 model.num_heads=2 "
    "data.window.height=32 data.window.width=32 data.window.stride=1 data.validation_shards=null data.workers=1 "
    f"train.micro_batch=2 train.steps={STEPS} train.checkpoint_every={EVERY} train.log_every=5 train.device=cpu "
    "train.zero_stage=1 parallel.context=2 monitor.log_samples=true train.failed_checkpoints=1000 "
    f"watch.heartbeat=0.2 watch.silence=4 watch.stuck={STUCK}"
).split()
PRELOAD = (
    *("torch._dynamo", "torch.utils.tensorboard", "deepspeed", "deepspeed.runtime.zero.muon.original_muon"),
    *("kairos_train.training.build_run", "kairos_train.training.loop", "kairos_train.commands.training"),
)
"""What a rank imports by and by, the optimisers' dependence on the compiler included: more than half of its start."""


@dataclass
class FaultOutcome:
    """What one fault came to.

    Attributes:
        step: at which it was inflicted.
        detail: what exactly was done.
        detected: seconds until the surviving ranks had ended by themselves; None where nobody survived, or nobody had
            to end.
        recovered: seconds from the next start (or from the fault, where the life went on) to the first step beyond.
        exit_codes: of all ranks of that life.
        named: whether every surviving rank named the one that was lost; None where there is nobody to name.
    """

    kind: str
    step: int
    detail: str
    detected: float | None = None
    recovered: float | None = None
    exit_codes: list[int] = field(default_factory=list)
    named: bool | None = None


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
        self.ranks = [
            context.Process(target=_rank, args=(rank, ranks, port, words, str(self.log(rank)))) for rank in range(ranks)
        ]
        for process in self.ranks:
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
        for process in self.ranks:
            process.join()
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
        return [process.exitcode for process in self.ranks]


def _rank(rank: int, size: int, port: int, words: list[str], log: str) -> None:
    """One rank: a launcher's environment, its output in a file, the command, its exit code."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
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


def run_with_faults(
    life: Attempt, kinds: Sequence[str], rng: random.Random, *, steps: int = STEPS
) -> list[FaultOutcome]:
    """Train to the end through faults, one at a time, at growing random steps.

    Args:
        life: the run's first.
        steps: of the run, as its settings have it.
    """
    outcomes: list[FaultOutcome] = []
    run_dir = life.run_dir
    for kind, step in zip(kinds, sorted(rng.sample(range(2, steps - 2), len(kinds)))):
        life = _reach(life, lambda step=step: steps_done(run_dir) >= step)
        outcome = FaultOutcome(kind, steps_done(run_dir), "")
        outcomes.append(outcome)
        goes_on = INFLICT[kind](life, outcome, rng)
        since = time.monotonic()
        if goes_on:
            here = steps_done(run_dir)
            life = _reach(life, lambda here=here: steps_done(run_dir) > min(here, steps - 1))
        else:
            outcome.exit_codes = outcome.exit_codes or life.end()
            starts = len(_starts(run_dir))
            life = _reach(life.again(), lambda starts=starts: _goes_on(run_dir, starts, steps))
        outcome.recovered = time.monotonic() - since
    while (codes := life.wait(seconds=300)) == [RESTART] * life.size:
        life = life.again()
    assert codes == [0] * life.size, f"{codes}\n{life.log(0).read_text()[-3000:]}"
    return outcomes


def _reach(life: Attempt, condition: Callable[[], bool]) -> Attempt:
    """The life in which a condition comes true: one that ends with "start me again" is started again."""
    while not life.wait_for(condition):
        codes = life.end()
        assert codes == [RESTART] * life.size, f"{codes}\n{life.log(0).read_text()[-3000:]}"
        life = life.again()
    return life


def _starts(run_dir: Path) -> list[int]:
    """The steps at which the lives so far began."""
    return [event["step"] for event in read_events(run_dir) if event["kind"] == "start"]


def _goes_on(run_dir: Path, earlier: int, steps: int) -> bool:
    """Whether an attempt after earlier ones has done a step, or had none left to do."""
    starts = _starts(run_dir)
    return len(starts) > earlier and (starts[-1] == steps or steps_done(run_dir) > starts[-1])


# --- the faults; each tells whether the life goes on ---


def _kill_rank(life: Attempt, outcome: FaultOutcome, rng: random.Random) -> bool:
    time.sleep(rng.uniform(0, 0.3))
    lost = rng.randrange(life.size)
    _lose(life, outcome, lost, signal.SIGKILL)
    return False


def _stop_rank(life: Attempt, outcome: FaultOutcome, rng: random.Random) -> bool:
    _lose(life, outcome, rng.randrange(life.size), signal.SIGSTOP)
    return False


def _lose(life: Attempt, outcome: FaultOutcome, lost: int, number: signal.Signals) -> None:
    """Send a signal to one rank, and see what the others make of it."""
    outcome.detail = f"{number.name} of rank {lost}"
    begin = time.monotonic()
    with contextlib.suppress(ProcessLookupError):
        os.kill(life.ranks[lost].pid, number)
    others = [rank for rank in range(life.size) if rank != lost]
    life.wait_for(lambda: not any(life.ranks[rank].is_alive() for rank in others), seconds=60)
    outcome.detected = time.monotonic() - begin
    outcome.exit_codes = life.end()
    outcome.named = all(re.search(rf"\brank {lost}\b", life.log(rank).read_text()) for rank in others)


def _kill_all(life: Attempt, outcome: FaultOutcome, rng: random.Random) -> bool:
    time.sleep(rng.uniform(0, 0.3))
    outcome.detail = "SIGKILL of all ranks"
    outcome.exit_codes = life.end()
    return False


def _kill_in_save(life: Attempt, outcome: FaultOutcome, rng: random.Random) -> bool:
    checkpoints = life.run_dir / "checkpoints"
    began = life.wait_for(lambda: any(checkpoints.glob(".tmp-step-*")))
    time.sleep(rng.choice([0.0, rng.uniform(0, 0.02)]))
    if began and rng.random() < 0.5:
        _lose(life, outcome, rng.randrange(life.size), signal.SIGKILL)
    else:
        outcome.exit_codes = life.end()
        outcome.detail = "SIGKILL of all ranks"
    outcome.detail += " while saving"
    return False


def _disk_full(life: Attempt, outcome: FaultOutcome, rng: random.Random) -> bool:
    """Until a checkpoint could not be written, or the run has ended for want of room for a line."""
    ballast = life.run_dir.parent / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16))
    with open(ballast, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0")
    tmp = life.run_dir / "checkpoints"
    life.wait_for(lambda: "No space left" in life.log(0).read_text() and not any(tmp.glob(".tmp-step-*")))
    time.sleep(rng.uniform(0, 1.0))
    ended = not any(process.is_alive() for process in life.ranks)
    if not ended and not all(process.is_alive() for process in life.ranks):
        outcome.exit_codes = life.wait(seconds=60)
        ended = True
    ballast.unlink()
    outcome.detail = "full until the run ended" if ended else "full until a checkpoint had failed"
    return not ended


def _corrupt(life: Attempt, outcome: FaultOutcome, rng: random.Random) -> bool:
    outcome.exit_codes = life.end()
    intact = [path for path in list_checkpoints(life.run_dir / "checkpoints") if find_problem(path, deep=True) is None]
    if len(intact) < 2:  # a run of which all are damaged does not go on
        outcome.detail = "SIGKILL of all ranks (no second checkpoint yet)"
        return False
    path = intact[-1]
    how = rng.choice(["truncated", "bit flipped", "file lost"])
    file = rng.choice(sorted(path.iterdir()))
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[: rng.randrange(len(content))])
    elif how == "bit flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    else:
        file.unlink()
    outcome.detail = f"{path.name}/{file.name}: {how}"
    return False


INFLICT: dict[str, Callable[[Attempt, FaultOutcome, random.Random], bool]] = {
    "kill_rank": _kill_rank,
    "kill_all": _kill_all,
    "kill_in_save": _kill_in_save,
    "stop_rank": _stop_rank,
    "disk_full": _disk_full,
    "corrupt": _corrupt,
}


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A small file system of its own on `folder`; False where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MB}m", "tmpfs", str(folder)], capture_output=True
    ).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.rmtree(folder, ignore_errors=True)
