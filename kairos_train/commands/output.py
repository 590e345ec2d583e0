"""What a command ends with, and the one function that shows it.

On a terminal: a table, where to look, and the next command. Into a pipe, or with `--json`: one JSON object. A result
that is itself a text, such as a configuration or a script, is printed as it is.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kairos_train.basics.secrets import redacted, redacted_values

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Table:
    """Rows of a table; `columns` are its headings, none for a list of names and values."""

    rows: Sequence[Sequence[Any]]
    columns: Sequence[str] = ()


@dataclass(frozen=True)
class Result:
    """What a command found or made.

    Attributes:
        content: of the JSON object.
        table: of a terminal; text stands as it is, None shows what is not nested of `content`.
        document: the result is this text: nothing else is shown of it, but for `--json`.
        look: what was written → where.
        then: commands to go on with.
        code: exit code.
    """

    content: Mapping[str, Any] = field(default_factory=dict)
    table: Table | RenderableType | None = None
    document: str | None = None
    look: Mapping[str, object] = field(default_factory=dict)
    then: Sequence[str] = ()
    code: int = 0


def show(result: Result, *, as_json: bool) -> int:
    """Print a result on stdout, of rank 0 alone; returns its exit code."""
    if int(os.environ.get("RANK", "0")):
        return result.code
    result = _redacted(result)
    if as_json or (result.document is None and not sys.stdout.isatty()):
        if result.content:
            print(json.dumps(result.content, indent=1, sort_keys=True, default=str), flush=True)
    elif result.document is not None:
        print(result.document, end="" if result.document.endswith("\n") else "\n", flush=True)
    elif result.content or result.table is not None:  # a server that was stopped has nothing to show, and no rich
        _show_on_terminal(result)
    return result.code


def _redacted(result: Result) -> Result:
    """Without the secrets that addresses carry."""
    table = result.table
    if isinstance(table, Table):
        table = Table(redacted_values(table.rows), table.columns)
    return replace(
        result,
        content=redacted_values(result.content),
        table=redacted(table) if isinstance(table, str) else table,
        look=redacted_values(result.look),
        then=redacted_values(result.then),
    )


def _show_on_terminal(result: Result) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    flat = [(name, value) for name, value in result.content.items() if not isinstance(value, Mapping | list | tuple)]
    table = Table(flat) if result.table is None else result.table
    if isinstance(table, Table):
        if table.rows:
            console.print(_drawn(table))
    else:
        console.print(table, markup=False, soft_wrap=isinstance(table, str))
    width = max(map(len, result.look), default=0)
    for title, lines in (
        ("where to look", [f"{name:<{width}}  {where}" for name, where in result.look.items()]),
        ("next", list(result.then)),
    ):
        if lines:
            console.print(f"\n[bold]{title}[/]")
            for line in lines:  # not wrapped: they are to be copied
                console.print(f"  {line}", markup=False, soft_wrap=True)


def _drawn(table: Table) -> RenderableType:
    from rich import box
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(box=box.SIMPLE_HEAD if table.columns else None, show_header=bool(table.columns), pad_edge=False)
    for number, column in enumerate(table.columns or table.rows[0]):
        values = [row[number] for row in table.rows]
        numeric = table.columns and all(isinstance(value, int | float | None) for value in values)
        heading = str(column) if table.columns else ""
        whole = number == 0 and len(table.columns or values) > 1  # names are to be copied, and found again
        drawn.add_column(heading, justify="right" if numeric else "left", overflow="fold", no_wrap=whole)
    for row in table.rows:
        drawn.add_row(*(Text(cell(value)) for value in row))
    return drawn


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    return str(value)
