"""What the sections of `gpu.py` share: settings, a worker process that outlives faults, clocks and error measures.

A section is a generator of (name, entry); entries are plain dictionaries that go into the JSON. They are sent while the
section runs, so that what it found before a time limit or a fault is kept.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

Entry = dict[str, Any]
Section = Callable[["Setting"], Iterator[tuple[str, Entry]]]


@dataclass(frozen=True)
class Setting:
    """How the sections run.

    Attributes:
        device: "cuda" or "cpu".
        tiny: small sizes, for a look at the script itself.
        seconds: time that this section has.
    """

    device: str
    tiny: bool
    seconds: float = math.inf

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


VERSIONS = (
    *("torch", "triton", "fla-core", "flash-linear-attention", "flash-attn", "transformer-engine", "tilelang"),
    *("megatron-core", "deepspeed"),
)


def machine(setting: Setting) -> Iterator[tuple[str, Entry]]:
    """The section that says where the others ran."""
    entry: Entry = {"python": platform.python_version(), "processor": platform.machine(), "cores": os.cpu_count()}
    for package in VERSIONS:
        try:
            entry[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            entry[package] = None
    entry["cuda"] = torch.version.cuda
    if setting.cuda:
        properties = torch.cuda.get_device_properties(0)
        entry["gpu"], entry["gpu_memory_gb"] = properties.name, properties.total_memory / 1e9
        entry["compute_capability"] = f"{properties.major}.{properties.minor}"
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True) if shutil.which(query[0]) else None
        entry["driver"] = found.stdout.strip().splitlines()[0] if found and found.stdout.strip() else None
    yield "machine", entry


# --- entries of conformance ---


def rms_ratio(ours: Tensor, reference: Tensor) -> float:
    """‖ours − reference‖ / ‖reference‖ in float64; infinite when not finite. (The root mean square error, relative.)"""
    ours, reference = ours.detach().double(), reference.detach().double()
    if not torch.isfinite(ours).all():
        return math.inf
    scale = float(reference.norm())
    return float((ours - reference).norm()) / scale if scale else float(ours.norm())


def max_ratio(ours: Tensor, reference: Tensor) -> float:
    """max|ours − reference| / max|reference| in float64; infinite when not finite."""
    ours, reference = ours.detach().double(), reference.detach().double()
    if not torch.isfinite(ours).all():
        return math.inf
    scale = float(reference.abs().max())
    return float((ours - reference).abs().max()) / scale if scale else float(ours.abs().max())


def check(errors: dict[str, float], tolerances: dict[str, float], measure: str) -> Entry:
    """An entry for errors by name; a tolerance is of the longest name in `tolerances` that an error's name begins with.

    The empty name in `tolerances` stands for all others.
    """
    limits = {name: tolerances[max((t for t in tolerances if name.startswith(t)), key=len)] for name in errors}
    return {
        "measure": measure,
        "errors": errors,
        "tolerances": limits,
        "passed": all(errors[name] <= limit for name, limit in limits.items()),
    }


def absent(reason: str) -> Entry:
    """An entry for what this machine does not have."""
    return {"absent": reason}


# --- clocks ---


def synchronize(setting: Setting) -> None:
    """Wait for the device."""
    if setting.cuda:
        torch.cuda.synchronize()


def free_memory(setting: Setting) -> None:
    """On a GPU: hand cached memory back. Not between measurements, which would then time its allocation."""
    if setting.cuda:
        gc.collect()
        torch.cuda.empty_cache()


def interleaved(
    subjects: dict[str, Callable[[], Any]], setting: Setting, *, rounds: int, seconds: float
) -> Iterator[Entry]:
    """Median seconds of each subject, all in one run: a warm-up each, then round after round.

    Args:
        rounds: measured at most; at least one.
        seconds: no further round begins that would end later than this.

    Yields:
        After every round: name → {"seconds", "rounds", "peak_gb"} or {"error"}; a subject that fails takes no further
        part.
    """
    begin = time.perf_counter()
    times: dict[str, list[float]] = {name: [] for name in subjects}
    results: Entry = {}
    free_memory(setting)
    for measured in range(rounds + 1):
        round_begin = time.perf_counter()
        for name, subject in subjects.items():
            if "error" in results.get(name, {}):
                continue
            if setting.cuda:
                torch.cuda.reset_peak_memory_stats()
            try:
                elapsed = _timed(subject, setting)
            except Exception as error:  # the other subjects can still be measured
                results[name] = {"error": last_line(error)}
                continue
            times[name] += [elapsed] if measured else []
            results[name] = {"warm_up_seconds": elapsed, **results.get(name, {})}
            if times[name]:
                results[name] |= {"seconds": statistics.median(times[name]), "rounds": len(times[name])}
            results[name]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if setting.cuda else None
        yield results
        now = time.perf_counter()
        if measured and now + (now - round_begin) > begin + seconds:
            return


def _timed(subject: Callable[[], Any], setting: Setting) -> float:
    synchronize(setting)
    if not setting.cuda:
        begin = time.perf_counter()
        subject()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    subject()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def ratio(results: Entry, slow: str, fast: str) -> float | None:
    """How many times `fast` is faster than `slow`, where both were measured."""
    pair = [results.get(name, {}).get("seconds") for name in (slow, fast)]
    return pair[0] / pair[1] if all(pair) else None


# --- the worker ---


def last_line(error: BaseException) -> str:
    """The last line of a traceback, and where in this project or a library it was raised."""
    text = traceback.format_exception_only(error)[-1].strip().splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return (text[0] if text else type(error).__name__)[:500] + where


def serve(connection: Connection) -> None:
    """In the worker: run sections as they are asked for, until the connection closes. A fault ends the process.

    (After a fault on a GPU every later call of that process may fail.)
    """
    torch.set_float32_matmul_precision("highest")  # no TF32: float32 results are held to float32 tolerances
    while True:
        try:
            module, name, setting = connection.recv()
        except EOFError:
            return
        if setting.tiny and not setting.cuda:
            torch.set_num_threads(1)  # more would only wait for each other
        try:
            for key, entry in getattr(importlib.import_module(module), name)(setting):
                connection.send(("entry", key, entry))
            free_memory(setting)
            connection.send(("done", None, None))
        except BaseException as error:
            traceback.print_exc(file=sys.stderr)
            connection.send(("error", None, last_line(error)))
            return


class Worker:
    """A process that runs sections; a new one is started after a fault or a time limit."""

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None

    def run(
        self, module: str, name: str, setting: Setting, on_entry: Callable[[str, Entry], None]
    ) -> tuple[str, str | None]:
        """Run one section for at most `setting.seconds`.

        Returns:
            ("done", None), ("error", the last line of its traceback) or ("timeout", what happened).
        """
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(theirs,), daemon=False)
            self._process.start()
            theirs.close()
        end = time.monotonic() + setting.seconds
        self._connection.send((module, name, setting))
        while True:
            if not self._connection.poll(max(end - time.monotonic(), 0)):
                self.stop()
                return "timeout", f"stopped after {setting.seconds:.0f} s"
            try:
                kind, key, value = self._connection.recv()
            except EOFError:
                code = self._process.join() or self._process.exitcode
                self.stop()
                return "error", f"the process died with exit code {code}"
            if kind == "entry":
                on_entry(key, value)
                continue
            if kind == "error":
                self.stop()
            return kind, value

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._process = None
