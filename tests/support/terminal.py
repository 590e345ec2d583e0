"""Commands as they look on a terminal, in this process."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import pytest
from rich.text import Text

from kairos_train.cli import main


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What was written, line by line, without colours and trailing blanks."""
        return [Text.from_ansi(line).plain.rstrip() for line in self.getvalue().splitlines()]


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, *words: object, code: int = 0) -> str:
    """What `kairos-train WORDS` leaves on a terminal of 100 columns, without colours; the exit code is checked."""
    with terminal(monkeypatch, columns=100) as screen:
        assert main([*map(str, words)]) == code
    return "\n".join(screen.lines())


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, *, columns: int, stream: str = "stdout") -> Iterator[Terminal]:
    """`sys.stdout` or `sys.stderr` is a terminal of so many columns."""
    for name, value in {"TERM": "xterm", "COLUMNS": str(columns)}.items():
        monkeypatch.setenv(name, value)
    redirect = contextlib.redirect_stdout if stream == "stdout" else contextlib.redirect_stderr
    with redirect(Terminal()) as screen:
        yield screen
