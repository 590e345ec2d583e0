"""Writing checkpoints behind the training loop: a copy to host memory, then a thread on every rank.

`save` returns when this rank's pieces are copied to the host, so the loop may change them. A thread then writes the
part; rank 0's thread waits for all parts, publishes the checkpoint and calls back. Threads talk over the shared folder
alone, never by collectives, which belong to the loop. One save is in flight at most; the next one waits for it.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kairos_train.basics.errors import MachineFault
from kairos_train.checkpoint.canonical import TEMPORARY, checkpoint_path
from kairos_train.checkpoint.writing import (
    FILE_BYTES,
    Sections,
    leave_part,
    publish,
    read_part,
    remove_leftovers,
    write_part,
)
from parallel.consensus import from_all, from_first

PATIENCE = 300.0  # seconds in which nothing grows in the folder, after which rank 0 takes a missing rank for dead
GRACE = 10.0  # the same when the run has failed: others may have died with it
FIRST_PAUSE, LONGEST_PAUSE = 0.02, 2.0  # seconds between two looks of rank 0 for the parts of others
CHUNK = 2**28  # bytes of host memory taken at once; a power of two, to which page-locked memory is rounded up
ALIGNMENT = 64  # bytes
COPIERS = 2  # threads that copy what is in host memory already


class HostCopy:
    """Copies of tensors in host memory, page-locked for those of a GPU. The memory is kept for the next copy."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []

    def take(self, sections: Sections) -> Sections:
        """The same pieces with copies of their tensors; overwrites what the last `take` gave."""
        devices = {piece.tensor.device for pieces in sections.values() for piece in pieces}
        gpus = [device for device in devices if device.type == "cuda"]
        free, used = list(self._chunks), 0
        chunk: Tensor | None = None
        copied: dict[str, list] = {}
        pairs: list[tuple[Tensor, Tensor]] = []
        for section, pieces in sections.items():
            copied[section] = []
            for piece in pieces:
                tensor = piece.tensor.detach()
                if chunk is None or used + tensor.nbytes > chunk.numel():
                    chunk, used = self._next(free, tensor.nbytes, pinned=bool(gpus)), 0
                place = chunk.narrow(0, used, tensor.nbytes).view(tensor.dtype).view(tensor.shape)
                pairs.append((place, tensor))
                used += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
                copied[section].append(replace(piece, tensor=place))
        if gpus:
            _copy(pairs)
            for device in gpus:
                torch.cuda.synchronize(device)
        else:  # one core does not use all of the memory's speed, and the loop stands still meanwhile
            with ThreadPoolExecutor(COPIERS) as copiers:
                list(copiers.map(_copy, [pairs[number::COPIERS] for number in range(COPIERS)]))
        return copied

    def _next(self, free: list[Tensor], nbytes: int, *, pinned: bool) -> Tensor:
        """The first chunk that is free and large enough, a new one when there is none."""
        for number, chunk in enumerate(free):
            if chunk.numel() >= nbytes:
                return free.pop(number)
        self._chunks.append(torch.empty(max(CHUNK, nbytes), dtype=torch.uint8, pin_memory=pinned))
        return self._chunks[-1]


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for place, tensor in pairs:
        place.copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class _Save:
    """One checkpoint being written."""

    target: Path
    folder: Path
    sections: Sections
    own_state: Mapping[str, Any]
    state: Mapping[str, Any]
    files: Mapping[str, str]


