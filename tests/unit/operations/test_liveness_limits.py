"""When a machine or the store counts as gone, by a clock that the test turns; who watches whom."""

import pytest

from kairos_train.config.operation_schema import WatchConfig
from kairos_train.operations.watch.findings import Heartbeat
from kairos_train.operations.watch.liveness import Liveness, _next_host, _of_a_lost_peer
from kairos_train.operations.watch.members import Member

SILENCE = 30.0
ROSTER = [Member(rank, host, 100 + rank) for rank, host in enumerate("aabbcc")]


class Heard:
    """What the exchange of a rank has heard; the test says it."""

    def __init__(self):
        self.rounds, self.beats, self.lost, self.finding = 0, {}, None, None

    def hear(self, **numbers: int) -> None:
        """A round ends, with these numbers of the ranks' beats."""
        self.rounds += 1
        self.beats = {int(rank[1:]): Heartbeat(number) for rank, number in numbers.items()}


@pytest.fixture
def watch(tmp_path):
    """`watch(rank)`: a rank that is not started, and what it hears."""

    def of(rank: int) -> tuple[Liveness, Heard]:
        settings = WatchConfig(heartbeat=1.0, silence=SILENCE)
        alive = Liveness(settings, roster=ROSTER, rank=rank, store=None, stacks=tmp_path)
        alive._exchange = Heard()
        return alive, alive._exchange

    return of


def test_machines_watch_each_other_in_a_ring():
    names = [[member.rank for member in _next_host(ROSTER, ROSTER[rank])] for rank in range(6)]
    assert names == [[2, 3], [2, 3], [4, 5], [4, 5], [0, 1], [0, 1]]
    assert _next_host(ROSTER[:2], ROSTER[0]) == [], "one machine alone"


def test_a_machine_is_silent_when_none_of_its_ranks_is_heard_for_as_long_as_configured(watch):
    alive, heard = watch(0)
    for second in range(20):  # rank 3 stops at once, rank 2 after twenty seconds
        alive._clock.now = float(second)
        heard.hear(r2=second, r3=0)
        assert alive._store_gone() is None
        assert alive._silent_host() is None
    for second in range(20, 19 + int(SILENCE)):
        alive._clock.now = float(second)
        heard.hear(r2=19, r3=0)
        alive._store_gone()
        assert alive._silent_host() is None
    alive._clock.now = 19 + SILENCE
    heard.hear(r2=19, r3=0)
    alive._store_gone()
    finding = alive._silent_host()
    assert finding.kind == "silent"
    assert finding.text.startswith("rank 2 (b, pid 102), rank 3 (b, pid 103) has not been heard of for 30 s")


def test_without_answers_of_the_store_no_machine_is_silent(watch):
    alive, heard = watch(0)
    heard.hear(r2=1, r3=1)
    alive._store_gone()
    assert alive._silent_host() is None
    alive._clock.now = 10 * SILENCE  # no round has ended
    alive._store_gone()
    assert alive._silent_host() is None


def test_the_store_is_gone_when_no_round_ends_for_as_long_as_configured(watch):
    alive, heard = watch(4)
    alive._clock.now = 5.0
    heard.hear()
    assert alive._store_gone() is None
    alive._clock.now = 4.9 + SILENCE
    assert alive._store_gone() is None
    alive._clock.now = 5.0 + SILENCE
    finding = alive._store_gone()
    assert finding.text.startswith("rank 0 (a, pid 100) has not been heard of for 30 s")


def test_a_lost_connection_to_a_machine_that_is_not_seen_is_the_death_of_rank_0(watch):
    alive, heard = watch(4)
    heard.hear()
    alive._store_gone()
    heard.lost = "connection reset"
    assert alive._store_gone().text.startswith("rank 0 (a, pid 100) died")
    holder, heard = watch(0)
    heard.lost = "connection reset"
    assert holder._store_gone() is None, "rank 0 holds it"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError("NCCL error: unhandled system error"), True),
        (RuntimeError("Timed out waiting 1800000ms for recv operation"), True),
        (RuntimeError("Socket closed"), True),
        (RuntimeError("The size of tensor a (3) must match"), False),
    ],
)
def test_errors_of_communication_are_known_by_their_words(error, lost):
    assert _of_a_lost_peer(error) == lost
