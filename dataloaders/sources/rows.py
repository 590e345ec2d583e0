"""Captions, scores and places of clips, as manifests (JSON lines or CSV), tars and caption files say them.

JSON: `{"path", "caption" | "captions": {variant: text}, "start", "end", "scores": {name: number}}`. CSV: the columns
`path, caption, caption_VARIANT, start, end, score_NAME`; empty cells mean nothing. `caption` is the variant `caption`
and the primary one, and may be called `text`; without it the first in the file is. Variants and scores are called by
lower-case letters and digits. What else a row holds is left out, and reported once.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dataloaders.config import LimitsConfig
from dataloaders.files.urls import base_name, read_url, reason_of
from dataloaders.sources.base import Bad
from kairos_train.basics.errors import UserError
from kairos_train.basics.foreign_files import (
    finite,
    is_lfs_pointer,
    json_lines,
    one_plain_line,
    pointer_fault,
    refuse_half_characters,
    shown,
)
from kairos_train.basics.secrets import redacted

_NAME = re.compile(r"[a-z][a-z0-9]*")
_KNOWN = ("path", "caption", "text", "captions", "start", "end", "scores")
FIELD = "field "
"""Before the name of a field that means nothing here, where what is left out is counted."""

_RESERVED = ("text",)  # context_text.npy is the primary caption without the picture
_LONGEST_NAME = 48
_LONGEST_VARIANT = 32
MOST_FIELDS = 100
"""Names of fields that mean nothing here which are told."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a manifest, or what stands for it elsewhere.

    Attributes:
        path: of the file, relative to the manifest, or a URL; "" where the row belongs to something else.
        captions: text by variant, the primary first; may be empty.
        start, end: seconds from the file's first frame on that are used.
    """

    path: str = ""
    captions: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    start: float = 0.0
    end: float | None = None


@dataclass(frozen=True)
class Manifest:
    """Rows of a manifest by line number; those that cannot be used; columns left out; a hash of the file."""

    rows: list[tuple[int, Row | Bad]]
    left_out: list[str]
    sha256: str


def plain_name(text: str) -> str:
    """`text` as the first part of sample keys: letters, digits, `_` and `-`; a dot would split WebDataset's key."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)[:_LONGEST_NAME] or "dataset"


def row_of(values: Mapping[str, Any], limits: LimitsConfig | None = None) -> Row:
    """A row of JSON values.

    Raises:
        ValueError: says which field cannot be used.
    """
    limits = limits or LimitsConfig()
    path = values.get("path", "")
    if not isinstance(path, str):
        raise ValueError(f"path is {shown(path)}; it must be a text")
    captions = values.get("captions") or {}
    name = "text" if "caption" not in values and "text" in values else "caption"
    if isinstance(values.get(name), str | None):
        captions = {"caption": values.get(name) or ""} | _mapping(captions, "captions")
    else:
        raise ValueError(f"{name} is {shown(values[name])}; it must be a text")
    start, end = (_number(values.get(name), name) for name in ("start", "end"))
    start = 0.0 if start is None else start
    if start < 0 or (end is not None and end <= start):
        raise ValueError(f"start={start:g} and end={end} leave nothing; give seconds with 0 <= start < end")
    return Row(
        path=path,
        captions={_name(k, "caption"): _text(v, f"caption {k}", limits) for k, v in captions.items() if not _blank(v)},
        scores={_name(k, "score"): _score(v, k) for k, v in _mapping(values.get("scores") or {}, "scores").items()},
        start=start,
        end=end,
    )


