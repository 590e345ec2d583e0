"""`kairos-train` inside of processes that are kept: where a test needs the command and not its start."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import threading
import time
from pathlib import Path
from subprocess import CompletedProcess

from support.pool import Pool

from kairos_train.basics.log import log_to_stderr, logger
from kairos_train.cli import main
from kairos_train.operations.run_lock import RunLock


def run_inside(pool: Pool, words: list[object], *, code: int = 0, cwd: Path | None = None) -> CompletedProcess:
    """`kairos-train WORDS` on every rank of a pool; what rank 0 printed, all exit codes checked."""
    results = pool.run(_command, list(map(str, words)), cwd or Path.cwd(), timeout=300)
    for rank, result in enumerate(results):
        assert result.returncode == code, f"rank {rank}: exit code {result.returncode}\n{result.stderr[-4000:]}"
    return results[0]


def behind_another(words: list[object], run_dir: Path) -> CompletedProcess:
    """`kairos-train WORDS` while another job has the run's lock; it ends, its checkpoints written, once waited for."""
    checkpoints, later = run_dir / "checkpoints", run_dir / "later"
    checkpoints.rename(later)
    lock = RunLock(run_dir)

    class End(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting for its end" in record.getMessage():
                later.rename(checkpoints)
                lock.release()

    log_to_stderr()
    logger.addHandler(end := End())
    try:
        return _command(list(map(str, words)), Path.cwd())
    finally:
        logger.removeHandler(end)
        lock.release()


def interrupted(words: list[object], losses: Path, *, step: int) -> CompletedProcess:
    """`kairos-train WORDS`, with Ctrl-C once the run is past a step."""

    def interrupt() -> None:
        while not (losses.exists() and len(losses.read_bytes().splitlines()) >= step):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    return _command(list(map(str, words)), Path.cwd())


def with_batches(words: list[object]) -> tuple[CompletedProcess, list[str]]:
    """`kairos-train WORDS`, and where the loop said it was whenever it took a batch from the loader or paused."""
    from dataloaders.loading.loader import ShardLoader
    from kairos_train.operations.watch.watchdog import Watchdog

    seen, take, pause = [], ShardLoader.__next__, Watchdog.paused

    def taking(loader: ShardLoader) -> object:
        seen.append("batch")
        return take(loader)

    def pausing(dog: Watchdog, phase: str, **limits: object) -> contextlib.AbstractContextManager[None]:
        seen.append(phase)
        return pause(dog, phase, **limits)

    ShardLoader.__next__, Watchdog.paused = taking, pausing
    try:
        return _command(list(map(str, words)), Path.cwd()), seen
    finally:
        ShardLoader.__next__, Watchdog.paused = take, pause


def linear_is_torchs() -> bool:
    """Whether `torch.nn.functional.linear` is torch's own function."""
    import torch

    return torch.nn.functional.linear is torch._C._nn.linear


def _command(words: list[str], cwd: Path) -> CompletedProcess:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return CompletedProcess(words, code, out.getvalue(), err.getvalue())
