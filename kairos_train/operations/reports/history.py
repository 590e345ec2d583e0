"""A run as a whole, from its folder alone: what it does, how far it is, where its time went, whether it is well.

Nothing is asked of the running processes, so it works from any machine that sees the folder, for running, ended and
killed runs, and for those of earlier versions, of which less is known; `RunHistory.unknown` says what.
"""

from __future__ import annotations

import itertools
import os
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kairos_train.checkpoint.canonical import find_latest, list_checkpoints, step_of
from kairos_train.operations.reports.diagnosis import Health, judge
from kairos_train.operations.reports.goodput import Goodput, measure
from kairos_train.operations.reports.records import CHECKPOINTS, PACE, Attempt, RunRecord, find_runs, read_record
from kairos_train.operations.reports.state import Checkpoints, RunProgress, State
from kairos_train.operations.samples import SampledImage, newest_samples

PACE_OVER = 20  # reports
PATIENCE = 60.0  # seconds without a sign, at least, before a run counts as silent
UNITS = ("steps", "epochs", "samples", "tokens")


@dataclass(frozen=True)
class RunHistory:
    """A run.

    Attributes:
        name: to show it under.
        record: what its files say.
        state, progress, checkpoints, samples, health: see there.
        goodput: None of a run that recorded no starts.
        lives: its starts; empty of a run that did not record them.
        unknown: what its files do not tell, in words.
        now: when all this was so, in seconds since 1970.
    """

    name: str
    record: RunRecord
    state: State
    progress: RunProgress
    checkpoints: Checkpoints
    goodput: Goodput | None
    health: Health
    samples: list[SampledImage]
    unknown: list[str]
    now: float

    @property
    def lives(self) -> list[Attempt]:
        return self.record.lives

    @property
    def restarts(self) -> int:
        return max(0, len(self.lives) - 1)


def read_histories(folders: Sequence[Path], *, now: float | None = None) -> list[RunHistory]:
    """All runs of some folders; a folder of stages gives them all, in order.

    Raises:
        UserError: a folder without a run.
    """
    paths = list(dict.fromkeys(path for folder in folders for path in find_runs(folder)))
    names = _names(paths)
    return [read_history(path, name=name, now=now) for path, name in zip(paths, names)]


def read_history(run_dir: Path, *, name: str | None = None, now: float | None = None) -> RunHistory:
    """Read a run's folder.

    Args:
        run_dir: of the run.
        name: to show it under; None: the folder's.
        now: seconds since 1970; None: the clock.

    Raises:
        UserError: there is no such folder, or it holds no run.
    """
    now = time.time() if now is None else now
    record = read_record(run_dir)
    state = _state(record, now)
    progress = _progress(record, state)
    checkpoints = _checkpoints(record, now)
    goodput = measure(record, end=_end(record, state, now))
    health = judge(record, state=state, progress=progress, checkpoints=checkpoints, goodput=goodput, now=now)
    samples = newest_samples(run_dir)
    unknown = _unknown(record)
    return RunHistory(
        name or Path(run_dir).name, record, state, progress, checkpoints, goodput, health, samples, unknown, now
    )


def _state(record: RunRecord, now: float) -> State:
    sign = _last_sign(record)
    since = None if sign is None else max(0.0, now - sign)
    if not record.lives:
        done = bool(record.reports) and record.reports[-1].values.get("progress/stage_share", 0) >= 1
        fresh = since is not None and since <= _patience(record)
        return State("finished" if done else "running" if fresh else "unknown", since, "")
    life = record.lives[-1]
    if life.outcome:
        return State(life.outcome, since, life.text.removeprefix(f"{record.setting('run_dir')}: "))
    stepped = record.last.get("step", 0) > life.first_step
    patience = _patience(record) if stepped else record.setting("watch.stuck", 1800.0)
    if since <= patience and not _gone(life):
        return State("running" if stepped else "starting", since, "")
    return State("killed" if _gone(life) else "silent", since, "")


