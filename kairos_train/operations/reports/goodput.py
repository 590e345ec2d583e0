"""Where the time of a run went, from its first start to its last sign of life.

    goodput = useful time / total

Useful is the time in which steps were computed that still count: the time per step of each report, times its steps,
less what was waited for data and less steps whose update was dropped. Between two reports stands what else there was:
stalls of checkpoints as their events tell, the rest is validation and samples where the run validated then, and a
rollback's lost steps where it rolled back. Before a life's first report the rest is its start. After its last one it is
what the next life had to do again. Steps that count but whose report was lost with a killed life are taken at the pace
of the report before. Every second is in exactly one entry.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from kairos_train.operations.reports.records import PACE, Attempt, MetricsReport, RunRecord

KINDS = {
    "training": "training",
    "data": "waiting for data",
    "dropped": "dropped steps",
    "redone": "steps done again",
    "checkpoint": "checkpoint stalls",
    "validation": "validation, samples",
    "starting": "starting",
    "down": "down between lives",
    "other": "other",
}
"""Entry -> its name. The first is the useful one."""


@dataclass(frozen=True)
class Goodput:
    """Attributes:
    total: seconds from the first start to the last sign of life.
    seconds: of each of `KINDS`; they add up to the total.
    """

    total: float
    seconds: dict[str, float]

    @property
    def share(self) -> float:
        """Useful time / total."""
        return self.seconds["training"] / self.total if self.total > 0 else 0.0

    def shares(self) -> dict[str, float]:
        """Of each entry that is not 0, in the order of `KINDS`."""
        return {kind: value / self.total for kind, value in self.seconds.items() if value > 0}


def measure(record: RunRecord, *, end: float) -> Goodput | None:
    """The account of a run.

    Args:
        end: of its last life, in seconds since 1970.

    Returns:
        None of a run that recorded no starts.
    """
    if not record.lives:
        return None
    account, spans = _Account(), _Spans(record)
    for life, following in zip(record.lives, [*record.lives[1:], None]):
        until = following.start if following else end
        ended = min(until, max(life.end, life.start)) if following else end
        _count_life(account, spans, record, life, ended=ended, following=following)
        account.fill(until - ended, rest="down")
    return Goodput(sum(account.seconds.values()), account.seconds)


class _Spans:
    """What lies between two times, without looking through all events for every report."""

    def __init__(self, record: RunRecord) -> None:
        stalls = [(event["time"], float(event.get("stall_seconds") or 0.0)) for event in record.of("checkpoint")]
        validations = [(line["time"], 1.0) for line in record.validations if line.get("time")]
        rollbacks = [(event["time"], 1.0) for event in record.of("rollback")]
        self._stalls, self._validations, self._rollbacks = map(_Sums, (stalls, validations, rollbacks))

    def stalls(self, begin: float, end: float) -> float:
        """Seconds of checkpoints."""
        return self._stalls.between(begin, end)

    def rest(self, begin: float, end: float) -> str:
        """What time is that is not accounted for otherwise."""
        if self._rollbacks.between(begin, end):
            return "redone"
        return "validation" if self._validations.between(begin, end) else "other"


class _Sums:
    """Sums of amounts by time."""

    def __init__(self, amounts: Iterable[tuple[float, float]]) -> None:
        ordered = sorted(amounts)
        self._times = [time for time, _ in ordered]
        self._sums = [0.0, *itertools.accumulate(amount for _, amount in ordered)]

    def between(self, begin: float, end: float) -> float:
        """In (begin, end]."""
        return self._sums[bisect.bisect_right(self._times, end)] - self._sums[bisect.bisect_right(self._times, begin)]


class _Account:
    """Seconds by kind; windows of time are shared out and never counted twice."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0)

    def fill(self, window: float, parts: Iterable[tuple[str, float]] = (), *, rest: str) -> None:
        """Share out a window: each part as far as there is room, what is left to `rest`."""
        left = max(0.0, window)
        for kind, seconds in parts:
            taken = min(left, max(0.0, seconds))
            self.seconds[kind] += taken
            left -= taken
        self.seconds[rest] += left


def _count_life(
    account: _Account, spans: _Spans, record: RunRecord, life: Attempt, *, ended: float, following: Attempt | None
) -> None:
    reports = [r for r in record.reports if r.time is not None and life.start <= r.time <= ended]
    before = life.start
    for i, report in enumerate(reports):
        parts = [*_steps(report, report.steps), ("checkpoint", spans.stalls(before, report.time))]
        rest = spans.rest(before, report.time) if i else "starting"
        account.fill(report.time - before, parts, rest=rest)
        before = report.time
    # Past the last report: steps that count without one, and what was lost with the life.
    reached = following.first_step if following else record.last.get("step", 0)
    counted = reports[-1].step if reports else life.first_step
    earlier = [report for report in record.reports if report.step <= reached]
    parts = [("checkpoint", spans.stalls(before, ended)), ("validation", _validation(record, before, counted))]
    if earlier:
        parts = [*_steps(earlier[-1], max(0, reached - counted)), *parts]
    lost = life.outcome in ("killed", "fault", "error") and following is not None and life.redone != 0
    rest = "redone" if lost else spans.rest(before, ended) if reports else "starting"
    account.fill(ended - before, parts, rest=rest)


def _steps(report: MetricsReport, steps: int) -> list[tuple[str, float]]:
    """What `steps` steps at a report's pace took."""
    seconds = steps * report.values[PACE]
    waited = seconds * min(1.0, report.values.get("speed/data_wait_share", 0.0))
    dropped = (seconds - waited) * min(1.0, report.values.get("optimizer/skipped_steps", 0) / report.steps)
    return [("training", seconds - waited - dropped), ("data", waited), ("dropped", dropped)]


def _validation(record: RunRecord, reported: float, step: int) -> float:
    """Seconds from a report to the end of the validation that came with it."""
    times = [line["time"] for line in record.validations if line["step"] == step and line.get("time")]
    return max(times, default=reported) - reported
