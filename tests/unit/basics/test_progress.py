"""How far a long piece of work is: lines of the log by a clock that the test turns, and a bar on a terminal."""

import logging

import pytest
from support.terminal import terminal

from kairos_train.basics.log import log_to_stderr, logger
from kairos_train.basics.progress import progress, span, track


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines(caplog):
    """What is logged."""
    caplog.set_level(logging.INFO, "kairos_train")
    propagate, logger.propagate = logger.propagate, True
    yield lambda: [record.getMessage() for record in caplog.records]
    logger.propagate = propagate


def test_short_work_says_nothing(clock, lines):
    with progress("pack", 10, "episodes", clock=clock) as advance:
        for number in range(1, 11):
            clock.now += 0.4
            advance(number)
    assert lines() == []


def test_long_work_says_how_far_it_is_ever_more_rarely_and_what_it_took(clock, lines):
    with progress("pack", 1000, "episodes", clock=clock) as advance:
        for number in range(1, 1001):
            clock.now += 0.5
            advance(number)
    *told, last = lines()
    assert told[:3] == [
        "pack: 10 of 1,000 episodes, 8 min left",  # after 5 s, then 10 and 20 s of silence
        "pack: 30 of 1,000 episodes, 8 min left",
        "pack: 70 of 1,000 episodes, 8 min left",
    ]
    assert len(told) == 3 + 1 + 7, "then after 40, then every 60"
    assert last == "pack: 1,000 episodes in 8 min"


def test_what_else_reports_needs_no_help(clock, lines):
    with progress("train", 1000, "steps", clock=clock) as advance:
        for number in range(1, 101):
            clock.now += 4
            logger.info(f"step {number}")
            advance(number)
        clock.now += 4.5
        advance(101)
        assert all(line.startswith("step ") for line in lines())
        clock.now += 1
        advance(102)
    assert lines()[-2].startswith("train: 102 of 1,000 steps, ")
    assert logger.handlers == [handler for handler in logger.handlers if type(handler).__name__ != "_Heard"]


def test_work_that_goes_on_is_timed_from_where_it_stood(clock, lines):
    with progress("pack", 100, "episodes", done=90, clock=clock) as advance:
        clock.now += 10
        advance(95)
    assert lines() == ["pack: 95 of 100 episodes, 10 s left", "pack: 5 episodes in 10 s"]


def test_items_are_counted_once_they_have_been_dealt_with(clock, lines):
    taken = []
    for letter in track("abc", "read", 3, "letters", clock=clock):
        taken.append(letter)
        clock.now += 6
    assert taken == ["a", "b", "c"]
    assert lines() == ["read: 1 of 3 letters, 12 s left", "read: 3 letters in 18 s"]


def test_other_ranks_and_programs_that_do_not_ask_show_no_bar(monkeypatch):
    with terminal(monkeypatch, columns=80, stream="stderr") as screen:
        monkeypatch.setattr(logger, "handlers", [])
        list(track(range(3), "read", 3, "files"))
        log_to_stderr()
        monkeypatch.setattr(logger, "level", logging.WARNING)
        list(track(range(3), "read", 3, "files"))
    assert screen.getvalue() == ""


def test_a_terminal_has_a_bar_below_the_lines_and_nothing_of_it_is_left(clock, monkeypatch):
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logging.INFO)
    with terminal(monkeypatch, columns=80, stream="stderr") as screen:
        log_to_stderr()
        with progress("pack", 40, "episodes", clock=clock) as advance:
            clock.now += 3
            advance(10)
            logger.info("a line")
            clock.now += 3
            advance(20)
        logger.info("the end")
    drawn = screen.getvalue()
    assert "10/40 episodes" in drawn
    assert "20/40 episodes" in drawn
    assert "\x1b[?25l" not in drawn, "the cursor stays"
    assert shown(drawn) == ["a line", "pack: 20 episodes in 6 s", "the end"]


def shown(written: str) -> list[str]:
    """What a terminal shows in the end of text with carriage returns, erased lines and steps up."""
    rows, row = [""], 0
    for part in written.replace("\r", "\0\r").replace("\n", "\0\n").replace("\x1b[", "\0\x1b[").split("\0"):
        if part.startswith("\x1b[2K"):
            rows[row], part = "", part[4:]
        elif part.startswith("\x1b[1A"):
            row, part = row - 1, part[4:]
        elif part.startswith("\x1b["):
            part = part.partition("m")[2]
        elif part.startswith("\n"):
            row, part = row + 1, part[1:]
            rows += [""] * (row + 1 - len(rows))
        elif part.startswith("\r"):
            part = part[1:]
            if part:
                rows[row] = ""
        rows[row] += part
    return [line for line in rows if line]


@pytest.mark.parametrize(("seconds", "text"), [(5.4, "5 s"), (119, "119 s"), (150, "2 min"), (9000, "2.5 h")])
def test_times_in_words(seconds, text):
    assert span(seconds) == text