def _gone(life: Attempt) -> bool:
    """Whether the process that wrote the events ran on this machine and does not any more."""
    pid = life.place.get("pid")
    if not isinstance(pid, int) or life.place.get("host") != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _last_sign(record: RunRecord) -> float | None:
    """When the run was last seen alive; its files of every step are younger than the last report."""
    if record.lives and record.lives[-1].outcome:
        return record.lives[-1].end
    signs = [record.touched, *(life.end for life in record.lives[-1:]), *(r.time for r in record.reports[-1:])]
    return max((sign for sign in signs if sign is not None), default=None)


def _patience(record: RunRecord) -> float:
    """How long a healthy run of this pace may say nothing: some steps, or its longest pause so far."""
    pace = _seconds_per_step(record) or 0.0
    times = [r.time for r in record.reports if r.time is not None and record.lives and r.time >= record.lives[-1].start]
    pauses = [b - a for a, b in itertools.pairwise(times)]
    return max(PATIENCE, 10 * pace, 2 * max(pauses, default=0.0))


def _seconds_per_step(record: RunRecord) -> float | None:
    paces = [report.values[PACE] for report in record.reports[-PACE_OVER:]]
    return statistics.median(paces) if paces else None


def _progress(record: RunRecord, state: State) -> RunProgress:
    last = record.reports[-1] if record.reports else None
    share = last.values.get("progress/stage_share") if last else None
    step = record.last.get("step", last.step if last else 0)
    pace = _seconds_per_step(record)
    left = None
    if share is not None and 0 < share < 1 and pace is not None:
        left = _seconds_left(record, share) or pace * last.step * (1 - share) / share
        if state.going:
            left = max(0.0, left - pace * (step - last.step))
    return RunProgress(step, share, _budget(record), pace, left)


def _seconds_left(record: RunRecord, share: float) -> float | None:
    """By the clock over the last reports of this life: pauses are part of the pace."""
    begin = record.lives[-1].start if record.lives else None
    recent = [r for r in record.reports[-PACE_OVER:] if r.time is not None and (begin is None or r.time >= begin)]
    if len(recent) < 2:
        return None
    first, last = recent[0], recent[-1]
    done = share - first.values.get("progress/stage_share", share)
    return (last.time - first.time) * (1 - share) / done if done > 0 else None


def _budget(record: RunRecord) -> str:
    if record.lives and (told := record.lives[-1].place.get("budget")):
        return str(told)
    given = next((unit for unit in UNITS[1:] if record.setting(f"train.{unit}")), "steps")
    amount = record.setting(f"train.{given}")
    return f"{amount:,} {given}" if isinstance(amount, int) else "an unknown budget"


def _checkpoints(record: RunRecord, now: float) -> Checkpoints:
    folder = record.run_dir / CHECKPOINTS
    newest, problems = find_latest(folder)
    count = len(list_checkpoints(folder))
    if newest is None:
        return Checkpoints(None, None, None, None, count, problems)
    files = [path.stat() for path in newest.iterdir() if path.is_file()]
    written = max(stat.st_mtime for stat in files)
    size = sum(stat.st_size for stat in files)
    return Checkpoints(newest, step_of(newest), max(0.0, now - written), size, count, problems)


def _end(record: RunRecord, state: State, now: float) -> float:
    if state.going:
        return now
    sign = _last_sign(record)
    return now if sign is None else sign


def _unknown(record: RunRecord) -> list[str]:
    """What the files of earlier versions leave open."""
    missing = []
    if not record.lives:
        missing.append("starts, restarts, goodput and what happened: the run wrote no events.jsonl")
    if not record.reports:
        missing.append("pace and losses: there is no report yet in metrics.jsonl")
    elif all(report.time is None for report in record.reports):
        missing.append("when its reports were written: metrics.jsonl has no times")
    if not record.config:
        missing.append("its settings: there is no config.yaml")
    return missing


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart; relative folders as they were given."""
    for parts in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = ["/".join(path.parts[-parts:]).lstrip("/") for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