class Saver:
    """Writes a run's checkpoints from all ranks. To make one is collective, and removes what killed runs left.

    Args:
        parent: the run's `checkpoints` folder, seen by all ranks.
        rank, size: of this process in the world.
        background: write behind the caller; otherwise `save` waits for its own end.
        published: called by rank 0's thread after each checkpoint.
        file_bytes: as in `write_checkpoint`.
        patience: as `PATIENCE`.
    """

    def __init__(
        self,
        parent: Path,
        *,
        rank: int,
        size: int,
        background: bool = True,
        published: Callable[[], Any] = lambda: None,
        file_bytes: int = FILE_BYTES,
        patience: float = PATIENCE,
    ) -> None:
        self.parent, self.rank, self.size = Path(parent), rank, size
        self.background, self.published, self.file_bytes, self.patience = background, published, file_bytes, patience
        self._host = HostCopy()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        if rank == 0:
            remove_leftovers(self.parent)  # before anybody knows the name to write under
        self._token = from_first(secrets.token_hex(4), size)  # so that two runs never write into one folder

    def save(
        self,
        step: int,
        sections: Sections,
        *,
        own_state: Mapping[str, Any],
        state: Mapping[str, Any],
        files: Mapping[str, str],
    ) -> None:
        """Begin the checkpoint of `step`; every rank calls this with what it holds.

        Args:
            step: optimiser steps done.
            sections: pieces of this rank, the same sections on every rank.
            own_state: plain data of this rank; all of them are found, by rank, in the checkpoint's state as "ranks".
            state: plain data of the run; rank 0's is kept.
            files: {file name: text}; rank 0's are kept.

        Raises:
            RuntimeError: the save before has not been settled.
        """
        if self._thread is not None:
            raise RuntimeError("a save is in flight; settle it first")
        target = checkpoint_path(self.parent, step)
        folder = self.parent / f"{TEMPORARY}{target.name}-{self._token}"
        job = _Save(target, folder, self._host.take(sections), own_state, state, files)
        # A daemon: a process that ends does not wait for the parts of ranks that may never come.
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"save {target.name}", daemon=True)
        self._thread.start()
        if not self.background:
            self._thread.join()

    @property
    def failed(self) -> bool:
        """Whether the save in flight has failed already, as far as this rank knows. Rank 0 comes to know of all."""
        return self._failure is not None

    def settle(self) -> str | None:
        """Wait for the save in flight and say what became of it. Collective.

        A save that some disk did not take leaves nothing, and the next one may be begun.

        Returns:
            Why it could not be written, the same on all ranks; None when it was, or when there was none.

        Raises:
            UserError: it is there already with other content; on rank 0.
            Exception: whatever else went wrong, on the rank where it did.
        """
        if self._thread is not None:
            self._thread.join()
        self._thread, failure, self._failure = None, self._failure, None
        if failure is not None and not isinstance(failure, OSError):
            raise failure
        problems = self._gather(None if failure is None else str(failure))
        if problems and self.rank == 0:
            remove_leftovers(self.parent)  # nobody writes there: all threads have ended
        return problems[0] if problems else None

    def close(self, *, failed: bool = False) -> None:
        """Wait for the save in flight.

        Args:
            failed: the run ends by an error. Ranks are not waited for long then, nothing is collective, and nothing is
                raised, so that the error stays the one that is seen.

        Raises:
            MachineFault: the last save could not be written.
        """
        if not failed:
            if problem := self.settle():
                raise MachineFault(f"{problem}; fix that and start the run again, from the checkpoint before")
        elif self._thread is not None:
            self.patience = min(self.patience, GRACE)
            self._thread.join()

    def _gather(self, problem: str | None) -> list[str]:
        """The problems of all ranks, rank 0's first."""
        return [text for text in from_all(problem, self.size) if text is not None]

    def _run(self, job: _Save) -> None:
        """The thread's work."""
        try:
            self._write(job)
            if self.rank == 0:
                parts = self._collect(job)
                state = {**job.state, "ranks": [part["state"] for part in parts]}
                publish(job.folder, job.target, parts, state=state, files=job.files)
                self.published()
        except BaseException as error:
            self._failure = error
            self._give_up(job, error)

    def _write(self, job: _Save) -> None:
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
            # Behind the loop there is time, but the loop wants the cores.
            settings = {"file_bytes": self.file_bytes, "two_threads": not self.background}
            part = write_part(job.folder, self.rank, job.sections, **settings)
            leave_part(job.folder, self.rank, {**part, "state": job.own_state})
        except OSError as error:
            raise OSError(f"checkpoint {job.target}: rank {self.rank} could not write its part: {error}") from error

    def _collect(self, job: _Save) -> list[dict[str, Any]]:
        """The parts of all ranks, waiting for those that are not there yet."""
        parts: dict[int, dict[str, Any]] = {}
        seen, since, pause = -1, time.monotonic(), FIRST_PAUSE
        while True:
            missing = [rank for rank in range(self.size) if rank not in parts]
            parts |= {rank: part for rank in missing if (part := read_part(job.folder, rank)) is not None}
            if errors := [part["error"] for part in parts.values() if "error" in part]:
                raise OSError(errors[0])
            if len(parts) == self.size:
                return [parts[rank] for rank in range(self.size)]
            written = _bytes_in(job.folder)
            if written != seen:
                seen, since = written, time.monotonic()
            elif time.monotonic() - since > self.patience:
                late = ", ".join(str(rank) for rank in missing if rank not in parts)
                raise OSError(f"checkpoint {job.target}: nothing came of rank {late} in {self.patience:g} s")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _give_up(self, job: _Save, error: BaseException) -> None:
        """Tell rank 0, as far as the disk lets us; rank 0 takes back what was written."""
        with contextlib.suppress(OSError):
            others = [rank for rank in range(self.size) if rank != self.rank]
            if self.rank > 0:
                leave_part(job.folder, self.rank, {"error": str(error)})
            elif all(read_part(job.folder, rank) is not None for rank in others):
                shutil.rmtree(job.folder)  # nobody writes there any more; otherwise the next run removes it


def _bytes_in(folder: Path) -> int:
    """Size of the files in a folder that others write to."""
    size = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has just got its name
            size += path.stat().st_size
    return size
