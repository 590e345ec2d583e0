"""Tasks spread over processes: each process makes its tools once, then takes one task after the other.

Nothing is shared but a pipe per process. A process whose parent has been killed ends with its task.
"""

from __future__ import annotations

import itertools
import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from kairos_train.basics.errors import UserError

Make = Callable[[int], Callable[[Any], Any]]
"""Number of the process -> what is done with a task. Picklable, as are tasks and results."""


def spread(make: Make, tasks: Sequence[Any], processes: int) -> Iterator[tuple[Any, Any]]:
    """(task, result) of every task, in the order in which they are done. With one process, in this one.

    Raises:
        UserError: as a task raised it.
        RuntimeError: a task failed otherwise, or a process died; with its traceback or exit code.
    """
    if processes == 1 or len(tasks) < 2:
        do = make(0)
        yield from ((task, do(task)) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")  # threads of decoders and encoders do not survive a fork
    workers: dict[Connection, multiprocessing.Process] = {}
    busy: dict[Connection, Any] = {}
    coming = iter(tasks)
    try:
        for number, task in enumerate(itertools.islice(coming, processes)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(make, number, theirs), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process
            ours.send(task)
            busy[ours] = task
        while busy:
            for pipe in wait(list(busy)):
                task = busy.pop(pipe)
                yield task, _receive(pipe, workers[pipe], task)
                for following in itertools.islice(coming, 1):
                    pipe.send(following)
                    busy[pipe] = following
    finally:
        for pipe, process in workers.items():
            pipe.close()  # a process that waits for its next task ends by this
            if pipe in busy:
                process.terminate()
            process.join()


def _receive(pipe: Connection, process: Any, task: Any) -> Any:
    try:
        result, error = pipe.recv()
    except (EOFError, ConnectionError):
        process.join(timeout=10)
        raise RuntimeError(f"the process of task {task} died with exit code {process.exitcode}") from None
    if isinstance(error, UserError):
        raise error
    if error is not None:
        raise RuntimeError(f"task {task} failed:\n{error}")
    return result


def _work(make: Make, number: int, pipe: Connection) -> None:
    """A worker: tasks in, (result, error) out, until the pipe closes."""
    do = None
    try:
        while True:
            task = pipe.recv()
            try:
                do = make(number) if do is None else do
                answer = (do(task), None)
            except UserError as error:
                answer = (None, error)
            except Exception:
                answer = (None, traceback.format_exc())
            pipe.send(answer)
    except (EOFError, ConnectionError, KeyboardInterrupt):
        pass  # the parent has no more use for this process, or is gone
