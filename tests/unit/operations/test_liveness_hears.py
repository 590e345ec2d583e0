"""A rank whose own limit ends in the moment in which another's finding arrives says what was found, not itself."""

import time

import pytest

from kairos_train.config.operation_schema import WatchConfig
from kairos_train.operations.watch.exchange import FINDING, open_store
from kairos_train.operations.watch.findings import Heartbeat, RunFault
from kairos_train.operations.watch.liveness import Liveness
from kairos_train.operations.watch.members import this_member

FOUND = RunFault("stuck", "rank 1 (elsewhere, pid 7) is stuck in step 3, data")


@pytest.fixture
def heard(tmp_path):
    """`heard(finding)`: a rank 0 that has heard of it, without its watching thread, which would end this process."""
    exchanges = []

    def hear(finding: RunFault) -> Liveness:
        store = open_store("127.0.0.1", holds=True, seconds=10)
        store.set(FINDING, finding.encode())
        store.set("beat/1", Heartbeat(1).encode())
        roster = [this_member(0), this_member(1)]
        liveness = Liveness(WatchConfig(heartbeat=0.05), roster=roster, rank=0, store=store, stacks=tmp_path)
        exchanges.append(liveness._exchange)
        liveness._exchange.start()
        for _ in range(200):
            if liveness._exchange.finding:
                break
            time.sleep(0.05)
        assert liveness._exchange.finding == finding
        return liveness

    yield hear
    for exchange in exchanges:
        exchange.stop(seconds=10)


def test_a_finding_that_has_just_arrived_is_believed(heard):
    assert heard(FOUND)._look_into(6.0) == FOUND


def test_a_rank_that_is_left_alone_by_a_normal_end_names_itself(heard):
    finding = heard(RunFault("end"))._look_into(6.0)
    assert finding.text.startswith("rank 0 (")
    assert "is stuck in step 0, start" in finding.text


def test_a_rank_that_ends_by_its_own_error_is_not_ended_by_what_that_looks_like_elsewhere(heard):
    liveness = heard(FOUND)
    assert liveness._judge() == FOUND
    liveness.last_words("ValueError: the tape ran out")
    assert liveness._judge() is None
    assert liveness.explain(RuntimeError("connection reset by peer"), wait=0.0) is None
