"""Who is named as the one that holds the others up; whose process counts as dead; what time counts."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kairos_train.basics.errors import MachineFault, RunStopped, UserError
from kairos_train.operations.watch import members, watchdog
from kairos_train.operations.watch.findings import Heartbeat, RunFault, died, stuck
from kairos_train.operations.watch.members import Member, process_state, this_member
from kairos_train.operations.watch.watchdog import AwakeClock, Watchdog

ROSTER = [Member(rank, "abcd"[rank // 8], 100 + rank) for rank in range(32)]
WAITING = Heartbeat(9, step=5, phase="forward", place=1, seconds=60, line="all_reduce (c10d.py:1)")


def text(beats, silent=(), state=lambda member: None):
    return stuck(ROSTER, dict(enumerate(beats)), silent=silent, seconds=60, state=state).text


def test_a_silent_rank_is_named_before_one_that_is_behind():
    beats = [WAITING, replace(WAITING, step=4), WAITING, replace(WAITING, step=6)]
    assert text(beats, silent=[3]).startswith("rank 3 (a, pid 103) is silent, last heard of in step 6, forward")
    assert text(beats).startswith("rank 1 (a, pid 101) is stuck in step 4, forward")


def test_within_a_step_the_rank_that_has_come_less_far_is_behind():
    beats = [WAITING, WAITING, replace(WAITING, phase="data", place=0)]
    assert text(beats).startswith("rank 2 (a, pid 102) is stuck in step 5, data, at all_reduce (c10d.py:1), while")


def test_at_the_same_place_the_rank_whose_code_is_elsewhere_is_named():
    assert text([WAITING, replace(WAITING, line="sleep (x.py:3)"), WAITING]).startswith("rank 1 (a, pid 101) is stuck")


@pytest.mark.parametrize("beats", [[WAITING] * 3, [WAITING, replace(WAITING, line="sleep (x.py:3)")]])
def test_nobody_is_accused_without_a_difference_that_tells(beats):
    assert text(beats).startswith("all ranks are stuck in step 5, forward, at all_reduce (c10d.py:1) for 60 s; none is")


def test_many_ranks_are_counted_not_listed():
    found = died(ROSTER, {})
    assert found.text.endswith("rank 7 (a, pid 107) and 24 more died")


@pytest.mark.parametrize(("code", "kind"), [(2, UserError), (3, RunStopped), (4, MachineFault), (1, MachineFault)])
def test_a_finding_becomes_the_error_of_its_exit_code_and_survives_the_store(code, kind):
    error = RunFault.decode(RunFault("failed", "rank 1 failed: x", code).encode().encode()).error()
    assert type(error) is kind
    assert ("start the run again" in str(error)) == (code == 4)


def test_a_beat_survives_the_store():
    assert Heartbeat.decode(WAITING.encode().encode()) == WAITING


def test_a_process_is_dead_as_soon_as_it_has_ended_though_its_parent_has_not_asked():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        me = this_member(0)
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        other = Member(1, me.host, child.pid, int(fields[19]), me.space)
        assert me.sees(other)
        assert process_state(other) in tuple("RSD")
        assert process_state(replace(other, started=other.started + 1)) is None  # the pid of another process
        child.kill()
        deadline = time.monotonic() + 60
        while process_state(other) is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process_state(other) is None  # a zombie still


@pytest.mark.parametrize(
    ("state", "started", "seen"),
    [("R", 77, "R"), ("T", 77, "T"), ("D", 77, "D"), ("Z", 77, None), ("X", 77, None), ("S", 78, None)],
)
@pytest.mark.parametrize("name", ["python", "a) b (c) Z"])
def test_a_process_is_read_from_behind_its_name_which_may_hold_anything(
    tmp_path, monkeypatch, name, state, started, seen
):
    monkeypatch.setattr(members, "PROC", tmp_path)
    (tmp_path / "5").mkdir()
    (tmp_path / "5/stat").write_text(f"5 ({name}) {state} {' '.join(map(str, range(4, 22)))} {started} 23 24")
    assert process_state(Member(1, "a", 5, started=77)) == seen
    assert process_state(Member(1, "a", 6, started=77)) is None


def test_places_are_counted_anew_in_every_step():
    dog = Watchdog(60.0, AwakeClock(1.0))
    places = []
    for step, phase in ((1, "data"), (1, "forward"), (1, "update"), (2, "data"), (2, "forward")):
        dog.at(step, phase)
        beat = dog.beat(0)
        places.append((beat.step, beat.phase, beat.place))
    assert places == [(1, "data", 0), (1, "forward", 1), (1, "update", 2), (2, "data", 0), (2, "forward", 1)]


def test_ranks_under_other_names_or_in_other_containers_are_not_looked_up_by_pid():
    me = this_member(0)
    assert not me.sees(replace(me, host="elsewhere"))
    assert not me.sees(replace(me, space="another"))
    assert not replace(me, space="").sees(replace(me, space=""))


def test_hours_in_which_a_job_was_suspended_do_not_count(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    clock = AwakeClock(1.0)
    dog = Watchdog(60.0, clock)
    dog.at(1, "forward")
    for gap in (1.0, 7200.0, 1.0):
        now[0] += gap
        clock.tick()
        assert dog.overdue() is None
    for _ in range(70):
        now[0] += 1.0
        clock.tick()
    assert dog.overdue() > 60


def test_a_pause_has_its_own_limit_and_ends():
    clock = AwakeClock(1.0)
    dog = Watchdog(10.0, clock)
    dog.at(3, "forward")
    with dog.paused("checkpoint", times=2.0):
        assert dog.beat(1).phase == "checkpoint"
        clock.now += 15
        assert dog.overdue() is None
        assert dog.beat(2).patient
        clock.now += 10
        assert dog.overdue() == 25
        assert not dog.beat(3).patient
    assert dog.overdue() is None
    assert (dog.beat(4).phase, dog.beat(4).patient) == ("forward", False)
