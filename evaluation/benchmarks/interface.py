"""What a video benchmark is here: prompts that the user gives → jobs → files of prescribed names → result files.

A benchmark is one object with a few methods (`VideoBenchmark`); generating, checking and judging are written once over
its jobs. Prompt lists are never shipped: they belong to the benchmarks.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kairos_train.basics.errors import UserError
from kairos_train.basics.foreign_files import JSON_BYTES, finite, parse_json, read_bytes, refuse_lfs_pointer, shown

LONGEST_NAME = 255  # bytes of a file name on the usual file systems


@dataclass(frozen=True)
class VideoJob:
    """One video that a benchmark wants.

    Attributes:
        name: of the file in the folder that is judged.
        key: what the benchmark calls this entry.
        instruction: the text given to the model.
        image: the first frame; None where the benchmark has none.
        group: the category that its results are told by; "" without.
    """

    name: str
    key: str
    instruction: str
    image: Path | None = None
    group: str = ""


class VideoBenchmark(Protocol):
    """One benchmark of generated videos.

    Attributes:
        name: on the command line.
        about: one line.
        prompts: what `--prompts` must be, in words.
        results: kind -> the official result file, in words; `import` takes one file of each kind it is given.
        takes_images: whether `--images` says where first frames lie.
        takes_samples: whether one prompt may have several videos (`--samples`).
        recursive: whether the official code looks for videos in folders within the folder, too.
    """

    name: str
    about: str
    prompts: str
    results: Mapping[str, str]
    takes_images: bool
    takes_samples: bool
    recursive: bool

    def jobs(self, prompts: Path, *, images: Path | None, samples: int) -> list[VideoJob]:
        """The jobs of an official prompt list; UserError where it is not one."""

    def refuse_folder(self, folder: Path) -> None:
        """Raise UserError where the official code would misread videos of this folder."""

    def companions(self, folder: Path, jobs: Sequence[VideoJob]) -> dict[str, bytes]:
        """Other files that the official code reads: relative path -> content."""

    def read_results(self, files: Mapping[str, Path], jobs: Sequence[VideoJob]) -> dict[str, Any]:
        """Scores of official result files (kind -> file); UserError unless they cover every job exactly once."""


class PlainBenchmark:
    """Defaults of a VideoBenchmark: no other files, every folder will do."""

    takes_images = False
    takes_samples = False
    recursive = False

    def refuse_folder(self, folder: Path) -> None:
        """Nothing to refuse."""

    def companions(self, folder: Path, jobs: Sequence[VideoJob]) -> dict[str, bytes]:
        """None."""
        return {}


# --- reading what users give ---


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file; UserError naming `what` it should be."""
    try:
        return parse_json(read_text(path, what))
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}); give {what}") from error


def read_rows(path: Path, what: str) -> list[list[str]]:
    """Rows of a CSV file, empty lines left out; UserError where it cannot be read or holds none."""
    try:
        rows = [row for row in csv.reader(io.StringIO(read_text(path, what)), strict=True) if row]
    except csv.Error as error:
        raise UserError(f"{path}: is no CSV ({error}); give {what}") from error
    if not rows:
        raise UserError(f"{path}: is empty; give {what}")
    return rows


def read_table(path: Path, columns: Sequence[str], what: str) -> list[dict[str, str]]:
    """Rows of a CSV file with a heading, as maps; UserError unless it has these columns."""
    heading, *rows = read_rows(path, what)
    if missing := [name for name in columns if name not in heading]:
        raise UserError(f"{path}: has no column {missing[0]!r} (it has {', '.join(heading)}); give {what}")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(heading):
            raise UserError(f"{path}: row {number} has {len(row)} fields, its heading {len(heading)}; give {what}")
    return [dict(zip(heading, row)) for row in rows]


def read_text(path: Path, what: str) -> str:
    """The content of a file in UTF-8; UserError naming `what` it should be."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give {what}")
    refuse_lfs_pointer(path)
    try:
        return read_bytes(path, most_bytes=JSON_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text in UTF-8; give {what}") from error


def text_field(entry: Any, field: str, where: str) -> str:
    """A field of a prompt list's entry; UserError unless it is a text with something in it."""
    value = entry.get(field) if isinstance(entry, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {field} is {shown(value)}; it must be a text")
    return value


def number(value: Any, where: str, low: float, high: float) -> float:
    """A finite number in [low, high]; UserError otherwise."""
    try:
        found = finite(value, where)
    except ValueError:
        found = float("nan")
    if not low <= found <= high:
        raise UserError(f"{where}: is {shown(value)}; it must be a number from {low:g} to {high:g}")
    return found


def yes_or_no(value: Any, where: str) -> int:
    """1 or 0, also as a bool or in text; UserError otherwise."""
    if value not in (0, 1, "0", "1"):
        raise UserError(f"{where}: is {shown(value)}; it must be 0 or 1")
    return int(value)


# --- sets of jobs ---


def check_jobs(jobs: list[VideoJob], prompts: Path) -> list[VideoJob]:
    """The jobs, at least one, with different names that a file may have; UserError otherwise."""
    if not jobs:
        raise UserError(f"{prompts}: names no video; give the benchmark's own prompt list")
    for job in jobs:
        if Path(job.name).name != job.name or job.name.startswith(".") or len(job.name.encode()) > LONGEST_NAME:
            raise UserError(f"{prompts}: {job.key!r} makes the file name {job.name!r}, which no file can have")
    if twice := repeated(job.name for job in jobs):
        raise UserError(f"{prompts}: {listed(twice)} would be written twice; give each entry an image of its own")
    return jobs


def same_set(found: Iterable[str], wanted: Iterable[str], where: str, remedy: str) -> None:
    """Raise UserError unless `found` holds each of `wanted` once and nothing else: no total over what happens to be."""
    found, wanted = list(found), list(wanted)
    faults = {
        "missing": sorted(set(wanted) - set(found)),
        "not of this prompt list": sorted(set(found) - set(wanted)),
        "there twice": repeated(found),
    }
    told = [f"{len(names)} {fault}: {listed(names)}" for fault, names in faults.items() if names]
    if told:
        raise UserError(
            f"{where}: covers {len(set(found) & set(wanted))} of {len(wanted)} ({'; '.join(told)}); {remedy}"
        )


def repeated(names: Iterable[str]) -> list[str]:
    """Names that occur more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# --- noise ---


def noise_seed(*parts: str | int) -> int:
    """A seed below 2^48 that is a function of all parts: other parts, other noise."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
