"""One set of gloo processes per world size, started once and used by many tests: start-up is the cost.

    results = Pool(4).run(function, *arguments)     # a module-level function, run on every rank; results by rank
"""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class Pool:
    """`size` processes in one gloo group. A failed or hung call ends them; the next call starts new ones."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: list[tuple[mp.Process, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120, **kwargs: Any) -> list[Any]:
        """Call `function(*args, **kwargs)` on every rank at once.

        Returns:
            What each rank returned, by rank.

        Raises:
            AssertionError: a rank raised (its traceback is the message), died, or did not answer in `timeout` seconds.
        """
        if not self._ranks:
            self._start()
        for _, pipe in self._ranks:
            pipe.send((function, args, kwargs))
        answers = []
        for rank, (process, pipe) in enumerate(self._ranks):
            try:
                arrived = pipe.poll(timeout)
                answers.append(pipe.recv() if arrived else (False, f"no answer in {timeout} s"))
            except EOFError:
                process.join(5)
                answers.append((False, f"died with exit code {process.exitcode}"))
            if not answers[-1][0]:
                # The others may wait for this rank for ever: their stories are worth a moment only.
                timeout = 2
        failures = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failures:
            self.close(kill=True)
            raise AssertionError("\n".join(failures))
        return [result for _, result in answers]

    def close(self, *, kill: bool = False) -> None:
        """End the processes."""
        for process, pipe in self._ranks:
            if kill:
                process.kill()
            else:
                pipe.send(None)
        for process, pipe in self._ranks:
            process.join(20)
            if process.is_alive():
                process.kill()
            pipe.close()
        self._ranks = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        store = tempfile.mktemp(prefix="gloo-")
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, self.size, store), daemon=True)
            process.start()
            there.close()
            self._ranks.append((process, here))


def _serve(pipe: Connection, rank: int, size: int, store: str) -> None:
    """The life of one rank."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    sys.path.insert(0, str(HERE))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while (call := pipe.recv()) is not None:
        function, args, kwargs = call
        try:
            answer = (True, function(*args, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
    from kairos_train.training.engine import stop_processes

    stop_processes()