def check_text(value: Any, name: str, limits: LimitsConfig) -> None:
    """Raise ValueError unless `value` is a text that an encoder can take; `name` is what errors call it."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}; it must be a text")
    if len(value) > (most := limits.text_characters):
        raise ValueError(f"{name} has {len(value):,} characters, more than data.limits.text_characters={most}")
    refuse_half_characters(value, name)


def unknown_fields(values: Mapping[str, Any]) -> list[str]:
    """The fields of a row that `row_of` leaves out; the first of very many."""
    strange = (str(name) for name in values if name not in _KNOWN)
    return [one_plain_line(redacted(name), _LONGEST_NAME) for name in itertools.islice(strange, MOST_FIELDS)]


def read_manifest(path: str | Path, limits: LimitsConfig | None = None) -> Manifest:
    """All rows of a `.jsonl` or `.csv` file.

    Raises:
        UserError: it cannot be read, is too large, has no rows, or (CSV) no column `path`.
    """
    limits = limits or LimitsConfig()
    data = _read(path, limits)
    parse = _csv_rows if base_name(path).endswith(".csv") else _json_rows
    rows: list[tuple[int, Row | Bad]] = []
    left_out: dict[str, None] = {}
    seen: dict[tuple, int] = {}
    for number, values in parse(data, path, limits):
        if isinstance(values, Bad):
            rows.append((number, values))
            continue
        if len(left_out) < MOST_FIELDS:
            left_out |= dict.fromkeys(unknown_fields(values))
        row = _checked(values, f"{path}: line {number}", limits)
        if isinstance(row, Row):
            place = (row.path, row.start, row.end)
            if place in seen:
                row = Bad(f"{path}: line {number}", f"names the clip of line {seen[place]} a second time: {row.path}")
            else:
                seen[place] = number
        rows.append((number, row))
    if not rows:
        raise UserError(f"{path}: has no rows; there is nothing to pack")
    return Manifest(rows, sorted(left_out), hashlib.sha256(data).hexdigest())


def read_captions(path: Path, limits: LimitsConfig | None = None) -> dict[int, Row]:
    """Rows by `episode_index` of a JSON lines file.

    Raises:
        UserError: a line cannot be used, or names an episode twice.
    """
    limits = limits or LimitsConfig()
    rows: dict[int, Row] = {}
    for number, values in _json_rows(_read(path, limits), path, limits):
        name = f"{path}: line {number}"
        row = values if isinstance(values, Bad) else _checked(values, name, limits, needs_path=False)
        if isinstance(row, Bad):
            raise UserError(f"{row.name}: {row.reason}")
        episode = values.get("episode_index")
        if not isinstance(episode, int) or isinstance(episode, bool) or episode in rows:
            raise UserError(f"{name}: episode_index is {shown(episode)}; give each episode's number once")
        rows[episode] = row
    return rows


def _checked(values: Mapping[str, Any], name: str, limits: LimitsConfig, *, needs_path: bool = True) -> Row | Bad:
    try:
        row = row_of(values, limits)
    except ValueError as error:
        return Bad(name, str(error))
    if needs_path and not row.path:
        return Bad(name, "has no path")
    return row


def _read(path: str | Path, limits: LimitsConfig) -> bytes:
    try:
        data = read_url(path, most_bytes=limits.table_bytes)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}); give an existing file") from error
    if is_lfs_pointer(data):
        raise UserError(pointer_fault(path))
    return data


def _json_rows(data: bytes, path: str | Path, limits: LimitsConfig) -> Iterator[tuple[int, dict[str, Any] | Bad]]:
    for number, values, fault in json_lines(data, path, **limits.json):
        if not fault and not isinstance(values, dict):
            fault = "is not a JSON object"
        yield number, Bad(f"{path}: line {number}", fault) if fault else values


def _text_lines(text: TextIO, most: int) -> Iterator[str]:
    """One at a time. Raises csv.Error at one that is too long: it could hold as many cells as characters."""
    while line := text.readline(most + 1):
        if len(line) > most:
            raise csv.Error(f"a line has more than {most:,} characters")
        yield line


def _csv_rows(data: bytes, path: str | Path, limits: LimitsConfig) -> Iterator[tuple[int, dict[str, Any] | Bad]]:
    text = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.DictReader(_text_lines(text, limits.json["most_bytes"]), strict=True)
    try:
        names = reader.fieldnames or []
        if "path" not in names or len(set(names)) < len(names):
            raise UserError(f"{path}: has columns {shown(names)}; each must be there once and one be called path")
        for cells in reader:
            yield reader.line_num, _csv_values(cells, f"{path}: line {reader.line_num}", len(names))
    except csv.Error as error:
        name = f"{path}: line {reader.line_num}"
        yield reader.line_num, Bad(name, f"this and what follows cannot be read ({error}): fix the CSV file")


def _csv_values(cells: Mapping[str | None, Any], name: str, count: int) -> dict[str, Any] | Bad:
    values: dict[str, Any] = {"captions": {}, "scores": {}}
    if None in cells or None in cells.values():
        return Bad(name, f"has not {count} cells")
    for column, cell in cells.items():
        if strange := re.search("[\udc80-\udcff]", cell):
            return Bad(name, f"is not a CSV file in UTF-8 (byte 0x{ord(strange[0]) - 0xDC00:02x}); convert it")
        group, _, rest = column.partition("_")
        if group in ("caption", "score") and rest:
            values[f"{group}s"] |= {rest: cell} if cell.strip() else {}
        elif cell.strip() or column not in _KNOWN:
            values[column] = cell
    return values


def _mapping(value: Any, field_name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{field_name} is {shown(value)}; it must map names to values")
    return value


def _name(text: str, what: str) -> str:
    if len(text) > _LONGEST_VARIANT or not _NAME.fullmatch(text) or (what == "caption" and text in _RESERVED):
        raise ValueError(
            f"the {what} {shown(text)} must be called by up to {_LONGEST_VARIANT} lower-case letters and digits, and "
            f"not {_RESERVED[0]}"
        )
    return text


def _blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _text(value: Any, name: str, limits: LimitsConfig) -> str:
    check_text(value, name, limits)
    return " ".join(value.split())


def _number(value: Any, name: str) -> float | None:
    return None if value is None or value == "" else finite(value, name)


def _score(value: Any, name: str) -> float:
    number = _number(value, f"score {name}")
    if number is None:
        raise ValueError(f"score {name} is empty")
    return number
