"""Curves of runs, over each other where they are several. Matplotlib figures without pyplot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from kairos_train.operations.reports.curves import ceiling, thinned
from kairos_train.operations.reports.goodput import KINDS
from kairos_train.operations.reports.history import RunHistory
from kairos_train.operations.reports.records import Attempt

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:cyan")
SPENT = {
    **{"training": "#2e8b57", "data": "#e0b13c", "dropped": "#c0392b", "redone": "#9b59b6", "checkpoint": "#3b78c3"},
    **{"validation": "#48b0c4", "starting": "#8a94a3", "down": "#e07b6a", "other": "#c9ced6"},
}
OUTCOMES = {
    **{"finished": "#3b78c3", "interrupted": "#e0b13c", "running": "#2e8b57", "starting": "#8ac6a4"},
    **{"killed": "#c0392b", "fault": "#c0392b", "error": "#c0392b", "stopped": "#8e2a5b", "silent": "#8a94a3"},
}
MARKS = {
    "checkpoint": ("|", "#1c2430", "checkpoint"),
    "checkpoint_failed": ("X", "#c0392b", "checkpoint failed"),
    "passed_over": ("P", "#e07b6a", "checkpoint skipped"),
    "skipped": ("x", "#c0392b", "step dropped"),
    "rollback": ("<", "#9b59b6", "rollback"),
    "straggler": ("v", "#b8860b", "straggler"),
    "loader_stall": ("s", "#b8860b", "loader stall"),
    "profile": ("o", "#3b78c3", "profile"),
    "stop_requested": ("d", "#e0b13c", "asked to stop"),
}
UNNAMED = "#8a94a3"
UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
LABEL = 28  # most characters of a run's name in a legend
COLUMNS, WIDTH, HEIGHT = 3, 3.9, 2.7  # of a panel, in inches


def curves(
    runs: Sequence[RunHistory], panels: Mapping[str, Sequence[str]], *, log: Sequence[str] = ()
) -> Figure | None:
    """A panel for each title, in it a line for each run and metric; None when no run has any.

    Args:
        panels: title → metrics; the second one is dashed.
        log: titles of panels that become logarithmic where they span more than a decade.
    """
    shown = {title: names for title, names in panels.items() if any(_has(run, names) for run in runs)}
    if not shown:
        return None
    figure, axes = _grid(len(shown))
    legend: dict[str, Line2D] = {}
    for (title, names), axis in zip(shown.items(), axes):
        for colour, label, run in _coloured(runs):
            for name, style in zip(names, ("-", "--")):
                x, y = thinned(*run.record.curve(name))
                (line,) = axis.plot(x, y, color=colour, linestyle=style, linewidth=1.3, marker=_marker(x))
                legend.setdefault(label, line)
        _finish(axis, title)
        values = np.concatenate([line.get_ydata() for line in axis.get_lines()])
        positive = values[values > 0]
        if title in log and len(positive) == np.isfinite(values).sum() > 0 and positive.max() > 10 * positive.min():
            axis.set_yscale("log")
        else:
            _cut(axis, values)
    if len(runs) > 1:
        _legend(figure, legend)
    return figure


def families(runs: Sequence[RunHistory], panels: Mapping[str, tuple[str, str]]) -> Figure | None:
    """A panel for each run and title, in it a line for each metric `PREFIX…SUFFIX`; None when no run has any.

    Args:
        panels: title → prefix and suffix; the lines are called what stands between them.
    """
    shown = []
    for title, (prefix, suffix) in panels.items():
        for run in runs:
            names = [name for name in run.record.names(prefix) if name.endswith(suffix)]
            if names:
                inner = {name.removeprefix(prefix).removesuffix(suffix): name for name in names}
                shown.append((f"{title}: {_short(run.name)}" if len(runs) > 1 else title, run, inner))
    if not shown:
        return None
    labels = sorted({label for _, _, names in shown for label in names})
    colours = dict(zip(labels, _shades(len(labels))))
    figure, axes = _grid(len(shown))
    legend: dict[str, Line2D] = {}
    for (title, run, names), axis in zip(shown, axes):
        for label, name in names.items():
            x, y = thinned(*run.record.curve(name))
            (legend[label],) = axis.plot(x, y, color=colours[label], linewidth=1.2, marker=_marker(x))
        _finish(axis, title)
        _cut(axis, np.concatenate([line.get_ydata() for line in axis.get_lines()]))
    _legend(figure, {label: legend[label] for label in labels})
    return figure


def timeline(runs: Sequence[RunHistory]) -> Figure | None:
    """A bar for each life in the colour of its end, with marks for what happened; None without any life."""
    rows = [(run, life) for run in runs for life in run.lives]
    if not rows:
        return None
    begin = min(life.start for _, life in rows)
    length = max(_end(run, life) for run, life in rows) - begin
    unit, scale = next(((name, size) for name, size in UNITS if length > 2 * size), UNITS[-1])
    figure = Figure(figsize=(WIDTH * COLUMNS, 0.9 + 0.3 * len(rows)), layout="constrained")
    axis, seen, ends = figure.subplots(), {}, {}
    for row, (run, life) in enumerate(rows):
        outcome, left = life.outcome or run.state.name, (life.start - begin) / scale
        style = {"color": OUTCOMES.get(outcome, UNNAMED), "alpha": 0.55}
        ends[outcome] = Patch(label=outcome, **style)
        axis.barh(row, max(_end(run, life) - life.start, length / 500) / scale, left=left, height=0.62, **style)
        for kind, (marker, colour, label) in MARKS.items():
            times = [(e["time"] - begin) / scale for e in run.record.of(kind) if e["life"] == life.number]
            if times:
                style = {"marker": marker, "color": colour, "s": 40 if marker == "|" else 30, "linewidths": 1}
                seen[kind] = axis.scatter(times, [row] * len(times), label=label, zorder=3, **style)
    names = [f"{f'{_short(run.name)}, ' if len(runs) > 1 else ''}life {life.number}" for run, life in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"{unit} since the first start", fontsize=8)
    axis.tick_params(labelsize=8)
    _bare(axis)
    marks = [seen[kind] for kind in MARKS if kind in seen]
    figure.legend(handles=[*ends.values(), *marks], loc="outside upper left", ncols=8, fontsize=8, frameon=False)
    return figure


def goodput(runs: Sequence[RunHistory]) -> Figure | None:
    """Where the time of each run went, as shares of its total; None when no run knows."""
    known = [run for run in runs if run.goodput and run.goodput.total > 0]
    if not known:
        return None
    figure = Figure(figsize=(WIDTH * COLUMNS, 0.9 + 0.34 * len(known)), layout="constrained")
    axis = figure.subplots()
    left = np.zeros(len(known))
    for kind, label in KINDS.items():
        shares = np.array([100 * run.goodput.seconds[kind] / run.goodput.total for run in known])
        if shares.any():
            axis.barh(range(len(known)), shares, left=left, color=SPENT[kind], label=label, height=0.62)
            for row, share in enumerate(shares):
                if share >= 4:
                    style = {"ha": "center", "va": "center", "fontsize": 8, "color": "white"}
                    axis.text(left[row] + share / 2, row, f"{share:.0f} %", **style)
            left += shares
    axis.set_yticks(range(len(known)), [_short(run.name) for run in known], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of the time since the first start", fontsize=8)
    axis.tick_params(labelsize=8)
    _bare(axis)
    figure.legend(loc="outside upper left", ncols=9, fontsize=8, frameon=False)
    return figure


def _end(run: RunHistory, life: Attempt) -> float:
    """When a life ended; of one that goes on, now."""
    return run.now if run.state.going and life is run.lives[-1] else life.end


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    """Figure and axes of a number of panels; the last row's places that are left over stay empty."""
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 0.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, list(axes[:count])


