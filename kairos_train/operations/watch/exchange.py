"""Heartbeats and findings of all ranks, through a key-value store that rank 0 holds. One thread per process.

It has a thread to itself because a store whose holder is stopped does not time out: torch's client then blocks for
ever, connecting included. The judging thread must never wait for it.

What it costs with n ranks on machines of m: each rank writes one value and reads one finding and 2 m values per
heartbeat, in two requests of together about 0.2 kB up and m / 2.5 kB down. With 512 ranks on machines of 8 that is a
thousand requests and 1.7 MB a second at the store. Only who looks for what is stuck reads the beats of all ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from kairos_train.operations.watch.findings import Heartbeat, RunFault

if TYPE_CHECKING:
    from torch.distributed import TCPStore

FINDING, CLAIMS, RELEASED = "finding", "claims", "released"
CENSUS_BEATS = 5  # heartbeats between the two looks that tell who is silent


class HeartbeatExchange:
    """Beats out, beats and findings in.

    Args:
        store: a client of this process, used by no one else; rank 0 has written "" under FINDING.
        rank, size: of this process in the world.
        watched: ranks whose beats are read.
        heartbeat: seconds.
        beat: this rank's newest beat.

    Attributes:
        rounds: how often beats went out and came in.
        beats: what the watched ranks last told, by rank.
        finding: what somebody has found; None so far.
        lost: why the store is gone; None: it is there.
    """

    def __init__(
        self,
        store: TCPStore,
        *,
        rank: int,
        size: int,
        watched: Sequence[int],
        heartbeat: float,
        beat: Callable[[], Heartbeat],
    ) -> None:
        self.rounds, self.lost, self.finding = 0, None, None
        self.beats: dict[int, Heartbeat] = {}
        self._store, self._rank, self._size, self._watched = store, rank, size, list(watched)
        self._heartbeat, self._beat = heartbeat, beat
        self._outbox: RunFault | None = None
        self._gone = self._told_release = False
        self._wake, self._stop = threading.Event(), False
        self._found = threading.Event()
        self._released = threading.Event()
        self._census: tuple[dict[int, Heartbeat], list[int]] | None = None
        self._census_wanted, self._counted = False, threading.Event()
        self._claims = 0
        self._claim_wanted, self._claimed = False, threading.Event()
        store.set(_key(rank), Heartbeat(0).encode())
        self._thread = threading.Thread(target=self._run, name="exchange", daemon=True)

    def start(self) -> None:
        """Begin. Every rank's first beat must be in the store by now."""
        self._thread.start()

    # What other threads ask for; each waits no longer than it says.

    def publish(self, finding: RunFault, *, seconds: float) -> RunFault:
        """Tell all ranks. Who comes first is heard: returns that finding; this one where the store does not answer."""
        self._outbox = finding
        self._wake.set()
        self._found.wait(seconds)
        return self.finding or finding

    def claim(self, *, seconds: float) -> bool | None:
        """Whether this rank is the first that asks; None: no answer."""
        self._claimed.clear()
        self._claim_wanted = True
        self._wake.set()
        return self._claims == 1 if self._claimed.wait(seconds) and not self.lost else None

    def census(self, *, seconds: float) -> tuple[dict[int, Heartbeat], list[int]] | None:
        """Beats of all ranks that have not ended, and those of them that are silent; None: no answer."""
        self._counted.clear()
        self._census_wanted = True
        self._wake.set()
        return self._census if self._counted.wait(seconds) and not self.lost else None

    def leave(self, *, seconds: float) -> None:
        """Say goodbye and end the thread. The holder of the store first waits for all others to have heard it."""
        self._gone = True
        if self._rank == 0:
            self.publish(RunFault("end"), seconds=seconds)
            self._released.wait(seconds)
        self.stop(seconds=seconds)

    def linger(self, *, seconds: float) -> None:
        """The holder of the store waits until all others have heard of the finding."""
        if self._rank == 0:
            self._released.wait(seconds)

    def stop(self, *, seconds: float) -> None:
        """End the thread, without a goodbye. An interpreter that ends while it is in torch's client aborts."""
        self._stop = True
        self._wake.set()
        self._thread.join(seconds)

    # The thread.

    def _run(self) -> None:
        try:
            while not self._stop:
                self._round()
                if self._rank and self.finding and self.finding.kind == "end":
                    break
                self._wake.wait(self._heartbeat)
                self._wake.clear()
            self._store.set(_key(self._rank), self._own_beat().encode())
            self._release()  # the last request, and one with an answer: the store may be gone as soon as it is counted
        except RuntimeError as error:  # of torch.distributed: all of its store's errors are
            self.lost = str(error).splitlines()[0]
            for event in (self._found, self._released, self._claimed, self._counted):
                event.set()  # nobody has to wait any more

    def _round(self) -> None:
        store = self._store
        store.set(_key(self._rank), self._own_beat().encode())
        if self._outbox is not None:
            store.compare_set(FINDING, "", self._outbox.encode())
        found, *texts = store.multi_get([FINDING, *map(_key, self._watched)])
        self.beats = {rank: Heartbeat.decode(text) for rank, text in zip(self._watched, texts)}
        if found and self.finding is None:
            finding = RunFault.decode(found)
            if finding.kind != "end":  # it may end this process at any moment
                self._release()
            self.finding = finding
            self._found.set()
        if self._rank == 0 and self.finding and store.add(RELEASED, 0) >= self._size - 1:
            self._released.set()
        if self._claim_wanted:
            self._claim_wanted, self._claims = False, store.add(CLAIMS, 1)
            self._claimed.set()
        if self._census_wanted:
            self._census_wanted = False
            first = self._all_beats()
            for _ in range(CENSUS_BEATS):
                self._wake.wait(self._heartbeat)
                self._wake.clear()
                store.set(_key(self._rank), self._own_beat().encode())
            beats = self._all_beats()
            silent = [rank for rank, beat in beats.items() if rank in first and beat.number == first[rank].number]
            self._census = beats, silent
            self._counted.set()
        self.rounds += 1

    def _all_beats(self) -> dict[int, Heartbeat]:
        texts = self._store.multi_get([_key(rank) for rank in range(self._size)])
        beats = {rank: Heartbeat.decode(text) for rank, text in enumerate(texts)}
        return {rank: beat for rank, beat in beats.items() if not beat.gone or rank == self._rank}

    def _own_beat(self) -> Heartbeat:
        return replace(self._beat(), gone=self._gone)

    def _release(self) -> None:
        """Count this rank, once, as one that needs the store no more."""
        if self._rank and not self._told_release:
            self._told_release = True
            self._store.add(RELEASED, 1)


def open_store(address: str, *, port: int = 0, holds: bool = False, seconds: float) -> TCPStore:
    """A client of the store, and on its holder the store itself, on a free port of all of its addresses.

    Raises:
        RuntimeError: no connection within `seconds`.
    """
    from torch.distributed import TCPStore

    return TCPStore(
        address, port, None, holds, timeout=timedelta(seconds=seconds), wait_for_workers=False, multi_tenant=False
    )


def _key(rank: int) -> str:
    return f"beat/{rank}"
