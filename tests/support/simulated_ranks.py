"""Ranks of a run under watch in one process, on a clock of their own: hours pass in milliseconds, and nothing waits.

    with Simulation(hosts=["a", "a", "b"], watch=watch, stacks=folder, seed=0, resets=False) as ranks:
        ranks.advance(5.0)
        ranks.kill(1)
        ranks.advance(60.0)
        ranks.processes[0].code, ranks.processes[0].log

The watch is the real one. What it has of the operating system is replaced: threads and events (one thread runs at a
time, until it waits for something), the clock, `/proc`, exit, standard error, and rank 0's store, which a stopped
process does not answer and a dead one has taken with it. Among threads that could run, `seed` chooses.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from kairos_train.basics.errors import EXIT_CODES
from kairos_train.config.operation_schema import WatchConfig
from kairos_train.operations.watch import exchange, liveness, watchdog
from kairos_train.operations.watch.exchange import FINDING
from kairos_train.operations.watch.liveness import Liveness
from kairos_train.operations.watch.members import Member

PACE = 0.5  # seconds of a step
KILLED = -9


class Gone(BaseException):
    """The process of this thread has ended: it does nothing more."""


class Event:
    """`threading.Event`."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation, self._set = simulation, False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        if not self._set:
            self._simulation.block(self, timeout)
        return self._set


class Thread:
    """`threading.Thread` of the process that makes it."""

    def __init__(
        self,
        simulation: Simulation,
        target: Callable[[], object],
        *,
        process: Process | None = None,
        name: str = "",
        daemon: bool = True,
    ) -> None:
        self.process, self.name, self.daemon = process or simulation.running.process, name, daemon
        self.awaited: Event | None = None
        self.deadline: float | None = 0.0
        self.turn = threading.Semaphore(0)
        self._simulation, self._target, self._ended = simulation, target, Event(simulation)
        self._real = threading.Thread(target=self._run, daemon=True)

    @property
    def ident(self) -> int | None:
        return self._real.ident

    def start(self) -> None:
        self._real.start()
        self._simulation.threads.append(self)

    def is_alive(self) -> bool:
        return not self._ended.is_set()

    def join(self, timeout: float | None = None) -> None:
        self._ended.wait(timeout)

    def can_run(self, now: float) -> bool:
        due = self.deadline is not None and self.deadline <= now
        return due or (self.awaited is not None and self.awaited.is_set())

    def _run(self) -> None:
        self.turn.acquire()
        try:
            if not self.process.dead:
                self._target()
        except Gone:
            pass
        except BaseException as error:  # of the simulation's own: told by the test's thread
            self._simulation.errors.append(error)
        finally:
            self._ended.set()
            self._simulation.baton.release()


@dataclass(eq=False)
class Process:
    """One rank.

    Attributes:
        code: exit code; None while it is there.
        stopped: by a signal.
        log: its lines on standard error.
        step: of its loop.
        ended_at: seconds.
        order: what it does in its next step.
    """

    member: Member
    code: int | None = None
    stopped: bool = False
    log: list[str] = field(default_factory=list)
    step: int = 0
    ended_at: float = 0.0
    order: Callable[[Liveness], None] | None = None
    main: Thread | None = None

    @property
    def dead(self) -> bool:
        return self.code is not None


