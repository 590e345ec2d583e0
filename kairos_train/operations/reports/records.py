"""What a run's files say, read into one object: events, reports, validations, the last loss, configuration, lives.

Files of runs that are going on may end in half a line, and those of killed runs too: such a line is left out
(`kairos_train.basics.json_lines`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from kairos_train.basics.errors import UserError, one_line
from kairos_train.basics.json_lines import has_step, parse_json_line, read_json_lines
from kairos_train.basics.yaml_text import yaml_text
from kairos_train.operations.events import EVENTS, read_events

LOSSES, METRICS, CONFIG, CHECKPOINTS = "losses.jsonl", "metrics.jsonl", "config.yaml", "checkpoints"
PACE = "speed/seconds_per_step"  # every report has it, and no other line of metrics.jsonl
TAIL = 2**16  # bytes; the last line of losses.jsonl is shorter


@dataclass(frozen=True)
class MetricsReport:
    """One line of metrics.jsonl that averages the steps since the line before it.

    Attributes:
        step: the last of them.
        steps: how many they are.
        time: seconds since 1970; None in runs that did not write it.
        values: by name, as in TensorBoard.
    """

    step: int
    steps: int
    time: float | None
    values: dict[str, Any]

    @property
    def seconds(self) -> float:
        """What these steps took, without pauses for validation, samples and checkpoints."""
        return self.steps * self.values[PACE]


@dataclass(frozen=True)
class Attempt:
    """One start of a run and what became of it.

    Attributes:
        number: from 1 on.
        start: seconds since 1970: when it began to load, where its `start` tells that, else when it had loaded.
        end: of its `stop`, else the last that was recorded of it.
        first_step: steps done when it started.
        outcome: finished, interrupted, stopped, fault, error; killed: it has no `stop` and there is a later life; "":
            it has no `stop` and is the last one.
        text: of its `stop`.
        redone: steps of it that the next life had to do again; None: not recorded.
        place: host, pid, job, world and whatever else its `start` tells.
    """

    number: int
    start: float
    end: float
    first_step: int
    outcome: str
    text: str
    redone: int | None
    place: dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """What the files of a run say.

    Attributes:
        config: of config.yaml, as plain data; empty without one.
        events: as in events.jsonl.
        reports: averages, oldest first; what was redone stands in them once.
        validations: lines of metrics.jsonl that are no reports.
        last: the last line of losses.jsonl; empty without one.
        lives: of events.jsonl; empty in runs that did not write it.
        touched: when a file of it was written last, in seconds since 1970, as the file system says; None without files.
    """

    run_dir: Path
    config: dict[str, Any]
    events: list[dict[str, Any]]
    reports: list[MetricsReport]
    validations: list[dict[str, Any]]
    last: dict[str, Any]
    lives: list[Attempt]
    touched: float | None

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting by its dotted name."""
        value: Any = self.config
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        """Events of some kinds."""
        return [event for event in self.events if event["kind"] in kinds]

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, of all lines that have it."""
        lines = [(r.step, r.values) for r in self.reports] + [(v["step"], v) for v in self.validations]
        found = sorted((step, values[name]) for step, values in lines if isinstance(values.get(name), int | float))
        return [step for step, _ in found], [float(value) for _, value in found]

    def names(self, prefix: str = "") -> list[str]:
        """Names of all metrics that start so, in name order."""
        lines = [r.values for r in self.reports] + self.validations
        return sorted({name for line in lines for name in line if name.startswith(prefix)} - {"step", "time"})


def read_record(run_dir: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UserError: there is no such folder, or it holds no run.
    """
    run_dir = Path(run_dir)
    if not is_run(run_dir):
        problem = "holds no run" if run_dir.is_dir() else "is no folder"
        raise UserError(f"{run_dir}: {problem}; give the run_dir of a training run, or a curriculum's folder of stages")
    events = read_events(run_dir)
    lines = read_lines(run_dir / METRICS)
    reports = _counted(lines, events)
    return RunRecord(
        run_dir=run_dir,
        config=_config(run_dir / CONFIG),
        events=events,
        reports=reports,
        validations=[line for line in lines if PACE not in line],
        last=_last_line(run_dir / LOSSES),
        lives=_lives(events, reports),
        touched=_touched(run_dir),
    )


def is_run(folder: Path) -> bool:
    """Whether a folder looks like one run."""
    return any((folder / name).is_file() for name in (EVENTS, METRICS, LOSSES)) or (
        (folder / CONFIG).is_file() and (folder / CHECKPOINTS).is_dir()
    )


