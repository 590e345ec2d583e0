"""Loader processes that cannot hang a run: what they give, in order, or one line on what became of them."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from kairos_train.basics.errors import MachineFault, one_line

AHEAD = 2  # requests per process

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """`dataset[request]` for every request, in order, computed ahead by processes of a torch DataLoader.

    Args:
        dataset: what maps a request to an item; copied into the processes.
        requests: read as far ahead as AHEAD needs.
        workers: processes; 0 computes here, on demand.
        pin_memory: call the items' `pin_memory`, in a thread.
        timeout: seconds without an item after which the processes count as hung.

    Raises:
        MachineFault: from `next`: a process died or hung. Exceptions of `dataset` come as they are.
    """

    def __init__(
        self, dataset: Dataset, requests: Iterable[Any], *, workers: int, pin_memory: bool, timeout: float
    ) -> None:
        self.timeout = timeout
        self._deadline = float("inf")
        self._hung = False
        self._closed = threading.Event()
        loader = DataLoader(
            dataset,
            sampler=requests,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=AHEAD if workers else None,
            pin_memory=pin_memory,
            # its own generator: the default one would consume a number of the training's random stream at every start
            generator=torch.Generator(),
            worker_init_fn=_start_worker if workers else None,
        )
        if workers:
            gc.collect()  # decoders that are garbage end here, where their threads are
        with _same_signal_handler():
            self._items = iter(loader)
        if workers:
            arguments = (weakref.ref(self), self._closed, min(timeout / 4, 1.0))
            threading.Thread(target=_watch, args=arguments, daemon=True, name="loader-watch").start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        self._deadline = time.monotonic() + self.timeout
        try:
            return next(self._items)
        except StopIteration:
            raise
        except Exception as error:  # a dead process shows as whatever the pipe, the socket or the DataLoader make of it
            self._deadline = float("inf")
            ended = [_ended(process) for process in self._processes()]
            if self._hung:
                raise MachineFault(
                    f"data: no batch within {self.timeout:g} s: a loader worker hangs, most likely on the file system "
                    "of the shards; look there, or raise data.timeout"
                ) from error
            if any(ended):
                raise MachineFault(
                    f"data: a loader worker died ({one_line(error)}); if memory is short, lower data.workers"
                ) from error
            raise
        finally:
            self._deadline = float("inf")

    def close(self) -> None:
        """End the processes, hung ones too."""
        self._closed.set()
        if self._hung:
            self._kill()
        self._items = iter(())

    def __del__(self) -> None:
        self._closed.set()

    def check(self) -> None:
        """Kill the processes when an item is overdue; called by the watching thread.

        The wait may be for an answer that no time limit of a queue covers, so that only the end of the other side
        brings it to an end.
        """
        if time.monotonic() > self._deadline:
            self._hung = True
            self._kill()

    def _kill(self) -> None:
        for process in self._processes():
            process.kill()

    def _processes(self) -> list:
        return list(getattr(self._items, "_workers", ()))


def _start_worker(worker: int) -> None:
    """Never collect what a forked process has inherited: decoders of the parent have threads that are not here, and
    crash the process when they are freed. Ctrl-C, which a terminal sends to all processes, is for the training process:
    it may still need batches for the step that it ends with."""
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _same_signal_handler() -> Iterator[None]:
    """Keep torch's handler for ended children out: it raises wherever the training is, even inside other errors.

    The DataLoader finds a dead process all the same, at the latest after five seconds of waiting for it.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)


def _ended(process) -> bool:
    process.join(2)  # the pipe may know of its end before the parent does
    return not process.is_alive()


def _watch(watched: weakref.ref, closed: threading.Event, interval: float) -> None:
    while not closed.wait(interval):
        if (prefetch := watched()) is None:
            return
        prefetch.check()
        del prefetch
