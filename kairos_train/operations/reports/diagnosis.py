"""Whether a run is well: every reason that speaks against it, the worst first."""

from __future__ import annotations

import itertools
import math
import shutil
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kairos_train.basics.format import gigabytes, many, number, span
from kairos_train.operations.reports.goodput import Goodput
from kairos_train.operations.reports.records import RunRecord

if TYPE_CHECKING:
    from kairos_train.operations.reports.state import Checkpoints, RunProgress, State

HEALTHY, LOOK, TROUBLE = "healthy", "look", "trouble"
ORDER = (TROUBLE, LOOK, HEALTHY)

# All of these are ours.
RECENT = 5  # reports
WAITING, STARVING = 0.1, 0.3  # shares of the time that is waited for data
TIGHT = 0.05  # share of the memory that is free
LATE = 2.5  # checkpoint intervals
LOW_GOODPUT, LONG_ENOUGH = 0.7, 3600.0  # seconds
DAY, OFTEN = 86400.0, 3  # unasked ends in a day


@dataclass(frozen=True)
class Reason:
    """Attributes:
    level: look or trouble.
    text: one line.
    """

    level: str
    text: str


@dataclass(frozen=True)
class Health:
    """Attributes:
    reasons: against it, the worst first.
    """

    reasons: list[Reason]

    @property
    def level(self) -> str:
        """healthy, look or trouble: that of the worst reason."""
        return self.reasons[0].level if self.reasons else HEALTHY


def judge(
    record: RunRecord,
    *,
    state: State,
    progress: RunProgress,
    checkpoints: Checkpoints,
    goodput: Goodput | None,
    now: float,
) -> Health:
    """Look for everything that is wrong with a run."""
    reasons = [
        *_of_state(state),
        *_of_numbers(record),
        *(_of_speed(record) if state.going else ()),
        *_of_checkpoints(record, state, progress, checkpoints),
        *(_of_memory(record) if state.going else ()),
        *_of_lives(record, state, now),
    ]
    if goodput and goodput.share < LOW_GOODPUT and goodput.total > LONG_ENOUGH:
        lost = {kind: seconds for kind, seconds in goodput.seconds.items() if kind != "training"}
        worst = max(lost, key=lost.get)
        reasons.append(Reason(LOOK, f"goodput {goodput.share:.0%}; most of the rest is {worst} ({span(lost[worst])})"))
    return Health(sorted(reasons, key=lambda reason: ORDER.index(reason.level)))


def _of_state(state: State) -> Iterator[Reason]:
    match state.name:
        case "silent":
            yield Reason(TROUBLE, f"no sign of life for {span(state.since)}; it hangs or was killed")
        case "killed":
            yield Reason(TROUBLE, f"its process is gone, {span(state.since)} ago; start it again")
        case "stopped":
            yield Reason(TROUBLE, state.text or "stopped itself")
        case "fault":
            yield Reason(TROUBLE, state.text or "a machine, a process or a disk failed; start it again")
        case "error":
            yield Reason(TROUBLE, state.text or "ended by an error")
        case "interrupted":
            yield Reason(LOOK, state.text or "interrupted on request; start it again")
        case "unknown":
            yield Reason(LOOK, f"not at its end, silent for {span(state.since)}; how it ended was not recorded")


def _of_numbers(record: RunRecord) -> Iterator[Reason]:
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(record.last.get(name, 0.0))]
    if bad:
        yield Reason(TROUBLE, f"the last step's {' and '.join(bad)} is not finite")
    step = record.last.get("step", 0)
    skips = record.of("skipped")
    budget, window = record.setting("guard.skips", 10), record.setting("guard.window", 100)
    if skips:
        why = ", ".join(f"{count} × {text}" for text, count in Counter(str(e.get("why")) for e in skips).most_common(3))
        recent = sum(event.get("step", 0) > step - window for event in skips)
        level = TROUBLE if recent > budget / 2 else LOOK if recent else None
        if level:
            yield Reason(level, f"{many(recent, 'step')} of the last {window:,} dropped (budget {budget}): {why}")
    elif dropped := int(sum(report.values.get("optimizer/skipped_steps", 0) for report in record.reports)):
        yield Reason(LOOK, f"{many(dropped, 'step')} dropped")
    if back := record.of("rollback"):
        allowed = record.setting("guard.rollbacks", 2)
        last = back[-1]
        level = TROUBLE if last.get("rollbacks", len(back)) >= allowed else LOOK
        yield Reason(
            level,
            f"{many(len(back), 'rollback')} (of {allowed}), last from step {last.get('step')} to {last.get('to')}",
        )


