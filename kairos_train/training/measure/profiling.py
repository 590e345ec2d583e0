"""Profiles of a few steps while a run goes on, as Chrome traces to be opened in Perfetto or chrome://tracing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from kairos_train.basics.files import replacing

PROFILES = "profiles"


@dataclass(frozen=True)
class Profile:
    """A finished window.

    Attributes:
        first, last: its steps, counted from 1.
        path: of the trace.
        problem: why there is none; a run goes on without it.
    """

    first: int
    last: int
    path: Path
    problem: str | None = None

    def __str__(self) -> str:
        if self.problem:
            return f"profile of steps {self.first} to {self.last}: {self.problem}"
        return f"profile of steps {self.first} to {self.last}: {self.path}"


class ProfilerWindow:
    """Profiles this process for some steps, at a step that was set before or when it is asked to.

        window.before_step(step)
        ...
        profile = window.after_step(step)        # a `Profile` when the window has closed, else None

    Args:
        run_dir: of the run; traces go to `profiles/step-…-rank-….json.gz` in it.
        at: the first step, counted from 1; None: only on request. Of a run that begins after it, nothing is profiled.
        steps: how many.
    """

    def __init__(self, run_dir: Path, *, rank: int, at: int | None, steps: int) -> None:
        self._folder, self._rank = Path(run_dir) / PROFILES, rank
        self._at, self._steps = at, steps
        self._requested = False
        self._profiler: torch.profiler.profile | None = None
        self._first = 0

    def request(self) -> None:
        """Open a window at the next step. Does nothing but to set a flag: for signal handlers."""
        self._requested = True

    def before_step(self, step: int) -> None:
        """Open a window if it is time, counted from 1: the step that begins."""
        if self._profiler is not None or not (self._requested or step == self._at):
            return
        from torch.profiler import ProfilerActivity, profile

        self._requested, self._first = False, step
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def after_step(self, step: int) -> Profile | None:
        """Close the window if `step` was its last one."""
        return self._finish(step) if self._profiler is not None and step >= self._first + self._steps - 1 else None

    def close(self, step: int) -> Profile | None:
        """Close a window that is open at the end of a run, after `step`."""
        return self._finish(step) if self._profiler is not None and step >= self._first else self._drop()

    def _finish(self, step: int) -> Profile:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        path = self._folder / f"step-{self._first:07d}-rank-{self._rank}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(path, ending=".json.gz") as temporary:  # by which the profiler knows how to write
                profiler.export_chrome_trace(str(temporary))
        except OSError as error:
            return Profile(self._first, step, path, f"{path}: {error.strerror or error}; nothing was written")
        return Profile(self._first, step, path)

    def _drop(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
