"""Any run under watch: whatever happens in it, nobody is accused who does nothing, and one who does is named by all.

The ranks are simulated on a clock of their own (support/simulated_ranks.py); with real processes and real seconds:
tests/distributed/test_liveness.py.
"""

import re
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.simulated_ranks import KILLED, Simulation

from kairos_train.basics.errors import UserError
from kairos_train.config.operation_schema import WatchConfig

WATCH = WatchConfig(heartbeat=1.0, silence=10.0, stuck=60.0)
PATIENCE = 13.0  # what such a watch gives everything that still runs to answer
LIMIT = WATCH.stuck + WATCH.silence + 6 * PATIENCE  # everybody has ended by then
SOON = 2 * PATIENCE  # where nothing has to be waited for
assert WATCH.silence + SOON < WATCH.stuck  # so that what is found only because all stand still is found too late
VERBS = r" (?:died|has not been heard of|is silent|is stuck in|failed: )"


def accused(line: str) -> set[int]:
    """The ranks that a last line names as the fault."""
    text = re.sub(r"^(raised: |rank \d+ \([^)]*\): )", "", line)
    found = re.match(rf"(.*?){VERBS}", text)
    assert found, line
    return {int(rank) for rank in re.findall(r"rank (\d+) \(", found[1])}


def may_end(run: "WatchedRun") -> bool:
    """Not at once: an end is worth more after something that is no fault."""
    return not run.over and run.run.now > 30.0


