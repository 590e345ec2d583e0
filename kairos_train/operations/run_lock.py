"""A run directory that two jobs can not both write: rank 0 holds a lock on `RUN_DIR/.lock` while the run goes.

The kernel releases it when the process ends, however it ends, so a lock is never left behind. The file stays; while the
lock is held it says in JSON who holds it. A lock by `flock` belongs to the open file, which a forked process shares
(loader workers are forked) and would keep locked after the death of its parent: so a child closes its copy at once.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import weakref
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from kairos_train.basics.errors import UserError

LOCK = ".lock"
WAIT = 60.0  # seconds for a predecessor that is just ending: a job that was requeued may start before its end
PAUSE = 0.2  # seconds between two attempts
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
LONGEST_OWNER = 65536  # bytes of the file that are read


class RunLock:
    """The lock of one run directory, taken when this is made. A context manager; `release` may be called again.

    Only one process of a run takes it.

    Args:
        run_dir: made when missing.
        wait: seconds to wait for another process to let go of it.
        say: told once that it is waited for.

    Raises:
        UserError: the directory cannot be made or written, its file system has no locks, or another process has it
            for longer than `wait`; that one is named.
    """

    def __init__(self, run_dir: Path, *, wait: float = WAIT, say: Callable[[str], Any] = lambda text: None) -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / LOCK
        self._file: int | None = None
        os.register_at_fork(after_in_child=partial(_close_in_child, weakref.ref(self)))
        deadline, told = time.monotonic() + wait, False
        while not self._try():
            if time.monotonic() >= deadline:
                raise UserError(self._in_use())
            if not told:
                say(f"run_dir={run_dir} is in use by {self._owner()}; waiting for its end for {wait:g} s at most")
                told = True
            time.sleep(min(PAUSE, max(0.0, deadline - time.monotonic())))

    def release(self) -> None:
        """Let go of it."""
        file, self._file = self._file, None
        if file is not None:
            try:
                os.ftruncate(file, 0)  # nobody has it now
            except OSError:
                pass  # a full or vanished disk: the next holder writes its own name
            finally:
                os.close(file)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def close_inherited(self) -> None:
        """In a forked child: close the copy of the file. Unlocking it would unlock the parent's, closing does not."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _try(self) -> bool:
        """Take the lock unless another has it."""
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(
                f"run_dir={self.run_dir}: cannot be made or written ({error.strerror}: {error.filename}); "
                "choose another run_dir, or make it writable"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_current(file):  # the file was removed between opening and locking: this is another's grave
                os.close(file)
                return False
            self._write_owner(file)
        except OSError as error:
            os.close(file)
            if error.errno in HELD:
                return False
            raise UserError(self._cannot(error)) from None
        self._file = file
        return True

    def _is_current(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _write_owner(self, file: int) -> None:
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        os.ftruncate(file, 0)
        os.pwrite(file, (json.dumps(owner) + "\n").encode(), 0)

    def _owner(self) -> str:
        """Who has it, as far as the file says."""
        owner = read_owner(self.run_dir)
        if owner is None:
            return "another process (which one its lock does not say)"
        job = f"job {owner['job']}, " if owner["job"] else ""
        return f"{job}process {owner['pid']} on host {owner['host']} since {owner['since']}"

    def _in_use(self) -> str:
        owner = read_owner(self.run_dir)
        end = f"end it (scancel {owner['job']})" if owner and owner["job"] else "end it"
        return (
            f"run_dir={self.run_dir} is in use by {self._owner()}; wait for its end, {end}, or choose another run_dir"
        )

    def _cannot(self, error: OSError) -> str:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL):
            return (
                f"run_dir={self.run_dir}: its file system keeps no file locks ({error.strerror}), so two jobs could "
                "both write there; mount it with locks (Lustre: option flock; NFS: without nolock, with its "
                "lock service), or choose a run_dir on another file system"
            )
        return (
            f"run_dir={self.run_dir}: {LOCK} cannot be written ({error.strerror}); make room, or choose another run_dir"
        )


def read_owner(run_dir: Path) -> dict[str, Any] | None:
    """Who holds, or held last before a kill, the lock of a run: {"host", "pid", "job", "since"}; None: it does not say.

    The job is None outside of Slurm.
    """
    try:
        with open(Path(run_dir) / LOCK, "rb") as file:
            owner = json.loads(file.read(LONGEST_OWNER))
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) and {"host", "pid", "job", "since"} <= owner.keys() else None


def _close_in_child(lock: weakref.ref[RunLock]) -> None:
    if (held := lock()) is not None:
        held.close_inherited()