class Store:
    """A client of rank 0's key-value store."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation

    def set(self, key: str, value: str) -> None:
        self._content()[key] = value.encode()

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        content = self._content()
        return [content[key] for key in keys]

    def compare_set(self, key: str, expected: str, value: str) -> None:
        content = self._content()
        if content[key] == expected.encode():
            content[key] = value.encode()

    def add(self, key: str, amount: int) -> int:
        content = self._content()
        content[key] = str(int(content.get(key, b"0")) + amount).encode()
        return int(content[key])

    def _content(self) -> dict[str, bytes]:
        simulation = self._simulation
        simulation.block(None, 0.0)  # others come first, perhaps
        while (holder := simulation.processes[0]).stopped and not holder.dead:
            simulation.block(simulation.changed, None)
        if holder.dead:
            raise RuntimeError("Connection reset by peer")
        return simulation.stored


class Simulation:
    """The ranks of a run that trains until it is told to end, or ends by itself.

    Args:
        hosts: of each rank.
        watch: its limits.
        stacks: folder for stacks.
        seed: which thread runs first when several could.
        resets: collectives with a dead rank fail; else they wait for ever.
    """

    def __init__(
        self, *, hosts: Sequence[str], watch: WatchConfig, stacks: Path, seed: int = 0, resets: bool = False
    ) -> None:
        self.now, self.resets, self.last_step = 0.0, resets, None
        self.threads: list[Thread] = []
        self.errors: list[BaseException] = []
        self.running: Thread | None = None
        self.baton = threading.Semaphore(0)
        self.changed = Event(self)  # of processes that are stopped
        self.stored: dict[str, bytes] = {FINDING: b""}
        self.dawdle = [0.0] * len(hosts)  # seconds after the last step
        self._watch, self._stacks, self._random = watch, stacks, random.Random(seed)
        self._collectives: dict[int, tuple[Event, set[int]]] = {}
        members = [Member(rank, host, 100 + rank, 1, f"space of {host}") for rank, host in enumerate(hosts)]
        self.processes = [Process(member) for member in members]
        self._patches = ExitStack()

    def __enter__(self) -> Simulation:
        threads = SimpleNamespace(
            Event=lambda: Event(self),
            Thread=lambda **words: Thread(self, words.pop("target"), **words),
            main_thread=lambda: self.running.process.main,
            get_ident=threading.get_ident,
        )
        clock = SimpleNamespace(monotonic=lambda: self.now)
        system = SimpleNamespace(_exit=self._exit, write=self._write)
        for module in (exchange, liveness, watchdog):
            self._patches.enter_context(patch.object(module, "threading", threads))
        for module in (liveness, watchdog):
            self._patches.enter_context(patch.object(module, "time", clock))
        self._patches.enter_context(patch.object(liveness, "os", system))
        self._patches.enter_context(patch.object(liveness, "process_state", self._state))
        for process in self.processes:
            process.main = Thread(self, lambda process=process: self._live(process), process=process)
            process.main.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            self._end(process, KILLED)
        self._patches.close()

    # What a test does.

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        until = self.now + seconds
        while True:
            self.threads = [thread for thread in self.threads if thread.is_alive()]
            here = [thread for thread in self.threads if not thread.process.stopped]
            ready = [thread for thread in here if thread.can_run(self.now)]
            if ready:
                self._resume(self._random.choice(ready))
                continue
            following = min((t.deadline for t in here if t.deadline is not None), default=math.inf)
            if following > until:
                break
            self.now = following
        self.now = until

    def kill(self, rank: int) -> None:
        self._end(self.processes[rank], KILLED)

    def stop(self, *ranks: int) -> None:
        for rank in ranks:
            self.processes[rank].stopped = True

    def go_on(self, *ranks: int) -> None:
        for rank in ranks:
            self.processes[rank].stopped = False
        self._tell()

    def suspend(self, seconds: float) -> None:
        """The whole job."""
        everyone = range(len(self.processes))
        self.stop(*everyone)
        self.advance(seconds)
        self.go_on(*everyone)

    def finish(self, dawdle: Sequence[float]) -> None:
        """Let the ranks leave after a step, each so many seconds later."""
        self.dawdle = list(dawdle)
        self.last_step = max(process.step for process in self.processes) + 1

    def sleep(self, seconds: float) -> None:
        """Of the thread that runs."""
        self.block(None, seconds)

    def wait_for_ever(self) -> None:
        self.block(None, None)

    # What the threads do.

    def block(self, event: Event | None, timeout: float | None) -> None:
        """Let others run until an event or a time has come."""
        thread = self.running
        if thread.process.dead:
            raise Gone
        thread.awaited = event
        thread.deadline = None if timeout is None else self.now + timeout
        self.baton.release()
        thread.turn.acquire()
        thread.awaited = thread.deadline = None
        if thread.process.dead:
            raise Gone

    def _live(self, process: Process) -> None:
        """The main thread of a rank: a small loop of collectives, and what a command makes of its errors."""
        rank = process.member.rank
        roster = [other.member for other in self.processes]
        watch = Liveness(self._watch, roster=roster, rank=rank, store=Store(self), stacks=self._stacks)
        self._meet(rank, 0)
        try:
            with watch:
                self._loop(process, watch)
            code = 0
        except tuple(EXIT_CODES) as error:
            self._say(process, f"raised: {error}")
            code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        except Exception as error:
            self._say(process, f"Traceback: {error}")
            code = 1
        self._end(process, code)

    def _loop(self, process: Process, watch: Liveness) -> None:
        rank = process.member.rank
        while self.last_step is None or process.step < self.last_step:
            process.step += 1
            watch.at(process.step, "data")
            self.sleep(PACE)
            if process.order is not None:
                order, process.order = process.order, None
                order(watch)
            watch.at(process.step, "forward")
            self._meet(rank, process.step)
        self.sleep(self.dawdle[rank])

    def _meet(self, rank: int, step: int) -> None:
        """An all-reduce."""
        together, arrived = self._collectives.setdefault(step, (Event(self), set()))
        arrived.add(rank)
        if len(arrived) == len(self.processes):
            together.set()
        elif self.resets and any(process.dead for process in self.processes):
            raise RuntimeError("gloo: Connection closed by peer")
        together.wait()
        if len(arrived) < len(self.processes):
            raise RuntimeError("gloo: Connection closed by peer")

    def _end(self, process: Process, code: int) -> None:
        """A process is no more: its threads unwind without a word, and whoever waits for it may notice."""
        if not process.dead:
            process.code, process.ended_at, process.stopped = code, self.now, False
            self._tell()
            if self.resets:
                for together, _ in self._collectives.values():
                    together.set()
        if self.running is None:
            self._reap()

    def _tell(self) -> None:
        """Whoever waits for a process that is stopped looks again."""
        told, self.changed = self.changed, Event(self)
        told.set()

    def _reap(self) -> None:
        while gone := [thread for thread in self.threads if thread.process.dead and thread.is_alive()]:
            self._resume(gone[0])

    def _resume(self, thread: Thread) -> None:
        """Let one thread run until it waits or ends."""
        self.running = thread
        thread.turn.release()
        self.baton.acquire()
        self.running = None
        if self.errors:
            raise self.errors.pop()
        if any(other.process.dead and other.is_alive() for other in self.threads):
            self._reap()

    def _exit(self, code: int) -> None:
        self._end(self.running.process, code)
        raise Gone

    def _write(self, file: int, text: bytes) -> int:
        assert file == 2
        self._say(self.running.process, text.decode().rstrip("\n"))
        return len(text)

    def _say(self, process: Process, line: str) -> None:
        """On standard error, unless the process has ended meanwhile: what unwinds may not find out before."""
        if process.dead:
            raise Gone
        process.log.append(line)

    def _state(self, member: Member) -> str | None:
        """The one letter of `/proc`."""
        process = self.processes[member.rank]
        return None if process.dead else "T" if process.stopped else "S"

    def order(self, rank: int, deed: Callable[[Liveness], Any]) -> None:
        """Something that a rank does in its next step, while it loads data."""
        self.processes[rank].order = deed
