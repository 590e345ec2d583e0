"""Whoever says goodbye asks nothing more of the store, which may be gone as soon as its holder has counted it."""

import time

import pytest

from kairos_train.operations.watch.exchange import FINDING, RELEASED, HeartbeatExchange, open_store
from kairos_train.operations.watch.findings import Heartbeat, RunFault

HEARTBEAT = 0.05


class Recorded:
    """A store that writes down what is asked of it."""

    def __init__(self, store):
        self.asked, self._store = [], store

    def __getattr__(self, name):
        def ask(*arguments):
            self.asked.append((name, *arguments))
            return getattr(self._store, name)(*arguments)

        return ask


@pytest.fixture
def rank_1():
    """Rank 1 of two, its store, and the store of rank 0, whose part the test plays."""
    held = open_store("127.0.0.1", holds=True, seconds=10)
    held.set(FINDING, "")
    held.set("beat/0", Heartbeat(1).encode())
    store = Recorded(open_store("127.0.0.1", port=held.port, seconds=10))
    exchange = HeartbeatExchange(store, rank=1, size=2, watched=[0], heartbeat=HEARTBEAT, beat=lambda: Heartbeat(1))
    exchange.start()
    return exchange, store, held


def counted(held, store):
    """Wait until rank 1 is counted, then a few heartbeats longer; what it asked for last."""
    end = time.monotonic() + 20
    while held.add(RELEASED, 0) < 1:
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(5 * HEARTBEAT)
    return store.asked[-1]


def test_a_rank_that_leaves_first_is_counted_last_of_all(rank_1):
    exchange, store, held = rank_1
    exchange.leave(seconds=10)
    assert counted(held, store) == ("add", RELEASED, 1)
    assert Heartbeat.decode(held.get("beat/1")).gone


def test_a_rank_that_hears_of_the_end_is_counted_last_of_all(rank_1):
    exchange, store, held = rank_1
    held.set(FINDING, RunFault("end").encode())
    assert counted(held, store) == ("add", RELEASED, 1)
    assert not Heartbeat.decode(held.get("beat/1")).gone
    exchange.leave(seconds=10)
    assert store.asked[-1] == ("add", RELEASED, 1)  # the goodbye comes too late to be said
    assert exchange.lost is None


def test_a_finding_is_known_here_only_when_this_rank_has_been_counted(rank_1):
    """It may end this process at any moment."""
    exchange, store, held = rank_1
    held.set(FINDING, RunFault("died", "rank 0 died").encode())
    end = time.monotonic() + 20
    while exchange.finding is None:
        assert time.monotonic() < end
    assert ("add", RELEASED, 1) in store.asked
    exchange.leave(seconds=10)


# --- round by round, without the thread ---


def members_of(count: int, *, beats: list[Heartbeat] | None = None):
    """Exchanges of `count` ranks on one store, and that store."""
    held = open_store("127.0.0.1", holds=True, seconds=10)
    held.set(FINDING, "")
    beats = beats or [Heartbeat(1)] * count
    clients = [held, *(open_store("127.0.0.1", port=held.port, seconds=10) for _ in range(count - 1))]
    exchanges = [
        HeartbeatExchange(
            client,
            rank=rank,
            size=count,
            watched=[other for other in range(count) if other != rank],
            heartbeat=0.001,
            beat=lambda rank=rank: beats[rank],
        )
        for rank, client in enumerate(clients)
    ]
    return exchanges, held


def test_who_comes_first_with_a_finding_is_heard_by_all():
    (zero, one, two), _ = members_of(3)
    one._outbox, two._outbox = (RunFault("died", f"rank {rank} died") for rank in (0, 2))
    for exchange in (one, two, zero):
        exchange._round()
    assert [exchange.finding.text for exchange in (zero, one, two)] == ["rank 0 died"] * 3


def test_the_holder_of_the_store_waits_for_every_other_rank():
    (zero, one, two), held = members_of(3)
    one._outbox = RunFault("died", "rank 1 died")
    one._round()
    zero._round()
    assert held.add(RELEASED, 0) == 1
    assert not zero._released.is_set()
    two._round()
    two._round()
    zero._round()
    assert held.add(RELEASED, 0) == 2, "each is counted once"
    assert zero._released.is_set()


def test_one_rank_alone_looks_for_what_is_stuck():
    exchanges, _ = members_of(3)
    for exchange in exchanges:
        exchange._claim_wanted = True
        exchange._round()
    assert [exchange._claims for exchange in exchanges] == [1, 2, 3]
    first, second, _ = exchanges
    for exchange in exchanges:
        exchange._claimed.clear = lambda: None  # the answer has come already
    assert (first.claim(seconds=0), second.claim(seconds=0)) == (True, False)


def test_a_census_tells_who_is_silent_and_leaves_out_who_has_gone():
    beats = [Heartbeat(1), Heartbeat(1), Heartbeat(1), Heartbeat(1)]
    (zero, one, two, three), held = members_of(4, beats=beats)
    three._gone = True
    for exchange in (one, two, three):
        exchange._round()

    class Meanwhile:
        """In place of the pause between two looks: rank 1 goes on, rank 2 does not."""

        number = 1

        def wait(self, seconds):
            self.number += 1
            held.set("beat/1", Heartbeat(self.number).encode())

        def clear(self):
            beats[0] = Heartbeat(self.number)

    zero._wake, zero._census_wanted = Meanwhile(), True
    zero._round()
    found, silent = zero._census
    assert sorted(found) == [0, 1, 2]
    assert silent == [2]
