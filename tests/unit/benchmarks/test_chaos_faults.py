"""The faults that the chaos benchmark inflicts are what they say, and end when they should."""

import io
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from chaos import plan_faults  # noqa: E402
from chaos_parts.attempt import HUNG, STUCK, Attempt  # noqa: E402
from chaos_parts.faults import INFLICT, KINDS, UNREADABLE, make_unreadable  # noqa: E402
from chaos_parts.slow_disk import CALLS  # noqa: E402

SLOWED = """
import os, sys
from pathlib import Path
from chaos_parts.slow_disk import slow_while

waits, flag, folder = [], Path("slow"), Path(".")
slow_while(flag, 0.3, sleep=waits.append)
for _ in range(2):
    (folder / "a").write_text("text")
    handle = os.open("a", os.O_RDONLY)
    os.pread(handle, 1, 0), os.fsync(handle), os.close(handle)
    os.replace("a", "b")
    pid = os.fork()
    if not pid:
        os._exit((folder / "b").read_text() != "text" or len(waits))
    print(len(waits), waits[:1], os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    flag.touch()
flag.unlink()
before = len(waits)
Path("b").read_text()
print(len(waits) - before)
"""


def test_every_kind_of_fault_is_inflicted_as_often_as_the_others():
    assert set(INFLICT) == set(KINDS)
    runs, packing = plan_faults(100, [*KINDS], random.Random(0))
    kinds = [kind for run in runs for kind in run]
    assert {kinds.count(kind) for kind in KINDS} == {9}
    assert packing == 10


@pytest.mark.parametrize("how", UNREADABLE)
def test_what_stands_in_the_place_of_a_file_cannot_be_opened(tmp_path, how):
    if how == "without rights" and os.geteuid() == 0:
        pytest.skip("root opens it all the same")
    (tmp_path / "checkpoint").mkdir()
    file = tmp_path / "checkpoint" / "manifest.json"
    file.write_text("{}")
    make_unreadable(file, how)
    assert os.path.lexists(file)
    with pytest.raises(OSError):
        file.open("rb")
    shutil.rmtree(tmp_path / "checkpoint")


def test_a_slow_disk_is_slow_for_a_process_and_its_forks_as_long_as_the_flag_is_there(tmp_path):
    command = [sys.executable, "-c", SLOWED]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS)},
        capture_output=True,
        text=True,
        check=True,
    )
    quick, slow, again = done.stdout.splitlines()
    assert quick == "0 [] 0"
    count, _, code = slow.split()
    assert (count, int(code) > int(count)) == ("5", True), "write, open, read, sync, rename; then the fork's own"
    assert again == "0"
    assert (io, "open") in CALLS, "of pathlib"


def test_a_loader_hangs_for_its_rank_before_the_ranks_hang_for_each_other():
    assert HUNG + 1 < STUCK


def test_loaders_are_what_a_rank_has_forked():
    """Not the processes that it has started by another command."""
    code = (
        "import os, subprocess, time\nsubprocess.Popen(['sleep', '60'])\nos.fork()\nprint(flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as rank:
        try:
            rank.stdout.readline(), rank.stdout.readline()
            attempt = object.__new__(Attempt)
            attempt.ranks = [rank]
            (child,) = attempt.loaders(0)
            assert child != rank.pid
        finally:
            os.killpg(rank.pid, 9)
    end = time.monotonic() + 10
    while attempt.loaders(0) and time.monotonic() < end:
        time.sleep(0.01)
    assert attempt.loaders(0) == []
