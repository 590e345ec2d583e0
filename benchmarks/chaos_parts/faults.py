"""What is done to a run of several processes, and how it is put back on its feet. Used by chaos.py and the tests.

A run is a sequence of lives (attempt.py). A fault comes at a step; the life ends, or goes on; the next life continues
from the newest intact checkpoint.

    kill_rank        SIGKILL of one rank; the others must name it and end by themselves, with exit code 4
    kill_all         SIGKILL of all at once
    kill_in_save     SIGKILL of one or all while a checkpoint is being written
    stop_rank        SIGSTOP of one rank; the others must find it stuck and end by themselves
    stop_worker      SIGSTOP of one rank's loader process; the rank must say that its loader hangs, and all end
    stop_store       SIGSTOP, for 20 s, of the process that holds a store: the launcher, without which the ranks go on,
                     or rank 0, which holds the one of the watch; when it wakes up it must end as well
    disk_full        the run's file system takes no more for a while
    slow_disk        opening, reading, syncing and renaming files takes longer for a while
    corrupt          SIGKILL of all, then the newest checkpoint is truncated, has a bit flipped or loses a file
    unreadable_file  SIGKILL of all, then a file of the newest checkpoint cannot be opened
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chaos_parts.attempt import EVERY, RESTART, SLOW, STEPS, Attempt, steps_done

from kairos_train.checkpoint.canonical import find_problem, list_checkpoints
from kairos_train.operations.events import read_events

KINDS = (
    *("kill_rank", "kill_all", "kill_in_save", "stop_rank", "stop_worker", "stop_store"),
    *("disk_full", "slow_disk", "corrupt", "unreadable_file"),
)
UNREADABLE = ("a folder", "a link to itself", "a socket", "without rights")
"""What the place of a file may hold that opening it fails: EISDIR, ELOOP, ENXIO, EACCES (the last not for root)."""

STORE_SECONDS = 20.0
TMPFS_MB = 48


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


def _stop_worker(life: Attempt, outcome: FaultOutcome, rng: random.Random) -> bool:
    rank = rng.randrange(life.size)
    life.wait_for(lambda: bool(life.loaders(rank)))
    begin = time.monotonic()
    for worker in life.loaders(rank)[:1]:
        outcome.detail = f"SIGSTOP of rank {rank}'s loader"
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGSTOP)
    life.wait_for(lambda: not any(process.is_alive() for process in life.ranks), seconds=60)
    outcome.detected = time.monotonic() - begin
    outcome.exit_codes = life.end()
    outcome.named = _is_named(life, rank)
    return False


def _stop_store(life: Attempt, outcome: FaultOutcome, rng: random.Random) -> bool:
    if rng.random() < 0.5:
        os.kill(life.store.pid, signal.SIGSTOP)
        time.sleep(STORE_SECONDS)
        os.kill(life.store.pid, signal.SIGCONT)
        outcome.detail = f"SIGSTOP of the launcher for {STORE_SECONDS:g} s, {steps_done(life.run_dir)} steps behind it"
        return any(process.is_alive() for process in life.ranks)
    holder, *others = life.ranks
    begin = time.monotonic()
    os.kill(holder.pid, signal.SIGSTOP)
    life.wait_for(lambda: not any(process.is_alive() for process in others), seconds=60)
    outcome.detected = time.monotonic() - begin
    time.sleep(max(0.0, begin + STORE_SECONDS - time.monotonic()))
    os.kill(holder.pid, signal.SIGCONT)
    outcome.exit_codes = life.wait(seconds=60)
    outcome.detail = f"SIGSTOP of rank 0 for {STORE_SECONDS:g} s: exit codes {outcome.exit_codes}"
    outcome.named = _is_named(life, 0) and outcome.exit_codes == [RESTART] * life.size
    return False


def _is_named(life: Attempt, lost: int) -> bool:
    """Whether all ranks but one have said its number."""
    others = [rank for rank in range(life.size) if rank != lost]
    return all(re.search(rf"\brank {lost}\b", life.log(rank).read_text()) for rank in others)


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
    outcome.named = _is_named(life, lost)


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


def _slow_disk(life: Attempt, outcome: FaultOutcome, rng: random.Random) -> bool:
    """For a few steps, a checkpoint among them in most cases."""
    begin, steps = steps_done(life.run_dir), rng.randint(2, EVERY + 1)
    life.slow.touch()
    life.wait_for(lambda: steps_done(life.run_dir) >= begin + steps)
    life.slow.unlink()
    outcome.detail = f"each call to it took {SLOW:g} s longer for {steps_done(life.run_dir) - begin} steps"
    return any(process.is_alive() for process in life.ranks)


def _newest_after_kill(life: Attempt, outcome: FaultOutcome) -> Path | None:
    """The newest intact checkpoint, all ranks killed; None for the only one, without which a run does not go on."""
    outcome.exit_codes = life.end()
    intact = [path for path in list_checkpoints(life.run_dir / "checkpoints") if find_problem(path, deep=True) is None]
    if len(intact) < 2:
        outcome.detail = "SIGKILL of all ranks (no second checkpoint yet)"
        return None
    return intact[-1]


def _corrupt(life: Attempt, outcome: FaultOutcome, rng: random.Random) -> bool:
    if (path := _newest_after_kill(life, outcome)) is None:
        return False
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


def _unreadable_file(life: Attempt, outcome: FaultOutcome, rng: random.Random) -> bool:
    if (path := _newest_after_kill(life, outcome)) is None:
        return False
    file, how = rng.choice(sorted(path.iterdir())), rng.choice(UNREADABLE[: 4 if os.geteuid() else 3])
    make_unreadable(file, how)
    outcome.detail = f"{path.name}/{file.name}: {how}"
    return False


def make_unreadable(file: Path, how: str) -> None:
    """Leave something in the place of a file that cannot be opened as one; `how` is of UNREADABLE."""
    if how == "without rights":
        file.chmod(0)
        return
    file.unlink()
    if how == "a folder":
        file.mkdir()
    elif how == "a link to itself":
        file.symlink_to(file.name)
    else:
        os.mknod(file, 0o600 | stat.S_IFSOCK)


INFLICT: dict[str, Callable[[Attempt, FaultOutcome, random.Random], bool]] = {
    "kill_rank": _kill_rank,
    "kill_all": _kill_all,
    "kill_in_save": _kill_in_save,
    "stop_rank": _stop_rank,
    "stop_worker": _stop_worker,
    "stop_store": _stop_store,
    "disk_full": _disk_full,
    "slow_disk": _slow_disk,
    "corrupt": _corrupt,
    "unreadable_file": _unreadable_file,
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
