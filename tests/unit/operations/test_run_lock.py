"""One job at a time in a run directory, whatever becomes of the one that has it."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kairos_train.basics.errors import UserError
from kairos_train.operations.run_lock import LOCK, RunLock, read_owner

ROOT = Path(__file__).resolve().parents[3]


def refused(run_dir: Path, wait: float = 0) -> str:
    """The line that a second job gets."""
    with pytest.raises(UserError) as error:
        RunLock(run_dir, wait=wait)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_second_job_is_refused_and_told_who_has_the_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with RunLock(tmp_path / "deep/run"):
        line = refused(tmp_path / "deep/run")
        assert line.startswith(f"run_dir={tmp_path / 'deep/run'} is in use by process {os.getpid()} on host ")
        assert line.endswith("; wait for its end, end it, or choose another run_dir")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with RunLock(tmp_path / "deep/run"):
        line = refused(tmp_path / "deep/run")
        assert f"job 4711, process {os.getpid()} on host " in line
        assert "end it (scancel 4711)" in line


def test_what_was_released_can_be_taken_and_names_nobody(tmp_path):
    with RunLock(tmp_path) as lock:
        assert read_owner(tmp_path)["pid"] == os.getpid()
        lock.release()
        assert read_owner(tmp_path) is None
        with RunLock(tmp_path, wait=0):
            lock.release()  # of the first one: no effect on the second
            refused(tmp_path)
    assert (tmp_path / LOCK).is_file()


def test_a_successor_waits_for_a_predecessor_that_is_just_ending(tmp_path):
    first, said = RunLock(tmp_path), []
    timer = threading.Timer(0.5, first.release)
    timer.start()
    with RunLock(tmp_path, wait=60, say=said.append):
        assert not timer.is_alive()
    assert len(said) == 1
    assert f"process {os.getpid()} on host" in said[0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}'])
def test_an_owner_that_cannot_be_read_is_admitted(tmp_path, content):
    with RunLock(tmp_path):
        (tmp_path / LOCK).write_text(content)
        assert "in use by another process (which one its lock does not say)" in refused(tmp_path)


def test_a_directory_that_cannot_be_made_or_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be made or written (File exists" in refused(tmp_path / "file")
    assert "cannot be made or written (Not a directory" in refused(tmp_path / "file/run")
    (tmp_path / "run" / LOCK).mkdir(parents=True)
    assert "cannot be made or written (Is a directory" in refused(tmp_path / "run")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_an_error_with_a_remedy(tmp_path, monkeypatch, number):
    def without_locks(file, how):
        raise OSError(number, os.strerror(number))

    before = set(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", without_locks)
        line = refused(tmp_path, wait=60)
    assert f"keeps no file locks ({os.strerror(number)})" in line
    assert "choose a run_dir on another file system" in line
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """Between opening and locking another may have tidied up; a third one then locks a file of its own."""
    lock_file, real, locked = tmp_path / LOCK, fcntl.flock, []

    def late(file, how):
        if not locked:
            lock_file.unlink()
        locked.append(file)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with RunLock(tmp_path, wait=60):
        assert len(locked) == 2
        assert read_owner(tmp_path)["pid"] == os.getpid()
        monkeypatch.undo()
        refused(tmp_path)


HOLDER = """
import json, multiprocessing, os, subprocess, sys, time
from kairos_train.operations.run_lock import RunLock

def start(kind):
    if kind in ("fork", "spawn"):
        process = multiprocessing.get_context(kind).Process(target=time.sleep, args=(600,))
        process.start()
        return process.pid
    if kind == "command":
        return subprocess.Popen(["sleep", "600"], close_fds=False).pid
    if kind == "loader":
        import torch
        class Slow(torch.utils.data.Dataset):
            def __len__(self):
                return 2
            def __getitem__(self, i):
                time.sleep(600)
        items = iter(torch.utils.data.DataLoader(Slow(), num_workers=1))
        kept.append(items)
        return items._workers[0].pid

if __name__ == "__main__":
    kept = [RunLock(sys.argv[1], wait=0)]
    print(json.dumps([start(kind) for kind in sys.argv[2:]]), flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def killed_holder(script: Path, run_dir: Path, *children: str):
    """The processes that a holder left when it was killed."""
    script.write_text(HOLDER)
    command = [sys.executable, script, run_dir, *children]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True)
    try:
        left = json.loads(holder.stdout.readline())
        assert f"process {holder.pid} on host" in refused(run_dir)
        holder.kill()
        holder.wait()
        yield left
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()
        holder.stdout.close()


def is_running(pid: int) -> bool:
    """There, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("child", ["fork", "spawn", "command", "loader"])
def test_a_killed_job_leaves_no_lock_though_a_child_of_it_lives_on(tmp_path, child):
    run_dir = tmp_path / "run"
    with killed_holder(tmp_path / "holder.py", run_dir, child) as (pid,), RunLock(run_dir, wait=0):
        assert is_running(pid)
        assert read_owner(run_dir)["pid"] == os.getpid()


def test_a_child_that_ends_leaves_the_lock_with_its_parent(tmp_path):
    with RunLock(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0,))
        child.start()
        child.join()
        assert child.exitcode == 0
        refused(tmp_path)
