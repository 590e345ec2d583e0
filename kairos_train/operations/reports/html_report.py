"""Runs as one HTML page that needs nothing beside it: pictures are inside, there is no script. Several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from kairos_train.basics.errors import UserError
from kairos_train.basics.files import write_whole
from kairos_train.basics.format import clock, gigabytes, many, span
from kairos_train.basics.pages import Html, drawn, element, image, joined, note, page, table
from kairos_train.operations.events import describe
from kairos_train.operations.reports import plots
from kairos_train.operations.reports.diagnosis import HEALTHY, LOOK, TROUBLE
from kairos_train.operations.reports.goodput import KINDS
from kairos_train.operations.reports.history import RunHistory

DOTS = 160  # per inch, for sharp text on dense screens; shown at 100
MOST_EVENTS = 200
COLOURS = {HEALTHY: "#2e8b57", LOOK: "#b8860b", TROUBLE: "#c0392b"}
WORDS = {HEALTHY: "healthy", LOOK: "needs a look", TROUBLE: "in trouble"}

STYLE = """
td:first-child, summary { color: #556; } td:first-child { white-space: nowrap; }
figure { display: inline-block; margin: 0.4rem 1rem 0.4rem 0; vertical-align: top; }
.moving { min-width: 12rem; image-rendering: pixelated; } figcaption { color: #556; font-size: 0.85rem; }
pre { font-size: 0.8rem; line-height: 1.35; background: #f6f7f9; padding: 0.8rem; overflow-x: auto; }
.tag { color: white; border-radius: 0.6rem; padding: 0.05rem 0.6rem; font-size: 0.85rem; white-space: nowrap; }
ul { margin: 0.3rem 0; padding-left: 1.2rem; }
"""

LOSSES = {"loss, all streams": ["loss/total"], "video loss": ["loss/video"], "action loss": ["loss/action"]}
BY_SIGMA = {
    "video loss by σ": ("loss_by_sigma/video_", ""),
    "action loss by σ": ("loss_by_sigma/action_", ""),
}
NORM, DROPPED = "gradient norm, before clipping", "dropped steps of a report"
OPTIMIZER = {NORM: ["optimizer/grad_norm"], "learning rate": ["optimizer/lr"], DROPPED: ["optimizer/skipped_steps"]}
SPEED = {
    "seconds per step": ["speed/seconds_per_step"],
    "tokens per second": ["speed/tokens_per_second"],
    "model FLOPs utilisation": ["speed/mfu"],
    "model TFLOP/s, all devices": ["speed/model_tflops_per_second"],
    "share of the time waiting for data": ["speed/data_wait_share"],
    "peak memory (dashed: free), GB": ["memory/gb", "memory/headroom_gb"],
}
SECONDS = {
    "seconds per step, by phase": ("time/", ""),
    "seconds of a step in collectives": ("communication/", ""),
}
DECAYS = {
    "decay per token, 10 % quantile": ("decay/", "_q10"),
    "decay per token, median": ("decay/", "_median"),
    "decay per token, 90 % quantile": ("decay/", "_q90"),
    "half life, tokens": ("decay/", "_half_life_tokens"),
}
PLACED = ("loss", "loss_by_sigma", "optimizer", "grad_norm", "speed", "memory", "time", "communication", "decay")
UNPLOTTED = ("progress", "data")  # they only grow
VALIDATION = "validation_"


def write_report(histories: Sequence[RunHistory], out: Path) -> None:
    """Write the page.

    Args:
        histories: one or more runs.
        out: the HTML file.

    Raises:
        UserError: the folder of `out` is not there.
    """
    out = Path(out)
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: {out.parent} is no folder; make it, or name another file")
    title = "Training run" if len(histories) == 1 else "Training runs"
    sections = [element("h1", title), note(f"as of {clock(histories[0].now)}"), _facts(histories)]
    for heading, about, show in SECTIONS:
        if content := show(histories):
            sections += [element("h2", heading), note(about) if about else "", content]
    write_whole(out, page(title, sections, style=STYLE))


# --- the parts ---


def _facts(runs: Sequence[RunHistory]) -> Html:
    rows: list[tuple[str, Callable[[RunHistory], Any]]] = [
        ("folder", lambda run: run.record.run_dir),
        ("health", _health),
        ("state", lambda run: f"{run.state.name}, last sign of life {span(run.state.since)} ago"),
        ("stage", lambda run: f"{run.record.setting('stage.name')} of {run.record.setting('experiment')}"),
        ("model", lambda run: run.record.setting("model.name")),
        ("processes", _processes),
        ("progress", _progress),
        ("time left", lambda run: span(run.progress.left) if run.progress.left else None),
        ("goodput", lambda run: f"{run.goodput.share:.1%} of {span(run.goodput.total)}" if run.goodput else None),
        ("lives", _lives),
        ("loss", lambda run: _latest(run, "loss/total")),
        ("seconds per step", lambda run: run.progress.seconds_per_step),
        ("MFU", lambda run: _percent(_latest(run, "speed/mfu"))),
        ("waiting for data", lambda run: _percent(_latest(run, "speed/data_wait_share"))),
        ("memory", _memory),
        ("newest valid checkpoint", _checkpoint),
        ("not known", lambda run: "; ".join(run.unknown) or None),
    ]
    lines: list[list[Any]] = [["", *(run.name for run in runs)]]
    for name, value in rows:
        cells = [value(run) for run in runs]
        if any(cell is not None for cell in cells):
            lines.append([name, *cells])
    return table(lines)


def _health(run: RunHistory) -> Html:
    level = run.health.level
    tag = element("span", WORDS[level], attributes=f'class="tag" style="background: {COLOURS[level]}"')
    reasons = [element("li", reason.text) for reason in run.health.reasons]
    return tag + element("ul", *reasons) if reasons else tag


def _processes(run: RunHistory) -> str | None:
    if not run.lives:
        return None
    place = run.lives[-1].place
    parts = [str(place.get("world", "")), f"on {place['host']}" if place.get("host") else ""]
    return " ".join([*filter(None, parts), f"(job {place['job']})" if place.get("job") else ""]).strip()


def _progress(run: RunHistory) -> str:
    share = run.progress.share
    return f"step {run.progress.step:,}" + ("" if share is None else f", {share:.1%} of {run.progress.budget}")


def _lives(run: RunHistory) -> str | None:
    if not run.lives:
        return None
    ends = [life.outcome for life in run.lives[:-1]]
    counted = ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))
    return f"{len(run.lives)}" + (f" (ended before: {counted})" if counted else "")


def _memory(run: RunHistory) -> str | None:
    used = _latest(run, "memory/gb")
    told = run.record.of("memory")
    total = told[-1].get("total_gb") if told else None
    return None if used is None else f"{used:.3g}" + (f" of {total:.3g}" if total else "") + " GB"


def _checkpoint(run: RunHistory) -> str:
    found = run.checkpoints
    return "none" if found.newest is None else f"step {found.step:,}, {span(found.age)} old, {gigabytes(found.size)}"


def _timeline(runs: Sequence[RunHistory]) -> Html:
    return _figures("attempts of the runs and what happened in them", plots.timeline(runs))


def _goodput(runs: Sequence[RunHistory]) -> Html:
    known = [run for run in runs if run.goodput]
    if not known:
        return Html()
    rows: list[list[Any]] = [["", *(run.name for run in known)]]
    for kind, label in KINDS.items():
        if any(run.goodput.seconds[kind] > 0 for run in known):
            cells = [f"{span(run.goodput.seconds[kind])} ({_percent(_share(run, kind))})" for run in known]
            rows.append([label, *cells])
    rows.append(["total", *(span(run.goodput.total) for run in known)])
    return _figures("where the time went", plots.goodput(runs)) + table(rows)


def _losses(runs: Sequence[RunHistory]) -> Html:
    return _figures("losses", plots.curves(runs, LOSSES), plots.families(runs, BY_SIGMA))


def _validation(runs: Sequence[RunHistory]) -> Html:
    streams = sorted({name.split("/")[1] for run in runs for name in run.record.names(VALIDATION)}, reverse=True)
    panels = {f"{stream} loss": [f"{VALIDATION}ema/{stream}", f"{VALIDATION}raw/{stream}"] for stream in streams}
    return _figures("validation losses", plots.curves(runs, panels))


def _gradients(runs: Sequence[RunHistory]) -> Html:
    dropped = any(sum(run.record.curve(OPTIMIZER[DROPPED][0])[1]) for run in runs)
    panels = {title: names for title, names in OPTIMIZER.items() if dropped or title != DROPPED}
    kinds = plots.families(runs, {"gradient norm by kind of block": ("grad_norm/", "")})
    return _figures("gradients and learning rate", plots.curves(runs, panels, log=[NORM]), kinds)


def _speed(runs: Sequence[RunHistory]) -> Html:
    return _figures("speed and memory", plots.curves(runs, SPEED), plots.families(runs, SECONDS))


def _decay(runs: Sequence[RunHistory]) -> Html:
    return _figures("decays of Gated DeltaNet layers", plots.families(runs, DECAYS))


def _others(runs: Sequence[RunHistory]) -> Html:
    """Whatever else was measured, a panel for each family."""
    heads = sorted({name.partition("/")[0] for run in runs for name in run.record.names()})
    unseen = [head for head in heads if head not in (*PLACED, *UNPLOTTED) and not head.startswith(VALIDATION)]
    return _figures("further measurements", plots.families(runs, {head: (f"{head}/", "") for head in unseen}))


def _samples(runs: Sequence[RunHistory]) -> Html:
    pieces = []
    for run in runs:
        name = f"{run.name}, " if len(runs) > 1 else ""
        if run.samples:
            moving_first = sorted(run.samples, key=lambda sample: sample.kind)
            pictures = [_picture(sample.path.read_bytes(), sample.kind, sample.path.stem) for sample in moving_first]
            pieces.append(joined([element("h3", f"{name}step {run.samples[0].step:,}"), *pictures]))
        elif run.record.setting("train.sample_every") and run.record.setting("data.validation_shards"):
            why = "no images in samples/: none drawn yet, or by an earlier version, into TensorBoard alone"
            pieces.append(note(f"{name}{why}"))
    return joined(pieces)


def _events(runs: Sequence[RunHistory]) -> Html:
    pieces = []
    for run in runs:
        told = [event for event in run.record.events if event["kind"] != "checkpoint"]
        if not told:
            continue
        rows: list[list[Any]] = [["time", "life", "step", "what", ""]]
        for event in told[-MOST_EVENTS:]:
            kind = event["kind"].replace("_", " ")
            rows.append([clock(event["time"]), event["life"], event.get("step"), kind, describe(event)])
        left_out = f", the newest {MOST_EVENTS} of {len(told)}" if len(told) > MOST_EVENTS else ""
        written = len(run.record.of("checkpoint"))
        counts = f"{run.name}: {many(len(told), 'event')}{left_out}, and {many(written, 'checkpoint')} written"
        shut = "" if len(told) > 40 else "open"
        pieces.append(element("details", element("summary", counts), table(rows), attributes=shut))
    return joined(pieces)


def _changes(runs: Sequence[RunHistory]) -> Html:
    changes = [(run, event) for run in runs for event in run.record.of("changed")]
    if not changes:
        return Html()
    rows = [["run", "life", "time", "setting"]]
    return table([*rows, *([run.name, e["life"], clock(e["time"]), e.get("setting")] for run, e in changes)])


def _differences(runs: Sequence[RunHistory]) -> Html:
    """Settings that are not the same in all runs."""
    flat = [_leaves(run.record.config) for run in runs]
    names = sorted({name for leaves in flat for name in leaves})
    rows = [[name, *(leaves.get(name) for leaves in flat)] for name in names]
    unlike = [row for row in rows if any(cell != row[1] for cell in row[2:])]
    return table([["", *(run.name for run in runs)], *unlike]) if unlike else Html()


def _settings(runs: Sequence[RunHistory]) -> Html:
    texts = [(run, yaml.safe_dump(run.record.config, sort_keys=False)) for run in runs if run.record.config]
    pieces = [element("details", element("summary", run.name), element("pre", text)) for run, text in texts]
    return joined(pieces)


SECTIONS: tuple[tuple[str, str, Callable[[Sequence[RunHistory]], Html]], ...] = (
    ("Lives", "A bar is a life of the run, in the colour of its end.", _timeline),
    (
        "Goodput",
        "Training is the time in which steps were computed that still count. Steps done again are those that a life "
        "did after its last checkpoint and the next one repeated; they stand once in all curves below.",
        _goodput,
    ),
    ("Losses", "Averages of the steps between two reports.", _losses),
    ("Validation", "Held-out windows with fixed noise; the averaged weights, dashed: the trained ones.", _validation),
    ("Gradients and learning rate", "", _gradients),
    ("Speed and memory", "", _speed),
    ("Memory of the Gated DeltaNet layers", "What a token leaves of their state: 1 forgets nothing.", _decay),
    ("Further measurements", "", _others),
    ("Newest samples", "Sampled by the averaged weights, beside what was recorded.", _samples),
    ("What happened", "", _events),
    ("Settings that changed on resumption", "", _changes),
    ("Settings that differ", "", _differences),
    ("All settings", "", _settings),
)
"""Heading, note and content of each part; one without content is left out."""


# --- pieces of a page ---


def _figures(about: str, *figures: Figure | None) -> Html:
    return drawn(about, *figures, dots=DOTS)


def _picture(content: bytes, kind: str, about: str) -> Html:
    name = 'class="moving"' if kind == "gif" else ""
    img = image(content, about, kind=kind, attributes=name)
    return element("figure", img, element("figcaption", about.replace("_", " ")))


def _latest(run: RunHistory, name: str) -> float | None:
    _, values = run.record.curve(name)
    return values[-1] if values else None


def _share(run: RunHistory, kind: str) -> float:
    return run.goodput.seconds[kind] / run.goodput.total if run.goodput.total else 0.0


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves
