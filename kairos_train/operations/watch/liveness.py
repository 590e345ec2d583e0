"""Ranks watch each other and themselves: who dies, hangs or fails is named by all others, who then end.

    with open_liveness(config.watch, stacks=run_dir / "stacks") as watch:      # collective
        while ...:
            watch.at(step, "forward")
            ...
            with watch.paused("checkpoint"):
                ...

Three ways to be found. A process that has ended is seen by its neighbours on the same machine, in `/proc`, within two
heartbeats. A machine of which no rank is heard for `watch.silence` s is taken for dead by the ranks of the machine
before it, in a ring. A loop without progress for `watch.stuck` s is looked into by the first rank that notices: who is
silent or behind. The finding goes to all through the store of rank 0; where that is gone, rank 0 is what is found.

Each survivor says in one line who it was, and ends with exit code 4: by the exception that its main thread raises,
or, when that is caught in a collective for ever, by `os._exit`. None kills another; launchers do that when one ends.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from kairos_train.basics.errors import EXIT_CODES, Interrupted, MachineFault, RunStopped
from kairos_train.config.operation_schema import WatchConfig
from kairos_train.operations.watch.exchange import CENSUS_BEATS, HeartbeatExchange, open_store
from kairos_train.operations.watch.findings import FAULT_CODE, Heartbeat, RunFault, died, silent_hosts, stuck
from kairos_train.operations.watch.members import Member, process_state, this_member
from kairos_train.operations.watch.stacks import write_stacks
from kairos_train.operations.watch.watchdog import AwakeClock, Watchdog

AGREED = (RunStopped, Interrupted)  # errors that all ranks raise together
CONNECT_SECONDS = 60.0
BY_ITSELF_SECONDS = 10.0  # what a main thread has to end by itself once another rank has failed
UNWIND_SECONDS = 30.0  # and once it raises the finding
WRITE_SECONDS = 30.0  # for stacks, and for recording a fault
LOST_PEER = ("gloo", "nccl", "connection", "peer", "socket", "timed out")  # in errors of collectives


class Liveness:
    """This rank among the others. Made by `open_liveness`; a context manager.

    Leaving it says goodbye. Leaving it by an exception either tells the others ("failed", with its words) or, when the
    exception is a broken connection to a rank that is found dead, raises that finding in its place. It should be the
    outermost context of a run, so that what is closed on the way out is watched, too.

    Args:
        watch: the limits.
        roster: all ranks, by rank.
        rank: this one.
        store: a client of its own; None for a single process, which has the watchdog alone.
        stacks: folder for stacks of a stuck run.
        on_fault: called with the finding in the watching thread before this process ends.
    """

    def __init__(
        self,
        watch: WatchConfig,
        *,
        roster: Sequence[Member],
        rank: int,
        store: object | None,
        stacks: Path,
        on_fault: Callable[[RunFault], None] | None = None,
    ) -> None:
        self._watch, self._roster, self._me = watch, list(roster), roster[rank]
        self._stacks, self._on_fault = Path(stacks), on_fault
        self._clock = AwakeClock(watch.heartbeat)
        self._watchdog = Watchdog(watch.stuck, self._clock)
        self._neighbours = [m for m in roster if m.rank != rank and self._me.sees(m)]
        self._next_host = _next_host(roster, self._me)
        self._beat = self._watchdog.beat(1)
        self._exchange = None
        if store is not None:
            watched = sorted({m.rank for m in (*self._neighbours, *self._next_host)})
            self._exchange = HeartbeatExchange(
                store, rank=rank, size=len(roster), watched=watched, heartbeat=watch.heartbeat, beat=lambda: self._beat
            )
        self._heard: dict[int, tuple[int, float]] = {}  # rank -> number of its newest beat, when it came
        self._answered = (0, 0.0)  # rounds of the exchange, when the last one ended
        self._missing: dict[int, tuple[int, float]] = {}  # dead neighbours -> rounds and time when first seen
        self._waiting_since: float | None = None  # stuck, and another rank looks into it
        self._finding: RunFault | None = None
        self._asked: BaseException | None = None  # the error for which a finding has been waited for
        self._spoken = False  # this rank ends by an error of its own, whatever it looks like from elsewhere
        self._found, self._claimed, self._left = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)

    def at(self, step: int, phase: str) -> None:
        """The training loop has come to a phase of a step. Cheap; called by the main thread."""
        self._watchdog.at(step, phase)

    def paused(self, phase: str, *, times: float | None = 4.0) -> AbstractContextManager[None]:
        """A phase that may take `times` the usual limit (None: any time); others may wait for it."""
        return self._watchdog.paused(phase, times=times)

    def last_words(self, text: str, *, code: int = FAULT_CODE) -> None:
        """This rank ends by an error of its own: the others say these words, and end with this code."""
        self._spoken = True
        if self._exchange and self._finding is None:
            finding = RunFault("failed", f"{self._me} failed: {text}", code)
            self._exchange.publish(finding, seconds=self._patience)

    def explain(self, error: BaseException, *, wait: float | None = None) -> Exception | None:
        """What to raise in place of an error: the finding that explains it, or None when the error is its own.

        Args:
            error: that came out of the training loop.
            wait: seconds for a finding, where the error is one of communication; None: as long as one may take.
        """
        if self._spoken:
            return None
        if isinstance(error, RuntimeError) and _of_a_lost_peer(error) and self._exchange and error is not self._asked:
            self._asked = error
            self._found.wait(self._watch.silence + 2 * self._patience if wait is None else wait)
        if self._finding is None:
            return None
        self._claimed.set()
        return self._finding.error()

    def __enter__(self) -> Liveness:
        if self._exchange:
            self._exchange.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        explained = None if error is None or self._claimed.is_set() else self.explain(error)
        if error is not None and self._finding is None and not isinstance(error, AGREED):
            code = next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), FAULT_CODE)
            self.last_words(f"{type(error).__name__}: {error}".splitlines()[0], code=code)
        if self._finding is None:
            self._left.set()
            self._thread.join(self._patience)
            if self._exchange:
                self._exchange.leave(seconds=self._patience)
        else:
            if self._exchange:
                self._exchange.linger(seconds=self._linger)
                self._exchange.stop(seconds=self._linger)
            self._left.set()
        if explained is not None:
            raise explained from error

    @property
    def _patience(self) -> float:
        """Seconds within which everything that still runs has answered."""
        return 3.0 + (CENSUS_BEATS + 5) * self._watch.heartbeat

    @property
    def _linger(self) -> float:
        """Seconds for which the store stays for others to read a finding; those that are dead will not."""
        return 1.0 + 3 * self._watch.heartbeat

    # The watching thread. It never asks the store itself.

    def _run(self) -> None:
        while not self._left.wait(self._watch.heartbeat):
            self._clock.tick()
            self._beat = self._watchdog.beat(self._beat.number + 1)
            finding = self._judge()
            if finding is not None:
                self._end(finding)
                return

    def _judge(self) -> RunFault | None:
        exchange = self._exchange
        if self._spoken:
            return None
        if exchange and exchange.finding and exchange.finding.kind != "end":
            return exchange.finding
        if exchange and not exchange.finding:
            if finding := self._store_gone():
                return finding  # there is nowhere to tell it; all find it by themselves
            if finding := self._dead_neighbour() or self._silent_host():
                return self._told(finding)
        if (seconds := self._watchdog.overdue()) is None:
            self._waiting_since = None
            return None
        return self._look_into(seconds)

    def _told(self, finding: RunFault) -> RunFault:
        first = self._exchange.publish(finding, seconds=self._patience)
        return finding if first.kind == "end" else first

    def _dead_neighbour(self) -> RunFault | None:
        """Processes on this machine that have ended without a goodbye, asked for after their end."""
        exchange, now = self._exchange, self._clock.now
        for member in self._neighbours:
            if member.rank not in self._missing and process_state(member) is None:
                self._missing[member.rank] = exchange.rounds, now
        gone = {rank for rank, beat in exchange.beats.items() if beat.gone}
        dead = [
            self._roster[rank]
            for rank, (rounds, since) in self._missing.items()
            if rank not in gone and (exchange.rounds >= rounds + 2 or exchange.lost or now - since > self._patience)
        ]
        return died(dead, exchange.beats) if dead else None

    def _store_gone(self) -> RunFault | None:
        """Rank 0, which holds the store, as it shows from here."""
        exchange, now, holder = self._exchange, self._clock.now, self._roster[0]
        rounds, since = self._answered
        if exchange.rounds != rounds and not exchange.lost:
            self._answered = exchange.rounds, now
            return None
        if self._me.rank == 0:
            return None
        visible = self._me.sees(holder)
        state = process_state(holder) if visible else None
        if exchange.lost and not (visible and state and now - since < self._patience):
            # Of it alone: others that are missing by now may have ended because of it.
            return died([holder], exchange.beats, how="" if visible else ": its connection is lost")
        if now - since < self._watch.silence:
            return None
        return silent_hosts([holder], seconds=now - since, state=state)

    def _silent_host(self) -> RunFault | None:
        """The next machine, when none of its ranks is heard any more."""
        exchange, answered = self._exchange, self._answered[1]  # without answers nobody is heard of, silent or not
        here = [m for m in self._next_host if m.rank in exchange.beats and not exchange.beats[m.rank].gone]
        for member in here:
            number = exchange.beats[member.rank].number
            if self._heard.get(member.rank, (None, 0.0))[0] != number:
                self._heard[member.rank] = number, answered
        seconds = min((answered - self._heard[m.rank][1] for m in here), default=0.0)
        return silent_hosts(here, seconds=seconds) if seconds >= self._watch.silence else None

    def _look_into(self, seconds: float) -> RunFault | None:
        """This rank's loop stands still: whose fault is it? Written down by the first rank that asks."""
        me, exchange = self._me, self._exchange
        heard = exchange.finding if exchange else None  # read once: another thread sets it
        if heard and heard.kind != "end":
            return heard
        if exchange is None or heard:
            return stuck(self._roster, {me.rank: self._beat}, silent=[], seconds=seconds, state=process_state)
        now, holder = self._clock.now, self._roster[0]
        unanswered = now - self._answered[1]
        if unanswered < self._patience:
            if self._waiting_since is None:
                self._waiting_since = now
                if exchange.claim(seconds=self._patience) is False:
                    return None
            elif now - self._waiting_since < 2 * self._patience:
                return None
        counted = self._census() if unanswered < self._patience else None
        if counted is None:
            if exchange.finding:
                return None  # it is judged again, with what has been heard
            return silent_hosts([holder], seconds=unanswered, state=self._state_of(holder))
        beats, silent = counted
        if any(beat.patient for rank, beat in beats.items() if rank not in silent):
            return None  # they wait for a rank that may take its time
        if self._watchdog.overdue() is None:
            return None
        return self._told(stuck(self._roster, beats, silent=silent, seconds=seconds, state=self._state_of))

    def _census(self) -> tuple[dict[int, Heartbeat], list[int]] | None:
        """The exchange's, while this thread's beats go on."""
        answer: list[tuple[dict[int, Heartbeat], list[int]] | None] = []
        asking = threading.Thread(
            target=lambda: answer.append(self._exchange.census(seconds=self._patience)), daemon=True
        )
        asking.start()
        while asking.is_alive():
            asking.join(self._watch.heartbeat)
            self._clock.tick()
            self._beat = self._watchdog.beat(self._beat.number + 1)
        return answer[0] if answer else None

    def _state_of(self, member: Member) -> str | None:
        return process_state(member) if self._me.sees(member) else None

    def _end(self, finding: RunFault) -> None:
        """Tell of it and end this process, unless its main thread does so."""
        self._finding = finding
        if finding.kind == "stuck":
            heading = f"{self._me}, in {self._beat}: {finding.text}"
            self._try(lambda: write_stacks(self._stacks, rank=self._me.rank, heading=heading), "write stacks")
        if self._on_fault is not None:
            self._try(lambda: self._on_fault(finding), "record the fault")
        self._found.set()
        by_itself = BY_ITSELF_SECONDS if finding.kind == "failed" else max(1.0, 2 * self._watch.heartbeat)
        deadline = time.monotonic() + by_itself
        while time.monotonic() < deadline and not self._claimed.is_set() and not self._left.is_set():
            self._claimed.wait(0.05)
        if self._left.is_set():
            return
        if self._claimed.is_set() and self._left.wait(UNWIND_SECONDS):
            return
        self._try(lambda: (sys.stdout.flush(), sys.stderr.flush()), "flush its output", seconds=1.0)
        _say(f"{self._me}: {finding.text}; this process ends with exit code {finding.code}{finding.remedy}")
        if self._exchange:
            self._exchange.linger(seconds=self._linger)
        os._exit(finding.code)

    def _try(self, action: Callable[[], object], what: str, *, seconds: float = WRITE_SECONDS) -> None:
        """Do something that may fail, or hang: a disk may be why the run stands still, a lock may be held for ever."""
        failed: list[str] = []

        def act() -> None:
            try:
                action()
            except Exception as error:
                failed.append(repr(error))

        thread = threading.Thread(target=act, name="last-acts", daemon=True)
        thread.start()
        thread.join(seconds)
        if failed or thread.is_alive():
            _say(f"{self._me}: cannot {what}: {failed[0] if failed else f'it takes more than {seconds:g} s'}")


