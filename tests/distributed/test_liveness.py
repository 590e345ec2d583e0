"""Ranks that die, hang, stop or fail are named by the others, which then end by themselves.

With real processes and real seconds, in some plays; what any run may come to, on a clock of its own:
tests/unit/operations/test_watch_machine.py.
"""

import multiprocessing as mp
import pickle
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.liveness_ranks import live

from kairos_train.config.operation_schema import WatchConfig

pytestmark = pytest.mark.waits

SIZE = 3
HEARTBEAT = 0.2
PATIENT = 300.0  # seconds that nothing here takes
LIMIT = 120.0
HOST = socket.gethostname()
NIGHTLY_0, NIGHTLY_2 = (pytest.param(who, marks=pytest.mark.nightly) for who in (0, 2))


@dataclass
class Ended:
    """What became of a world: exit codes (None: it had to be killed), what each rank said, their pids."""

    codes: list[int | None]
    logs: list[str]
    pids: list[int]
    seconds: float
    stacks: Path = field(default_factory=Path)


@pytest.fixture
def play(tmp_path):
    """`play(deed, who)`: a world in which rank `who` does something; see `liveness_ranks`."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed"])
    started = []

    def run(deed, who, *, silence=PATIENT, stuck=PATIENT, hosts=(None,) * SIZE, left_over=()):
        watch = WatchConfig(heartbeat=HEARTBEAT, silence=silence, stuck=stuck)
        begin = time.monotonic()
        for rank, host in enumerate(hosts):
            arguments = (rank, len(hosts), tmp_path, watch, deed, who, host)
            started.append(context.Process(target=live, args=arguments, daemon=True))
            started[-1].start()
        for rank, process in enumerate(started):
            if rank not in left_over:
                process.join(max(0.0, begin + LIMIT - time.monotonic()))
        codes = [process.exitcode for process in started]
        logs = [(tmp_path / f"rank-{rank}.log").read_text() for rank in range(len(hosts))]
        pids = [process.pid for process in started]
        return Ended(codes, logs, pids, time.monotonic() - begin, tmp_path / "stacks")

    yield run
    for process in started:
        process.kill()
        process.join()


def told(log):
    """The lines of a log that say why a process ends: torch's own words are left out."""
    return [line for line in log.splitlines() if line.startswith(("raised: ", "rank "))]


@pytest.mark.parametrize("who", [NIGHTLY_0, 1])
def test_a_killed_rank_is_named_by_all_others(play, who):
    ended = play("kill", who)
    assert ended.codes == [-9 if rank == who else 4 for rank in range(SIZE)], ended.logs
    for rank in {0, 1, 2} - {who}:
        assert len(told(ended.logs[rank])) == 1, ended.logs[rank]
        assert f"rank {who} ({HOST}, pid {ended.pids[who]}) died" in told(ended.logs[rank])[0]
        assert "start the run again" in told(ended.logs[rank])[0]


@pytest.mark.parametrize("who", [0, NIGHTLY_2])
def test_ranks_whose_main_thread_waits_for_ever_end_all_the_same(play, who):
    ended = play("apart: kill", who)
    assert ended.codes == [-9 if rank == who else 4 for rank in range(SIZE)], ended.logs
    for rank in {0, 1, 2} - {who}:
        (line,) = told(ended.logs[rank])
        assert line.startswith(f"rank {rank} ({HOST}, pid {ended.pids[rank]}): rank {who} ")
        assert "this process ends with exit code 4; start the run again" in line


@pytest.mark.nightly
@pytest.mark.parametrize("who", [0, 1])
def test_the_last_words_of_a_failing_rank_are_passed_on_and_it_keeps_its_traceback(play, who):
    ended = play("raise", who)
    assert ended.codes == [1 if rank == who else 4 for rank in range(SIZE)], ended.logs
    assert "Traceback" in ended.logs[who]
    assert told(ended.logs[who]) == []
    for rank in {0, 1, 2} - {who}:
        assert f"rank {who} ({HOST}, pid {ended.pids[who]}) failed: ValueError: the tape ran out" in ended.logs[rank]


