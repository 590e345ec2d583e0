"""Runs in the terminal: one in detail, several as a table, with details of those that have not finished."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kairos_train.basics.files import write_whole
from kairos_train.basics.format import clock, gigabytes, many, number, span
from kairos_train.operations.events import QUIET, describe
from kairos_train.operations.reports.curves import sparkline
from kairos_train.operations.reports.diagnosis import HEALTHY, LOOK, TROUBLE
from kairos_train.operations.reports.goodput import KINDS
from kairos_train.operations.reports.history import RunHistory, read_histories

STYLES = {
    **{"running": "green", "starting": "cyan", "finished": "blue", "interrupted": "yellow", "unknown": "yellow"},
    **{HEALTHY: "green", LOOK: "yellow", TROUBLE: "bold red"},
}
BAD = "bold red"
SHORT = {HEALTHY: "ok", LOOK: "look", TROUBLE: "TROUBLE"}
WORDS = {HEALTHY: "healthy", LOOK: "needs a look", TROUBLE: "in trouble"}
COLOURS = {
    **{"training": "green", "data": "yellow", "dropped": "red", "redone": "magenta", "checkpoint": "blue"},
    **{"validation": "cyan", "starting": "grey62", "down": "indian_red", "other": "white"},
}
WIDTH, BAR, CURVE = 108, 28, 28  # columns
EVENTS_SHOWN = 6
EVENT = 110  # characters of one; the report has them whole


def watch(folders: Sequence[Path], *, seconds: float) -> None:
    """Show the status again every few seconds, until the terminal interrupts.

    Raises:
        UserError: a folder without a run.
    """
    with Live(render(read_histories(folders)), auto_refresh=False, screen=True) as live:
        while True:
            live.update(render(read_histories(folders)), refresh=True)
            time.sleep(seconds)


def write_svg(histories: Sequence[RunHistory], path: Path) -> None:
    """Draw the status as it looks in a terminal."""
    console = Console(record=True, file=io.StringIO(), width=WIDTH, force_terminal=True, color_system="truecolor")
    console.print(render(histories))
    write_whole(path, console.export_svg(title="kairos-train status"))


def summary(history: RunHistory) -> dict[str, Any]:
    """The same as plain data, for other programs."""
    progress, found, goodput = history.progress, history.checkpoints, history.goodput
    last = history.record.reports[-1].values if history.record.reports else {}
    return {
        "run_dir": str(history.record.run_dir),
        "state": history.state.name,
        "text": history.state.text,
        "seconds_since_sign_of_life": history.state.since,
        "step": progress.step,
        "share": progress.share,
        "budget": progress.budget,
        "seconds_per_step": progress.seconds_per_step,
        "seconds_left": progress.left,
        "health": history.health.level,
        "reasons": [{"level": reason.level, "text": reason.text} for reason in history.health.reasons],
        "lives": len(history.lives) or None,
        "restarts": history.restarts if history.lives else None,
        "goodput": goodput.share if goodput else None,
        "seconds": {"total": goodput.total, **goodput.seconds} if goodput else None,
        "checkpoint": None
        if found.newest is None
        else {"path": str(found.newest), "step": found.step, "age": found.age},
        "samples_step": history.samples[0].step if history.samples else None,
        "metrics": {name: value if math.isfinite(value) else str(value) for name, value in last.items()},
        "unknown": history.unknown,
    }


def render(histories: Sequence[RunHistory]) -> RenderableType:
    """What the terminal shows."""
    if len(histories) == 1:
        return _panel(histories[0])
    details = [_panel(history) for history in histories if history.state.name != "finished"]
    return Group(_overview(histories), *details)


# --- several runs ---


def _overview(histories: Sequence[RunHistory]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    for name in ("run", "state", "health"):
        table.add_column(name, no_wrap=name != "run")
    for name in ("step", "done", "left", "loss", "s/step", "goodput", "lives"):
        table.add_column(name, justify="right", no_wrap=True)
    for history in histories:
        progress, goodput = history.progress, history.goodput
        table.add_row(
            history.name,
            Text(history.state.name, _style(history.state.name)),
            Text(SHORT[history.health.level], STYLES[history.health.level]),
            f"{progress.step:,}",
            "–" if progress.share is None else f"{progress.share:.0%}",
            span(progress.left) if progress.left else "–",
            number(_latest(history, "loss/total")),
            number(progress.seconds_per_step),
            f"{goodput.share:.0%}" if goodput else "–",
            str(len(history.lives) or "–"),
        )
    return table


# --- one run ---


def _panel(history: RunHistory) -> Panel:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(ratio=1)
    for name, content in _rows(history):
        grid.add_row(name, content)
    level = history.health.level
    return Panel(
        grid,
        title=Text.assemble((f" {history.record.run_dir} ", "bold")),
        title_align="left",
        subtitle=Text(f" {clock(history.now)} ", "dim"),
        subtitle_align="right",
        border_style=STYLES[level] if level != HEALTHY else "bright_black",
        padding=(0, 1),
    )


def _rows(history: RunHistory) -> Iterator[tuple[str, RenderableType]]:
    yield "state", _state(history)
    yield "progress", _progress(history)
    yield "health", _health(history)
    if history.record.reports:
        yield "losses", _losses(history)
        yield "speed", _speed(history)
    yield "checkpoint", _checkpoint(history)
    if history.samples:
        names = sorted({sample.path.stem.rsplit("_", 1)[0] for sample in history.samples})
        found = f"{many(len(history.samples), 'image')} ({', '.join(names)}) in {history.samples[0].path.parent}"
        yield "samples", Text(f"step {history.samples[0].step:,}: {found}")
    if history.lives:
        yield "lives", _lives(history)
    if history.goodput:
        yield "goodput", _goodput(history)
    if told := [event for event in history.record.events if event["kind"] not in QUIET][-EVENTS_SHOWN:]:
        yield "events", _events(told)
    for text in history.unknown:
        yield "not known", Text(text, "yellow")


def _state(history: RunHistory) -> Text:
    state, life = history.state, history.lives[-1] if history.lives else None
    text = Text.assemble(("● ", _style(state.name)), (state.name, _style(state.name)))
    if stage := history.record.setting("stage.name"):
        text.append(f"  stage {(life.place.get('place') if life else None) or stage}")
    if life:
        world, host, job = (life.place.get(name) for name in ("world", "host", "job"))
        text.append(f"  {world} process(es)" if world else "")
        text.append(f" on {host}" if host else "")
        text.append(f", job {job}" if job else "")
    if state.since is not None:
        text.append(f"  last sign of life {span(state.since)} ago", "dim")
    return text


def _progress(history: RunHistory) -> RenderableType:
    progress = history.progress
    amount, _, unit = progress.budget.partition(" ")
    text = Text(f"step {progress.step:,}" + (f" of {amount}" if unit == "steps" else ""))
    if progress.share is not None:
        text.append(f"  {progress.share:.1%}" + (f" of {progress.budget}" if unit != "steps" else ""))
    if progress.left and history.state.going:
        end = time.strftime(
            "%a %H:%M" if progress.left < 6 * 86400 else "%Y-%m-%d", time.localtime(history.now + progress.left)
        )
        text.append(f"  {span(progress.left)} left, until {end}")
    elif progress.left:
        text.append(f"  {span(progress.left)} left at its last pace")
    if progress.share is None:
        return text
    bar = ProgressBar(total=1.0, completed=progress.share, width=BAR, complete_style="green", finished_style="blue")
    return _beside(bar, text)


def _health(history: RunHistory) -> Text:
    level = history.health.level
    text = Text(WORDS[level], STYLES[level])
    for reason in history.health.reasons:
        text.append("\n! " if reason.level == TROUBLE else "\n• ", STYLES[reason.level])
        text.append(reason.text, "default")
    return text


def _losses(history: RunHistory) -> Table:
    table = Table.grid(padding=(0, 2))
    for name in ("loss/total", "loss/video", "loss/action"):
        _, values = history.record.curve(name)
        if values:
            table.add_row(name.split("/")[1], f"{values[-1]:.4f}", Text(sparkline(values, CURVE), "cyan"))
    for name in history.record.names("validation_ema/"):
        steps, values = history.record.curve(name)
        curve = Text.assemble((sparkline(values, CURVE), "blue"), (f"  of step {steps[-1]:,}", "dim"))
        table.add_row(f"{name.split('/')[1]}, held out", f"{values[-1]:.4f}", curve)
    return table


def _speed(history: RunHistory) -> Text:
    facts = [
        ("speed/seconds_per_step", "{:.2f} s/step"),
        ("speed/samples_per_second", "{:.1f} samples/s"),
        ("speed/mfu", "MFU {:.1%}"),
        ("speed/data_wait_share", "waits for data {:.1%}"),
        ("memory/gb", "memory {:.1f} GB"),
        ("memory/headroom_gb", "{:.1f} GB free"),
        ("optimizer/grad_norm", "|g| {:.3g}"),
        ("optimizer/lr", "lr {:.2e}"),
    ]
    found = [(text, _latest(history, name)) for name, text in facts]
    return Text("  ".join(text.format(value) for text, value in found if value is not None))


def _checkpoint(history: RunHistory) -> Text:
    found = history.checkpoints
    if found.newest is None:
        return Text("none that is valid", "yellow" if history.progress.step else "dim")
    return Text(f"step {found.step:,}, {span(found.age)} old, {gigabytes(found.size)}; {many(found.count, 'folder')}")


def _lives(history: RunHistory) -> Text:
    text = Text(f"{len(history.lives)}")
    text.append(f", {many(history.restarts, 'restart')}" if history.restarts else "")
    before = [life for life in history.lives if life.outcome][-8:]
    if history.restarts:
        text.append("  ended: ")
        text.append(", ".join(f"{life.outcome} at {clock(life.end)[5:]}" for life in before))
    return text


def _goodput(history: RunHistory) -> RenderableType:
    shares = history.goodput.shares()
    bar = Text()
    ends = [round(BAR * sum(list(shares.values())[: i + 1])) for i in range(len(shares))]
    for kind, begin, end in zip(shares, [0, *ends], ends):
        bar.append("█" * (end - begin), COLOURS[kind])
    text = Text(f"{history.goodput.share:.1%} of {span(history.goodput.total)}")
    legend = Text()
    for kind, share in sorted(shares.items(), key=lambda item: -item[1]):
        if share >= 0.001:
            legend.append("■ ", COLOURS[kind])
            legend.append(f"{KINDS[kind]} {share:.1%}  ", "dim")
    return Group(_beside(bar, text), legend)


def _events(events: Sequence[dict[str, Any]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True, style="yellow")
    table.add_column(ratio=1)
    for event in events:
        step = f"step {event['step']:,}: " if isinstance(event.get("step"), int) and event["kind"] != "rollback" else ""
        text = f"{step}{describe(event)}"
        text = text if len(text) <= EVENT else f"{text[: EVENT - 1]}…"
        table.add_row(clock(event["time"])[5:], event["kind"].replace("_", " "), text)
    return table


def _beside(bar: RenderableType, text: Text) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(width=BAR)
    table.add_row(bar, text)
    return table


def _latest(history: RunHistory, name: str) -> float | None:
    _, values = history.record.curve(name)
    return values[-1] if values else None


def _style(state: str) -> str:
    return STYLES.get(state, BAD)