class WatchedRun(RuleBasedStateMachine):
    """A run, what may happen in it without a fault, and one end of it."""

    @initialize(
        machines=st.sampled_from([(1, 2), (2, 1), (1, 1, 2), (2, 2), (1, 1), (3,)]),  # ranks of each
        seed=st.integers(0, 9),
        resets=st.booleans(),
    )
    def begin(self, machines, seed, resets):
        self.folder = tempfile.TemporaryDirectory()
        self.hosts = [host for host, size in zip("abc", machines) for _ in range(size)]
        self.size, self.over = len(self.hosts), False
        self.run = Simulation(
            hosts=self.hosts, watch=WATCH, stacks=Path(self.folder.name), seed=seed, resets=resets
        ).__enter__()
        self.run.advance(2.0)

    def teardown(self):
        if hasattr(self, "run"):
            self.run.__exit__()
            self.folder.cleanup()

    def rank(self, data) -> int:
        return data.draw(st.integers(0, self.size - 1), label="rank")

    # What is no fault.

    @precondition(lambda self: not self.over)
    @rule(seconds=st.sampled_from([0.3, 1.0, 2.0, 30.0]))
    def train(self, seconds):
        self.run.advance(seconds)

    @precondition(lambda self: not self.over)
    @rule(data=st.data(), seconds=st.sampled_from([5.0, 80.0, 200.0]))
    def a_phase_may_take_longer(self, data, seconds):
        """A checkpoint on one rank, for which the others wait."""

        def save(watch):
            with watch.paused("checkpoint"):
                self.run.sleep(seconds)

        self.run.order(self.rank(data), save)
        self.run.advance(seconds + 5.0)

    @precondition(lambda self: not self.over)
    @rule(data=st.data())
    def a_rank_is_slow(self, data):
        self.run.order(self.rank(data), lambda watch: self.run.sleep(WATCH.stuck - 4.0))
        self.run.advance(WATCH.stuck)

    @precondition(lambda self: not self.over)
    @rule(data=st.data())
    def a_rank_stalls(self, data):
        rank = self.rank(data)
        self.run.stop(rank)
        self.run.advance(WATCH.silence - 4.0)
        self.run.go_on(rank)
        self.run.advance(3.0)

    @precondition(lambda self: not self.over)
    @rule(hours=st.sampled_from([0.1, 8.0]))
    def the_job_is_suspended(self, hours):
        self.run.suspend(3600 * hours)
        self.run.advance(5.0)

    @invariant()
    def nobody_is_accused_without_a_fault(self):
        if hasattr(self, "run") and not self.over:
            assert [process.log for process in self.run.processes] == [[]] * self.size
            assert [process.code for process in self.run.processes] == [None] * self.size

    @precondition(lambda self: self.over)
    @rule()
    def nothing_more_happens(self):
        """After an end."""
        self.run.advance(1.0)

    # Ends.

    @precondition(may_end)
    @rule(data=st.data())
    def all_leave(self, data):
        """At different times; the holder of the store perhaps first."""
        self.over = True
        times = st.sampled_from([0.0, 0.4, 3.0, 12.0])
        self.run.finish([data.draw(times, label=f"rank {rank} leaves after") for rank in range(self.size)])
        self.run.advance(LIMIT)
        assert [process.code for process in self.run.processes] == [0] * self.size
        assert [process.log for process in self.run.processes] == [[]] * self.size

    @precondition(may_end)
    @rule(data=st.data())
    def a_rank_is_killed(self, data):
        self.over, rank, now = True, self.rank(data), self.run.now
        seen = rank == 0 or self.hosts.count(self.hosts[rank]) > 1
        self.run.kill(rank)
        self.run.advance(LIMIT)
        self.all_name({rank}, ended=self.but(rank), by=now + SOON + (0.0 if seen else WATCH.silence))
        assert self.run.processes[rank].code == KILLED

    @precondition(may_end)
    @rule(data=st.data())
    def a_rank_is_stopped(self, data):
        self.over, rank = True, self.rank(data)
        alone = rank == 0 or self.hosts.count(self.hosts[rank]) == 1  # else it is missed when all stand still
        now = self.run.now
        self.run.stop(rank)
        self.run.advance(LIMIT)
        self.all_name({rank}, ended=self.but(rank), by=now + WATCH.silence + SOON if alone else None)
        assert self.run.processes[rank].code is None

    @precondition(lambda self: may_end(self) and len(set(self.hosts)) > 1)
    @rule(data=st.data(), frozen=st.booleans())
    def a_machine_is_lost(self, data, frozen):
        self.over = True
        host = data.draw(st.sampled_from(sorted(set(self.hosts))), label="machine")
        lost = {rank for rank in range(self.size) if self.hosts[rank] == host}
        if frozen:
            self.run.stop(*lost)
        else:
            for rank in lost:
                self.run.kill(rank)
        now = self.run.now
        self.run.advance(LIMIT)
        self.all_name(lost, ended=self.but(*lost), by=now + WATCH.silence + SOON)

    @precondition(may_end)
    @rule(data=st.data())
    def a_rank_hangs(self, data):
        self.over, rank = True, self.rank(data)
        self.run.order(rank, lambda watch: self.run.wait_for_ever())
        self.run.advance(LIMIT)
        self.all_name({rank}, ended=range(self.size))
        assert all(" is stuck in step " in process.log[-1] for process in self.run.processes)
        stacks = sorted(path.name for path in Path(self.folder.name).glob("rank-*.txt"))
        assert stacks == [f"rank-{rank:05d}.txt" for rank in range(self.size)]

    @precondition(may_end)
    @rule(data=st.data(), bad_input=st.booleans())
    def a_rank_fails(self, data, bad_input):
        self.over, rank, now = True, self.rank(data), self.run.now

        def fail(watch):
            raise UserError("data.shards=x has no samples") if bad_input else ValueError("the tape ran out")

        self.run.order(rank, fail)
        self.run.advance(LIMIT)
        words = "UserError: data.shards=x has no samples" if bad_input else "ValueError: the tape ran out"
        code = 2 if bad_input else 4
        self.all_name({rank}, ended=self.but(rank), code=code, by=now + SOON)
        assert all(f"failed: {words}" in self.run.processes[other].log[-1] for other in self.but(rank))
        assert self.run.processes[rank].code == (2 if bad_input else 1)

    def but(self, *ranks: int) -> list[int]:
        return [rank for rank in range(self.size) if rank not in ranks]

    def all_name(self, lost: set[int], *, ended, code: int = 4, by: float | None = None) -> None:
        """Each in one line, and nobody else; all end with the code, at the time `by` at the latest."""
        for rank in ended:
            process = self.run.processes[rank]
            assert process.code == code, (rank, process)
            assert by is None or process.ended_at <= by, (rank, process)
            assert len(process.log) == 1, process.log
            named = accused(process.log[0])
            assert named, process.log
            assert named <= lost, process.log


def test_nobody_is_accused_who_does_nothing_and_one_who_does_is_named_by_all():
    run_state_machine_as_test(WatchedRun, settings=settings(max_examples=150, stateful_step_count=6, deadline=None))
