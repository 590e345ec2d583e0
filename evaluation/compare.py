"""Several evaluation folders side by side: a table with differences, curves over each other.

Two numbers are compared only if they were measured on the same: the same windows with the same noise. Per part that
means the same shards, seed and number of windows (the video part: the same videos; closed loop: the same simulator,
seeds and number of episodes). Anything else is refused by default, because the difference of such numbers says nothing
of the models; with `mixed` they stand beside each other all the same, marked, without a difference. What is *meant* to
differ between runs, the weights, their precision, sampling steps, guidance, chunks, is only stated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation import plots
from evaluation.report import SECTIONS, heading, ordered, read, successes, write_html
from kairos_train.basics.errors import UserError
from kairos_train.basics.format import number
from kairos_train.basics.pages import drawn, element, table

PLOTS = {"open_loop": plots.open_loop, "losses": plots.losses, "video": plots.drift, "memory": plots.memory}


@dataclass(frozen=True)
class Number:
    """One number of a part.

    Attributes:
        half: half the width of its 95 % interval, None without one.
        shown: how it is shown; "": by its value.
        better: "lower", "higher" or "": neither.
    """

    name: str
    value: float | None
    half: float | None = None
    better: str = ""
    shown: str = ""


def compare(folders: Sequence[Path], *, out: Path, mixed: bool = False) -> dict[str, Any]:
    """Write the page.

    Args:
        folders: at least two, each with an `evaluation.json`, a `closed_loop.json` or both. The first is what the
            others are compared with.
        out: the HTML file.
        mixed: show what was measured on something else, marked, instead of refusing it.

    Returns:
        {"runs": names, "parts": {part: {row name: [value of each run]}}, "unlike": {part: {run name: differences}}}.

    Raises:
        UserError: fewer than two folders, one without an evaluation, no part that two of them have, or (without
            `mixed`) a part that was measured on something else.
    """
    if len(folders) < 2:
        raise UserError("compare: one folder is given; give at least two")
    runs = {name: read(Path(folder)) for name, folder in zip(_names(folders), folders)}
    parts = [part for part in SECTIONS if sum(part in run["parts"] for run in runs.values()) > 1]
    if not parts:
        raise UserError(f"compare: no part was measured in two of {', '.join(runs)}; evaluate the same parts")
    unlike = {part: found for part in parts if (found := _unlike(runs, part))}
    if unlike and not mixed:
        part, found = next(iter(unlike.items()))
        name, differences = next(iter(found.items()))
        raise UserError(
            f"{name}: {part} was measured on something else than in {_first(runs, part)}: {'; '.join(differences)}. "
            "Evaluate both on the same, or show them all the same with --mixed"
        )
    sections, values = [element("h1", "Evaluations side by side"), _facts(runs)], {}
    if unlike:
        text = "Marked numbers (≠) were measured on something else: no difference is given."
        sections.append(element("p", text, attributes='class="other"'))
    for part in parts:
        inside = {name: run["parts"][part] for name, run in runs.items() if part in run["parts"]}
        rows = _rows(inside, part)
        values[part] = {name: [None if n is None else n.value for n in row] for name, row in rows.items()}
        sections += [heading(part), _table(inside, rows, unlike.get(part, {}))]
        if part in PLOTS:
            named = {f"{name} ≠" if name in unlike.get(part, {}) else name: found for name, found in inside.items()}
            sections.append(drawn(f"{part} of all runs", PLOTS[part](named)))
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_html(out, "Evaluations side by side", sections)
    return {"runs": list(runs), "parts": values, "unlike": unlike}


# --- what was measured on what ---


def measured_on(run: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What two runs must share for the numbers of a part to be comparable."""
    found = run["parts"][part]
    if part == "closed_loop":
        return {key: found.get(key) for key in ("env", "seed_start", "episodes_per_task")}
    same = {"shards": run["shards"]["fingerprint"], "seed": found["seed"]}
    if part == "video":
        return same | {"videos": sorted(video["key"] for video in found["videos"])}
    if part == "losses":
        return same | {key: found[key] for key in ("windows", "draws", "condition", "weighting")}
    return same | {"windows": found["windows"]}


def _unlike(runs: Mapping[str, Any], part: str) -> dict[str, list[str]]:
    """The runs whose part was measured on something else than the first one's, and in what they differ."""
    inside = {name: measured_on(run, part) for name, run in runs.items() if part in run["parts"]}
    first = next(iter(inside.values()))
    found = {}
    for name, other in inside.items():
        differences = [
            f"{key} differ" if isinstance(other[key], list) else f"{key}={other[key]}, not {first[key]}"
            for key in first
            if other[key] != first[key]
        ]
        if differences:
            found[name] = differences
    return found


# --- the table ---


def numbers(part: str, found: Mapping[str, Any]) -> list[Number]:
    """The numbers of a part that are worth a row."""
    return list(NUMBERS[part](found))


def _open_loop(found: Mapping[str, Any]) -> Iterator[Number]:
    for name, row in ordered(found["rows"], plots.OPEN_LOOP_ROWS).items():
        yield Number(f"MSE, {name}", row["mse"], row["mse_ci95"], "lower")
        yield Number(f"MAE, {name}", row["mae"], None, "lower")


