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
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataloaders.files.urls import read_url, reason_of
from dataloaders.sources.base import Bad
from kairos_train.basics.errors import UserError
from kairos_train.basics.foreign_files import is_lfs_pointer, pointer_fault, unmarked

_NAME = re.compile(r"[a-z][a-z0-9]*")
_KNOWN = ("path", "caption", "text", "captions", "start", "end", "scores")
FIELD = "field "
"""Before the name of a field that means nothing here, where what is left out is counted."""

_RESERVED = ("text",)  # context_text.npy is the primary caption without the picture
_LONGEST_NAME = 48


@dataclass(frozen=True)
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


def row_of(values: Mapping[str, Any]) -> Row:
    """A row of JSON values.

    Raises:
        ValueError: says which field cannot be used.
    """
    path = values.get("path", "")
    if not isinstance(path, str):
        raise ValueError(f"path is {path!r}; it must be a text")
    captions = values.get("captions") or {}
    name = "text" if "caption" not in values and "text" in values else "caption"
    if isinstance(values.get(name), str | None):
        captions = {"caption": values.get(name) or ""} | _mapping(captions, "captions")
    else:
        raise ValueError(f"{name} is {values[name]!r}; it must be a text")
    start, end = (_number(values.get(name), name) for name in ("start", "end"))
    start = 0.0 if start is None else start
    if start < 0 or (end is not None and end <= start):
        raise ValueError(f"start={start:g} and end={end} leave nothing; give seconds with 0 <= start < end")
    return Row(
        path=path,
        captions={_name(k, "caption"): _text(v, f"caption {k}") for k, v in captions.items() if str(v).strip()},
        scores={_name(k, "score"): _score(v, k) for k, v in _mapping(values.get("scores") or {}, "scores").items()},
        start=start,
        end=end,
    )


def unknown_fields(values: Mapping[str, Any]) -> list[str]:
    """The fields of a row that `row_of` leaves out."""
    return [str(name) for name in values if name not in _KNOWN]


def read_manifest(path: str | Path) -> Manifest:
    """All rows of a `.jsonl` or `.csv` file.

    Raises:
        UserError: it cannot be read, has no rows, or (CSV) no column `path`.
    """
    data = _read(path)
    parse = _csv_rows if str(path).endswith(".csv") else _json_rows
    rows: list[tuple[int, Row | Bad]] = []
    left_out: dict[str, None] = {}
    seen: dict[tuple, int] = {}
    for number, values in parse(data, path):
        if isinstance(values, Bad):
            rows.append((number, values))
            continue
        left_out |= dict.fromkeys(unknown_fields(values))
        row = _checked(values, f"{path}: line {number}")
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


def read_captions(path: Path) -> dict[int, Row]:
    """Rows by `episode_index` of a JSON lines file.

    Raises:
        UserError: a line cannot be used, or names an episode twice.
    """
    rows: dict[int, Row] = {}
    for number, values in _json_rows(_read(path), path):
        row = values if isinstance(values, Bad) else _checked(values, f"{path}: line {number}", needs_path=False)
        if isinstance(row, Bad):
            raise UserError(f"{row.name}: {row.reason}")
        episode = values.get("episode_index")
        if not isinstance(episode, int) or isinstance(episode, bool) or episode in rows:
            raise UserError(f"{path}: line {number}: episode_index is {episode!r}; give each episode's number once")
        rows[episode] = row
    return rows


def _checked(values: Mapping[str, Any], name: str, *, needs_path: bool = True) -> Row | Bad:
    try:
        row = row_of(values)
    except ValueError as error:
        return Bad(name, str(error))
    if needs_path and not row.path:
        return Bad(name, "has no path")
    return row


def _read(path: str | Path) -> bytes:
    try:
        data = read_url(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}); give an existing file") from error
    if is_lfs_pointer(data):
        raise UserError(pointer_fault(path))
    return data


def _json_rows(data: bytes, path: str | Path) -> Iterator[tuple[int, dict[str, Any] | Bad]]:
    for number, line in enumerate(unmarked(data, path).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except UnicodeDecodeError as error:
            yield number, Bad(f"{path}: line {number}", f"is not UTF-8 (byte 0x{line[error.start]:02x}); convert it")
            continue
        except ValueError as error:
            yield number, Bad(f"{path}: line {number}", f"is not JSON ({error})")
            continue
        if not isinstance(values, dict):
            yield number, Bad(f"{path}: line {number}", "is not a JSON object")
            continue
        yield number, values


def _csv_rows(data: bytes, path: str | Path) -> Iterator[tuple[int, dict[str, Any] | Bad]]:
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        names = reader.fieldnames or []
        if "path" not in names or len(set(names)) < len(names):
            raise UserError(f"{path}: has columns {names}; each must be there once and one be called path")
        for cells in reader:
            values: dict[str, Any] = {"captions": {}, "scores": {}}
            if None in cells or None in cells.values():
                yield reader.line_num, Bad(f"{path}: line {reader.line_num}", f"has not {len(names)} cells")
                continue
            for name, cell in cells.items():
                group, _, rest = name.partition("_")
                if group in ("caption", "score") and rest:
                    values[f"{group}s"] |= {rest: cell} if cell.strip() else {}
                elif cell.strip() or name not in _KNOWN:
                    values[name] = cell
            yield reader.line_num, values
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not a CSV file in UTF-8 ({error}); fix it") from error


def _mapping(value: Any, field_name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{field_name} is {value!r}; it must map names to values")
    return value


def _name(text: str, what: str) -> str:
    if not _NAME.fullmatch(text) or (what == "caption" and text in _RESERVED):
        raise ValueError(f"the {what} {text!r} must be called by lower-case letters and digits, and not {_RESERVED[0]}")
    return text


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; it must be a text")
    return " ".join(value.split())


def _number(value: Any, name: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"{name} is {value!r}; it must be a number")
    return number


def _score(value: Any, name: str) -> float:
    number = _number(value, f"score {name}")
    if number is None:
        raise ValueError(f"score {name} is empty")
    return number