def _of_speed(record: RunRecord) -> Iterator[Reason]:
    shares = [
        r.values["speed/data_wait_share"] for r in record.reports[-RECENT:] if "speed/data_wait_share" in r.values
    ]
    if shares and (share := statistics.mean(shares)) > WAITING:
        level = TROUBLE if share > STARVING else LOOK
        yield Reason(level, f"{share:.0%} of the time waits for data; raise data.workers, or look at the disk")
    begin = record.lives[-1].start if record.lives else 0.0
    slow = Counter((e.get("rank"), e.get("host")) for e in record.of("straggler") if e["time"] >= begin)
    for (rank, host), count in slow.most_common(2):
        yield Reason(LOOK, f"rank {rank} on {host} is slower than the others (told {many(count, 'time')})")
    stalls = [event for event in record.of("loader_stall") if event["time"] >= begin]
    if stalls:
        longest = max(event.get("seconds") or 0.0 for event in stalls)
        yield Reason(LOOK, f"the loader stalled {many(len(stalls), 'time')}, up to {span(longest)}")


def _of_checkpoints(
    record: RunRecord, state: State, progress: RunProgress, checkpoints: Checkpoints
) -> Iterator[Reason]:
    told = record.of("checkpoint", "checkpoint_failed")
    failed = list(itertools.takewhile(lambda event: event["kind"] == "checkpoint_failed", reversed(told)))
    if failed:
        text = f"{many(len(failed), 'checkpoint')} in a row could not be written: {failed[0].get('error')}"
        yield Reason(TROUBLE, text)
    elif earlier := record.of("checkpoint_failed"):
        yield Reason(LOOK, f"{many(len(earlier), 'checkpoint')} could not be written, later ones could")
    for problem in checkpoints.problems:
        yield Reason(TROUBLE if checkpoints.newest is None else LOOK, problem)
    passed = {event.get("checkpoint") or event.get("problem") for event in record.of("passed_over")}
    if passed and not checkpoints.problems:
        yield Reason(LOOK, f"{many(len(passed), 'damaged checkpoint')} skipped at a start")
    every = record.setting("train.checkpoint_every")
    if every and state.going and progress.step - (checkpoints.step or 0) > LATE * every:
        newest = (
            "no valid checkpoint" if checkpoints.step is None else f"newest valid checkpoint: step {checkpoints.step:,}"
        )
        yield Reason(TROUBLE, f"{newest}, but the run is at step {progress.step:,} and saves every {every:,}")
    if state.going and checkpoints.size:
        free = shutil.disk_usage(record.run_dir).free
        if free < 2 * checkpoints.size:
            sizes = f"{gigabytes(free)} free, a checkpoint takes {gigabytes(checkpoints.size)}"
            yield Reason(
                TROUBLE if free < checkpoints.size else LOOK, f"the disk of the checkpoints is nearly full: {sizes}"
            )


def _of_memory(record: RunRecord) -> Iterator[Reason]:
    told = [event for event in record.of("memory") if event.get("used_gb") and event.get("total_gb")]
    if not told:
        return
    total = told[-1]["total_gb"]
    free = min([total - told[-1]["used_gb"], *record.curve("memory/headroom_gb")[1][-RECENT:]])
    if free < TIGHT * total:
        yield Reason(LOOK, f"memory is nearly full: {number(free)} of {number(total)} GB are free")


def _of_lives(record: RunRecord, state: State, now: float) -> Iterator[Reason]:
    unasked = [life for life in record.lives if life.outcome in ("killed", "fault", "error") and life.end > now - DAY]
    if state.going and len(unasked) >= OFTEN:
        yield Reason(LOOK, f"{len(unasked)} lives ended unasked within a day")