def find_runs(folder: Path) -> list[Path]:
    """The run that a folder is, or the stages that it holds, in the order in which they follow one another.

    Stages follow the weights: a stage comes behind the one that its `stage.init_from` names; otherwise in order of
    their numbers and names.

    Raises:
        UserError: there is no such folder, or no run in it.
    """
    folder = Path(folder)
    if is_run(folder):
        return [folder]
    stages = [path for path in sorted(folder.iterdir()) if is_run(path)] if folder.is_dir() else []
    if not stages:
        problem = "holds no run and no stages" if folder.is_dir() else "is no folder"
        raise UserError(f"{folder}: {problem}; give the run_dir of a training run, or a curriculum's folder of stages")
    before = {path.name: _came_from(path) for path in stages}

    def depth(name: str, seen: tuple[str, ...] = ()) -> int:
        parent = before.get(name)
        return 0 if parent not in before or parent in seen else 1 + depth(parent, (*seen, name))

    return sorted(stages, key=lambda path: depth(path.name))


def abandoned(run_dir: Path, step: int) -> dict[str, Any]:
    """What a life that starts at `step` is going to do again, for its `start` event. Call it before telemetry opens.

    Returns:
        {"redone": steps beyond `step` that losses.jsonl has, "last_sign": when it was written last}; empty of a run
        that has not started.
    """
    path = Path(run_dir) / LOSSES
    if not path.is_file():
        return {}
    return {
        "redone": len({line["step"] for line in read_lines(path) if line["step"] > step}),
        "last_sign": round(path.stat().st_mtime, 3),
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file that are whole and have a step; none without the file."""
    return [line.value for line in read_json_lines(path, has_step)]


def _counted(lines: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[MetricsReport]:
    """Reports with the number of their steps; of steps that stand there twice, the later line."""
    starts = [(e["time"], e.get("step", 0)) for e in events if e["kind"] == "start"]
    starts += [(e["time"], e.get("to", 0)) for e in events if e["kind"] == "rollback"]
    reports: list[MetricsReport] = []
    for line in lines:
        if PACE not in line:
            continue
        while reports and reports[-1].step >= line["step"]:
            reports.pop()
        time = line.get("time")
        values = {name: value for name, value in line.items() if name not in ("step", "time")}
        # A life counts from its own first step, and so does what follows a rollback.
        begun = [step for at, step in starts if time is not None and at <= time and step < line["step"]]
        first = max([reports[-1].step if reports else 0, *begun[-1:]])
        reports.append(MetricsReport(line["step"], max(1, line["step"] - first), time, values))
    return reports


def _lives(events: list[dict[str, Any]], reports: list[MetricsReport]) -> list[Attempt]:
    starts = [event for event in events if event["kind"] == "start"]
    lives: list[Attempt] = []
    for i, start in enumerate(starts):
        following = starts[i + 1] if i + 1 < len(starts) else None
        until = following["time"] if following else float("inf")
        own = [e for e in events if e["life"] == start["life"] and start["time"] <= e["time"] <= until]
        stop = next((e for e in reversed(own) if e["kind"] == "stop"), None)
        signs = [e["time"] for e in own] + [r.time for r in reports if r.time and start["time"] <= r.time < until]
        if following and stop is None and following.get("last_sign"):
            signs.append(min(following["last_sign"], following["time"]))
        lives.append(
            Attempt(
                number=start["life"],
                start=min(start["time"], start.get("begun") or start["time"]),
                end=stop["time"] if stop else max(signs),
                first_step=start.get("step", 0),
                outcome=stop.get("outcome", "error") if stop else "killed" if following else "",
                text=str(stop.get("text") or "") if stop else "",
                redone=following.get("redone") if following else None,
                place={k: v for k, v in start.items() if k not in ("time", "life", "kind")},
            )
        )
    return [replace(life, redone=0) if life.outcome == "finished" else life for life in lives]


def _last_line(path: Path) -> dict[str, Any]:
    """The last whole line; the file may be long."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        lines = file.read().split(b"\n")
    return next((line.value for text in reversed(lines) if (line := parse_json_line(text, has_step)) is not None), {})


def _config(path: Path) -> dict[str, Any]:
    """As it was saved: a run of another version has other settings, and is to be seen all the same."""
    if not path.is_file():
        return {}
    text = yaml_text(path)
    try:
        values = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); restore it from a checkpoint") from error
    return values if isinstance(values, dict) else {}


def _came_from(run_dir: Path) -> str | None:
    """The name of the folder that a stage's weights came from."""
    origin = (_config(run_dir / CONFIG).get("stage") or {}).get("init_from")
    return Path(origin).name if origin else None


def _touched(run_dir: Path) -> float | None:
    times = [(run_dir / name).stat().st_mtime for name in (EVENTS, METRICS, LOSSES) if (run_dir / name).is_file()]
    return max(times, default=None)
