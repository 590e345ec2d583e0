"""JSON lines: files that are appended to, and that a kill, a full disk or a failing one may leave with odd bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from kairos_train.basics.errors import one_line
from kairos_train.basics.foreign_files import check_regular, parse_json
from kairos_train.basics.format import many
from kairos_train.basics.log import logger


class JsonLine(NamedTuple):
    """A line as it stands in its file, with its line break, and the object that it is."""

    text: bytes
    value: dict[str, Any]


def read_json_lines(path: Path, is_one: Callable[[dict[str, Any]], bool]) -> list[JsonLine]:
    """The lines of a file that are objects of its kind; none without the file.

    How many others are skipped is logged. A last line without a line break is still being written, or was cut off by
    a kill, and is not counted.

    Args:
        is_one: whether an object is a line of this kind of file.
    """
    try:
        check_regular(path)
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        logger.warning(f"{path}: cannot be read ({one_line(error)}); its lines are left out")
        return []
    *whole, rest = data.split(b"\n")
    lines = [parse_json_line(text, is_one) for text in whole]
    if odd := lines.count(None):
        logger.warning(f"{path}: left out {many(odd, 'line')} that cannot be read")
    return [line for line in [*lines, parse_json_line(rest, is_one)] if line is not None]


def parse_json_line(text: bytes, is_one: Callable[[dict[str, Any]], bool]) -> JsonLine | None:
    """A line without its line break; None where it is cut off, in another encoding, or no object of its kind."""
    try:
        value = parse_json(text.decode(), unique=True)
    except ValueError:
        return None
    return JsonLine(text + b"\n", value) if isinstance(value, dict) and is_one(value) else None


def has_step(value: dict[str, Any]) -> bool:
    """Whether a line is of a step."""
    return type(value.get("step")) is int