@pytest.mark.nightly
def test_bad_input_that_one_rank_finds_ends_all_as_bad_input(play):
    ended = play("bad input", 1)
    assert ended.codes == [2] * SIZE, ended.logs
    assert all("failed: UserError: data.shards=x has no samples" in ended.logs[rank] for rank in (0, 2))


def test_a_stopped_rank_is_named_within_the_watchdogs_limit_and_stacks_are_written(play):
    ended = play("stop", 2, stuck=5, left_over=[2])
    assert ended.codes == [4, 4, None], ended.logs
    for rank in (0, 1):
        (line,) = told(ended.logs[rank])
        assert f"rank 2 ({HOST}, pid {ended.pids[2]}) is silent, last heard of in step 3, data" in line
        assert "(its process is stopped), while rank 0 (" in line
        assert "all_reduce" in (ended.stacks / f"rank-{rank:05d}.txt").read_text()
        with (ended.stacks / f"collectives_{rank}").open("rb") as file:
            assert [e["profiling_name"] for e in pickle.load(file)["entries"]].count("gloo:all_reduce") >= 3


def test_a_stopped_rank_0_takes_the_store_with_it_and_is_named(play):
    ended = play("stop", 0, stuck=5, left_over=[0])
    assert ended.codes == [None, 4, 4], ended.logs
    for rank in (1, 2):
        (line,) = told(ended.logs[rank])
        assert f"rank 0 ({HOST}, pid {ended.pids[0]}) has not been heard of" in line
        assert "its process is stopped" in line


@pytest.mark.nightly
@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_hangs_is_told_from_those_that_wait_for_it(play, who):
    ended = play("hang", who, stuck=5)
    assert ended.codes == [4] * SIZE, ended.logs
    for rank in range(SIZE):
        (line,) = told(ended.logs[rank])
        assert f"rank {who} ({HOST}, pid {ended.pids[who]}) is stuck in step 3, data, at dawdle (" in line
        assert "wait in step 3, forward, at all_reduce (" in line
        assert ("in dawdle" in (ended.stacks / f"rank-{rank:05d}.txt").read_text()) == (rank == who)


@pytest.mark.nightly
def test_a_phase_that_may_take_longer_stops_neither_its_rank_nor_those_that_wait(play):
    ended = play("pause", 1, stuck=3)
    assert (ended.codes, ended.logs) == ([0] * SIZE, [""] * SIZE)


@pytest.mark.parametrize("who", [NIGHTLY_0, 1])
def test_a_normal_end_is_taken_for_no_death_whoever_leaves_first(play, who):
    """Rank 0 holds the store: with `who` 1 it is gone while that rank is still at work."""
    ended = play("leave last", who, silence=3)
    assert (ended.codes, ended.logs) == ([0] * SIZE, [""] * SIZE)
    assert not ended.stacks.exists()


@pytest.mark.nightly
@pytest.mark.parametrize(("who", "hosts"), [(2, ("a", "a", "b")), (0, ("a", "b", "c"))])
def test_a_silent_machine_is_named(play, who, hosts):
    ended = play("stop", who, silence=4, hosts=hosts, left_over=[who])
    assert [code for rank, code in enumerate(ended.codes) if rank != who] == [4, 4], ended.logs
    for rank in {0, 1, 2} - {who}:
        (line,) = told(ended.logs[rank])
        assert f"rank {who} ({hosts[who]}, pid {ended.pids[who]}) has not been heard of for" in line


@pytest.mark.nightly
def test_a_process_that_died_on_another_machine_is_named_by_its_neighbours_there(play):
    ended = play("kill", 1, hosts=("a", "b", "b"))
    assert ended.codes == [4, -9, 4], ended.logs
    assert all(f"rank 1 (b, pid {ended.pids[1]}) died" in ended.logs[rank] for rank in (0, 2))


@pytest.mark.nightly
def test_one_process_alone_has_its_watchdog(play):
    ended = play("hang", 0, stuck=2, hosts=(None,))
    assert ended.codes == [4], ended.logs
    assert "is stuck in step 3, data, at dawdle (" in told(ended.logs[0])[0]
    assert "in dawdle" in (ended.stacks / "rank-00000.txt").read_text()