def _losses(found: Mapping[str, Any]) -> Iterator[Number]:
    for stream, values in ordered(found["streams"], plots.STREAMS).items():
        yield Number(f"{stream}", values["loss"], values["ci95"], "lower")
        for entry in values["bins"]:
            yield Number("{}, σ {:.1f}–{:.1f}".format(stream, *entry["sigma"]), entry["loss"], None, "lower")
        if len(values["datasets"]) > 1:
            for name, row in values["datasets"].items():
                yield Number(f"{stream}, {name}", row["loss"], row["ci95"], "lower")


def _video(found: Mapping[str, Any]) -> Iterator[Number]:
    yield Number("frames ahead that beat the copy", float(found["beats_copy_frames"]), None, "higher")
    for metric in ordered(found["metrics"], plots.LABELS):
        for i, chunk in enumerate(found["chunks"], 1):
            for row in plots.VIDEO_ROWS:
                better = ("lower" if metric == "lpips" else "higher") if row == "model" else ""
                yield Number(f"{metric.upper()}, chunk {i}, {row}", chunk[metric][row], None, better)
    if found["fvd"]:
        yield Number("FVD, model", found["fvd"]["model"], None, "lower")


def _memory(found: Mapping[str, Any]) -> Iterator[Number]:
    for layer in found["layers"]:
        middles = sorted(head["horizon_frames"]["median"] for head in layer["heads"])
        bounds = [head["log10_bound"]["median"] for head in layer["heads"]]
        yield Number(f"layer {layer['layer']}: longest horizon of a head, frames", middles[-1])
        yield Number(f"layer {layer['layer']}: shortest", middles[0])
        yield Number(f"layer {layer['layer']}: log10 bound of the head that keeps most", max(bounds))


def _closed_loop(found: Mapping[str, Any]) -> Iterator[Number]:
    for name, policy in found["policies"].items():
        for task, row in [*sorted(policy["tasks"].items()), ("all", policy["all"])]:
            yield Number(f"{name}, {task}", row["rate"], None, "higher", successes(row))


NUMBERS: dict[str, Callable[[Mapping[str, Any]], Iterator[Number]]] = {
    "closed_loop": _closed_loop,
    "open_loop": _open_loop,
    "losses": _losses,
    "video": _video,
    "memory": _memory,
}


def _rows(runs: Mapping[str, Any], part: str) -> dict[str, list[Number | None]]:
    """Row name → one number per run, None where a run has none."""
    columns = [{row.name: row for row in numbers(part, found)} for found in runs.values()]
    return {name: [column.get(name) for column in columns] for name in dict.fromkeys(n for c in columns for n in c)}


def _table(runs: Mapping[str, Any], rows: Mapping[str, list[Number | None]], unlike: Mapping[str, Any]) -> str:
    first, *others = runs
    lines = [["", first, *(cell for name in others for cell in (name, "difference"))]]
    marked = {}
    for name, found in rows.items():
        better = next(row.better for row in found if row is not None)
        line = [name + {"lower": " ↓", "higher": " ↑", "": ""}[better], _cell(found[0])]
        for run, other in zip(others, found[1:]):
            if run in unlike and other is not None:
                marked[len(lines), len(line)] = "other"
                line += [f"≠ {_cell(other)}", ""]
            else:
                line += [_cell(other), _difference(found[0], other)]
        lines.append(line)
    return table(lines, marked=marked)


def _cell(found: Number | None) -> str:
    if found is None:
        return "–"
    half = "" if found.half is None else f" ± {found.half:.2g}"
    return found.shown or number(found.value) + half


def _difference(first: Number | None, other: Number | None) -> str:
    if first is None or other is None or first.value is None or other.value is None:
        return "–"
    return f"{other.value - first.value:+.3g}"


def _facts(runs: Mapping[str, Any]) -> str:
    rows: list[list[Any]] = [["", *runs]]
    facts: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "experiment": lambda run: run["experiment"],
        "model": lambda run: run["model_name"],
        "weights": lambda run: f"{run['model']['weights']}, step {run['model']['step']}, {run['model']['dtype']}",
        "held-out shards": lambda run: f"{run['shards']['dataset'] or 'unnamed'} {run['shards']['fingerprint']}",
        "seed": lambda run: str(run["seed"]),
        "sampling steps": lambda run: next((p["steps"] for p in run["parts"].values() if "steps" in p), None),
        "guidance": lambda run: run["parts"].get("video", {}).get("guidance"),
        "chunks": lambda run: run["parts"].get("video", {}).get("settings", {}).get("chunks"),
    }
    for name, fact in facts.items():
        rows.append([name, *(fact(run) if "model" in run else None for run in runs.values())])
    return table(rows)


def _names(folders: Sequence[Path]) -> list[str]:
    """What the runs are called: their folders' names, or where two share one, their paths from where they part.

    Raises:
        UserError: the same folder twice.
    """
    folders = [Path(folder).resolve() for folder in folders]
    if len(set(folders)) < len(folders):
        raise UserError("compare: the same folder is given twice; give each once")
    names = [folder.name for folder in folders]
    if len(set(names)) == len(names):
        return names
    return [os.path.relpath(folder, os.path.commonpath(folders)) for folder in folders]


def _first(runs: Mapping[str, Any], part: str) -> str:
    return next(name for name, run in runs.items() if part in run["parts"])
