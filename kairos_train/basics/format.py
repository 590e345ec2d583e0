"""Times, amounts and events in words, as the status and the report show them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from datetime import datetime
from typing import Any

QUIET = ("start", "stop", "checkpoint", "memory")
"""Kinds of events that every run has; the rest is worth a line."""


def span(seconds: float | None) -> str:
    """A length of time in its two largest units."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    seconds = round(seconds)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for (name, size), (lower, step) in itertools.pairwise(units):
        if seconds >= size:
            whole, rest = divmod(seconds, size)
            return f"{whole} {name} {rest // step} {lower}" if rest // step else f"{whole} {name}"
    return f"{seconds} s"


def clock(time: float | None) -> str:
    """A local time to the minute."""
    return "–" if time is None else datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M")


def number(value: Any) -> str:
    """Four significant digits, "–" for nothing."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def many(count: int, thing: str) -> str:
    """A number of things."""
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def gigabytes(size: float) -> str:
    """Bytes in the unit that fits."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


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
