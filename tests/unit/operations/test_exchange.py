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
