"""The one logger: what a program reports while it goes, in lines on stderr.

A program calls `log_to_stderr` once. Where the packages are imported by another, its own `logging` decides.
"""

from __future__ import annotations

import logging
import os
import sys

from kairos_train.basics.secrets import redacted

logger = logging.getLogger("kairos_train")


def log_to_stderr(*, dated: bool = False) -> None:
    """Show what is logged on stderr: all of rank 0's, of other ranks warnings and worse.

    Args:
        dated: with time and level, for programs that serve others for weeks.
    """
    handler = _to_stderr()
    if handler is None:
        logger.addHandler(handler := _ToStderr())
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s" if dated else None))
    logger.setLevel(logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.WARNING)
    logger.propagate = False  # libraries give the root logger handlers of their own


def shows_on_terminal() -> bool:
    """Whether what this process reports is seen on a terminal."""
    return _to_stderr() is not None and logger.isEnabledFor(logging.INFO) and sys.stderr.isatty()


def _to_stderr() -> logging.Handler | None:
    """The handler of `log_to_stderr`, beside whatever others there are."""
    return next((handler for handler in logger.handlers if isinstance(handler, _ToStderr)), None)


class _ToStderr(logging.Handler):
    """To what `sys.stderr` is at the time, without the secrets of URLs."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(redacted(self.format(record)), file=sys.stderr, flush=True)
        except OSError:
            self.handleError(record)
