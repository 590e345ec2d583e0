"""One set of gloo processes per world size, started once and used by many tests: start-up is the cost.

They are forked from one process that has imported what takes seconds.

results = Pool(4).run(function, *arguments)     # a module-level function, run on every rank; results by rank
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing as mp
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
PRELOAD = (
    *("torch._dynamo", "torch.utils.tensorboard", "deepspeed", "deepspeed.runtime.zero.muon.original_muon"),
    *("megatron.core", "kairos_train.training.loop"),
)


class Pool:
    """`size` processes in one gloo group. A failed or hung call ends them; the next call starts new ones."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: list[tuple[mp.Process, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 240, **kwargs: Any) -> list[Any]:
        """Call `function(*args, **kwargs)` on every rank at once.

        Returns:
            What each rank returned, by rank.

        Raises:
            AssertionError: a rank raised (its traceback is the message), died, or did not answer in `timeout` seconds.
        """
        if not self._ranks:
            self._start()
        store = tempfile.mktemp(prefix="gloo-")
        for _, pipe in self._ranks:
            pipe.send((store, function, args, kwargs))
        answers = self._collect(timeout)
        failures = [f"rank {rank}: {text}" for rank, (ok, text) in answers.items() if not ok]
        if failures:
            self.close(kill=True)
            raise AssertionError("\n".join(failures))
        return [answers[rank][1] for rank in range(self.size)]

    def _collect(self, timeout: float) -> dict[int, tuple[bool, Any]]:
        """Every rank's answer. Once one has failed, the others may wait for it for ever and get a moment only."""
        waiting = {pipe: (rank, process) for rank, (process, pipe) in enumerate(self._ranks)}
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                return answers | {rank: (False, f"no answer in {timeout} s") for rank, _ in waiting.values()}
            for pipe in ready:
                rank, process = waiting.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    process.join(5)
                    answers[rank] = (False, f"died with exit code {process.exitcode}")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + 2)
        return answers

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
        context = _forkserver()
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, self.size), daemon=True)
            process.start()
            there.close()
            self._ranks.append((process, here))


def _forkserver() -> Any:
    """The context of processes that are forked from one that has the imports, running."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    before = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = "cpu"  # deepspeed chooses when it is imported
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["DS_ACCELERATOR"]
        else:
            os.environ["DS_ACCELERATOR"] = before
    return context


def _serve(pipe: Connection, rank: int, size: int) -> None:
    """The life of one rank."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    sys.path.insert(0, str(TESTS))
    mp.set_start_method("fork", force=True)  # of what a rank starts: not that of this process
    import torch
    import torch.distributed as dist

    gc.freeze()  # the imports: DeepSpeed collects garbage in every start, and would look through a million objects
    faulthandler.enable()  # an abort inside of a collective tells where
    torch.set_num_threads(1)
    while (call := pipe.recv()) is not None:
        store, function, args, kwargs = call
        try:
            if not dist.is_initialized():  # the first call, or a command has left the group
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
            answer = (True, function(*args, **kwargs))
            # DeepSpeed's stage 3 replaces it. Left behind, it would round what later calls compute in another way.
            assert torch.nn.functional.linear is torch._C._nn.linear, "the call has left another `linear` in torch"
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
    from kairos_train.training.engine.deepspeed_engine import stop_processes

    stop_processes()
