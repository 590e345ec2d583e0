"""`events.jsonl`: what happened to a run, one line each, over all of its lives. Only ever appended to; rank 0 writes.

Every line has `time` (seconds since 1970), `life` (how often the run had been started by then, from 1 on) and `kind`:

    kind               further fields
    start              host, pid, job, world, step, budget, stage, place (in a curriculum), versions, begun (time),
                       redone (steps that an earlier life did and this one does again), last_sign (of that life)
    passed_over        problem: what is wrong with which checkpoint
    changed            setting: a resumed run has it otherwise than its checkpoint
    memory             used_gb, total_gb, text: after the dry run
    checkpoint         step, stall_seconds, write_seconds, bytes
    checkpoint_failed  step, error
    skipped            step, why, loss, grad_norm, samples
    rollback           step, to, rollbacks
    straggler          step, rank, host, factor
    loader_stall       step, seconds
    profile            step, path
    stop_requested     step, why
    stop               step, outcome (finished, interrupted, stopped, fault, error), text

A life that was killed has no `stop`; `metrics.jsonl`, whose lines have a `time` too, tells how far it came.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from kairos_train.basics.format import number
from kairos_train.basics.json_lines import read_json_lines
from kairos_train.basics.log import logger

EVENTS = "events.jsonl"
QUIET = ("start", "stop", "checkpoint", "memory")
"""Kinds of events that every run has; the rest is worth a line."""


class EventLog:
    """Appends events of one life of a run.

    Args:
        run_dir: of the run, there already.
        life: which one this is.
        enabled: whether this process writes.
        heard: called with the kind of every event.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        life: int,
        enabled: bool,
        heard: Callable[[str], None] = lambda kind: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path, self.life, self.enabled = Path(run_dir) / EVENTS, life, enabled
        self._heard, self._clock = heard, clock

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event.

        A disk that takes no more is said on stderr and does not end the run: the event may be of that very disk.
        """
        if not self.enabled:
            return
        self._heard(kind)
        line = json.dumps({"time": round(self._clock(), 3), "life": self.life, "kind": kind, **fields}, default=str)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                # A life that was killed, or a full disk, may have left half a line.
                file.write(line + "\n" if _ends_a_line(self.path) else "\n" + line + "\n")
        except OSError as error:
            logger.warning(f"{self.path}: {error.strerror}; not noted: {line}")


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events of a run, oldest first; lines that cannot be read are left out. None of a run that has not started."""
    return [line.value for line in read_json_lines(Path(run_dir) / EVENTS, _is_event)]


def _is_event(value: dict[str, Any]) -> bool:
    return (
        isinstance(value.get("time"), int | float)
        and type(value.get("life")) is int
        and isinstance(value.get("kind"), str)
    )


def next_life(events: Iterable[Mapping[str, Any]]) -> int:
    """The number of a life of a run that starts now, after these events."""
    return 1 + max((event["life"] for event in events), default=0)


def describe(event: Mapping[str, Any]) -> str:
    """One line about an event; fields that it does not have are left out."""

    def field(name: str, text: str = "{}") -> str:
        value = event.get(name)
        return "" if value in (None, "") else text.format(number(value))

    place = [field("world", "{} process(es)"), field("host", "on {}"), field("job", "job {}")]
    others = [f"{key} {number(value)}" for key, value in event.items() if key not in ("time", "life", "kind", "step")]
    parts = {
        "start": [*place, field("step", "from step {}")],
        "passed_over": [f"checkpoint {event.get('checkpoint')}:", field("problem")],
        "changed": ["resumed with a changed setting:", field("setting")],
        "memory": [field("text") or f"{field('used_gb')} of {field('total_gb')} GB used"],
        "checkpoint": [field("stall_seconds", "the loop waited {} s,"), field("write_seconds", "written in {} s")],
        "checkpoint_failed": [field("error")],
        "skipped": [field("why", "{}:"), field("loss", "loss {},"), field("grad_norm", "gradient norm {}")],
        "rollback": [field("step", "from step {}"), field("to", "to step {}"), field("rollbacks", "(number {})")],
        "straggler": [field("rank", "rank {}"), field("host", "on {}"), field("factor", "takes {} times the median")],
        "loader_stall": [field("seconds", "no batch for {} s")],
        "profile": [field("path", "written to {}")],
        "stop_requested": [field("why")],
        "stop": [field("outcome"), field("text")],
    }.get(event["kind"], others)
    return " ".join(filter(None, parts))


def _ends_a_line(path: Path) -> bool:
    if not path.is_file() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