def _finish(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(axis="y", color="0.92", linewidth=0.8)
    _bare(axis)


def _cut(axis: Axes, values: np.ndarray) -> None:
    """Leave single points out that are so high that nothing else could be seen; they are marked at the upper edge."""
    top = ceiling(values)
    if top is None:
        return
    usual = values[np.isfinite(values) & (values <= top)]
    axis.set_ylim(usual.min() - 0.05 * (top - usual.min()), top)
    for line in axis.get_lines():
        x, y = line.get_data()
        above = np.asarray(y) > top
        style = {"marker": "^", "color": line.get_color(), "s": 16, "clip_on": False, "zorder": 3}
        axis.scatter(np.asarray(x)[above], np.full(above.sum(), top), **style)


def _bare(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)


def _coloured(runs: Sequence[RunHistory]) -> list[tuple[str, str, RunHistory]]:
    return [(COLOURS[i % len(COLOURS)], _short(run.name), run) for i, run in enumerate(runs)]


def _marker(x: Sequence[float]) -> str | None:
    return "." if len(x) < 15 else None


def _short(name: str) -> str:
    """Of long names the end, so that legends leave room for the curves."""
    return name if len(name) <= LABEL else f"…{name[1 - LABEL :]}"


def _shades(count: int) -> list[object]:
    """Ordered colours: the members of a family are often bins or layers."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.92 * i / max(1, count - 1)) for i in range(count)]


def _has(run: RunHistory, names: Sequence[str]) -> bool:
    return any(run.record.curve(name)[0] for name in names)


def _legend(figure: Figure, lines: Mapping[str, Line2D]) -> None:
    figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=8, fontsize=8, frameon=False)
