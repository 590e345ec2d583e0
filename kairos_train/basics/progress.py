"""How far a long piece of work is: a bar on a terminal, lines of the log elsewhere.

Only a program that reports on stderr (`kairos_train.basics.log`) shows either, and of several ranks the first.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from kairos_train.basics.log import logger, shows_on_terminal

Item = TypeVar("Item")
Advance = Callable[[float], None]
"""Takes how much is done in all."""

FIRST, LAST = 5.0, 60.0
"""Seconds without a line of the log after which one says how far the work is: first, and at most, doubled each time."""
REDRAWN = 0.1  # seconds between two pictures of the bar


@contextmanager
def progress(
    what: str, total: float, unit: str, *, done: float = 0, clock: Callable[[], float] = time.monotonic
) -> Iterator[Advance]:
    """Report on a piece of work while the block lasts; work of more than `FIRST` seconds leaves a line at its end.

    Args:
        what: is done, as "packing".
        total: amount of work.
        unit: of amounts, as "episodes".
        done: of it before.
        clock: in seconds.
    """
    draw = _bar if shows_on_terminal() else _lines
    begin, last = clock(), done
    with draw(what, total, unit, done, clock) as advance:

        def report(amount: float) -> None:
            nonlocal last
            last = amount
            advance(amount)

        yield report
    if (seconds := clock() - begin) >= FIRST:
        logger.info(f"{what}: {last - done:,.0f} {unit} in {span(seconds)}")


def track(
    items: Iterable[Item], what: str, total: int, unit: str, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Item]:
    """The items, with `progress` on how many have been dealt with."""
    with progress(what, total, unit, clock=clock) as advance:
        for number, item in enumerate(items, 1):
            yield item
            advance(number)


def span(seconds: float) -> str:
    """A time in words, to two digits or so: 5 s, 90 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextmanager
def _lines(what: str, total: float, unit: str, first: float, clock: Callable[[], float]) -> Iterator[Advance]:
    """A line when the log has been silent for long: what else reports needs no help."""
    begin = clock()
    heard = _Heard(clock)
    wait = FIRST

    def advance(done: float) -> None:
        nonlocal wait
        now = clock()
        if now - heard.last < wait or done >= total:
            return
        left = "" if done <= first else f", {span((now - begin) * (total - done) / (done - first))} left"
        logger.info(f"{what}: {done:,.0f} of {total:,.0f} {unit}{left}")
        wait = min(2 * wait, LAST)

    logger.addHandler(heard)
    try:
        yield advance
    finally:
        logger.removeHandler(heard)


class _Heard(logging.Handler):
    """When the last line was logged."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock, self.last = clock, clock()

    def emit(self, record: logging.LogRecord) -> None:
        self.last = self._clock()


@contextmanager
def _bar(what: str, total: float, unit: str, first: float, clock: Callable[[], float]) -> Iterator[Advance]:
    """Processes are forked while it stands there, and may be killed: so no thread draws it, `sys.stderr` stays what it
    is, and the cursor is not hidden."""
    from rich import progress as rich
    from rich.console import Console

    class WithCursor(Console):
        def show_cursor(self, show: bool = True) -> bool:
            return False

    shown = rich.Progress(
        *("{task.description}", rich.BarColumn(), "{task.completed:,.0f}/{task.total:,.0f}", unit),
        rich.TimeRemainingColumn(),
        console=WithCursor(file=sys.stderr),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        get_time=clock,
    )
    drawn = clock()

    def advance(done: float) -> None:
        nonlocal drawn
        shown.update(task, completed=done)
        if clock() - drawn >= REDRAWN:
            drawn = clock()
            shown.refresh()

    logger.addFilter(_leave_the_line)
    try:
        with shown:
            task = shown.add_task(what, total=total, completed=first)
            shown.refresh()
            yield advance
    finally:
        logger.removeFilter(_leave_the_line)


def _leave_the_line(record: logging.LogRecord) -> bool:
    """Before a line of the log: wipe the bar, which is drawn again below."""
    sys.stderr.write("\r\x1b[2K")
    return True