def open_liveness(
    watch: WatchConfig,
    *,
    stacks: Path,
    host: str | None = None,
    on_fault: Callable[[RunFault], None] | None = None,
) -> Liveness:
    """The watch over the ranks of the default process group, or over this process where there is none. Collective.

    Args:
        watch: the limits.
        stacks: folder for stacks of a stuck run.
        host: this machine's name; None: what it calls itself.
        on_fault: called with a finding before this process ends.

    Raises:
        MachineFault: a rank cannot reach the store of rank 0; on all ranks.
    """
    import torch.distributed as dist

    from parallel.consensus import from_all, from_first

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Liveness(watch, roster=[this_member(0, host=host)], rank=0, store=None, stacks=stacks, on_fault=on_fault)
    rank, size = dist.get_rank(), dist.get_world_size()
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    store, problem = None, ""
    port = 0
    if rank == 0:
        try:
            store = open_store(address, holds=True, seconds=CONNECT_SECONDS)
            store.set("finding", "")
            port = store.port
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
    port = from_first(port, size)
    if rank and port:
        try:
            store = open_store(address, port=port, seconds=CONNECT_SECONDS)
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
    told: list[tuple[Member, str]] = from_all((this_member(rank, host=host), problem), size)
    problems = [f"{member}: {text}" for member, text in told if text]
    if problems:
        raise MachineFault(
            f"the watch of rank 0 at {address}:{port} cannot be reached: {'; '.join(problems)}; check that "
            "processes may connect to it on any port, and start the run again"
        )
    liveness = Liveness(
        watch, roster=[member for member, _ in told], rank=rank, store=store, stacks=stacks, on_fault=on_fault
    )
    dist.barrier()  # every rank's first beat is in the store
    return liveness


def _next_host(roster: Sequence[Member], me: Member) -> list[Member]:
    """The ranks of the machine behind this one, in the order of their first ranks, the last before the first."""
    hosts = list(dict.fromkeys(member.host for member in roster))
    following = hosts[(hosts.index(me.host) + 1) % len(hosts)]
    return [member for member in roster if member.host == following and following != me.host]


def _of_a_lost_peer(error: RuntimeError) -> bool:
    text = f"{type(error).__name__} {error}".lower()
    return any(word in text for word in LOST_PEER)


def _say(text: str) -> None:
    """One line on standard error, past locks that the main thread may hold."""
    os.write(2, f"{text}\n".encode())
