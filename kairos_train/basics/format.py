"""Times and amounts in words."""

from __future__ import annotations

import itertools
from datetime import datetime
from typing import Any


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
    """A number of four significant digits, "–" for nothing, anything else as text."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def many(count: int, thing: str) -> str:
    """A number of things."""
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def gigabytes(size: float) -> str:
    """Bytes in the unit that fits."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"
