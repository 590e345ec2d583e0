"""What two sources within one dataset say differently, and the file that tells it of a folder of shards.

A contradiction that changes what is learned is refused unless a setting says which side is right; every other one is
reported with what was believed. DIR/consistency.json, beside the index of a folder of shards:

    {"format", "settings": {"timestamp_tolerance", "believe": {name: side}}, "unresolved": 0,
     "contradictions": [{"name", "where": of the first, "says": [[source, what]], "believed", "count"}]}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataloaders.config import BELIEVABLE, BelieveConfig
from dataloaders.files.urls import join, read_url
from kairos_train.basics.errors import UserError, one_line
from kairos_train.basics.foreign_files import JSON_BYTES, decode_text, one_plain_line, parse_json
from kairos_train.basics.secrets import redacted

CONSISTENCY = "consistency.json"
FORMAT = "kairos-consistency-1"
_LONGEST = 300  # characters of what is said, which datasets may make of any length
LEFT_OUT = "neither: left out"


class Contradicted(UserError):
    """Refused for contradictions that nothing resolves."""

    def __init__(self, message: str, contradictions: Sequence[Contradiction] = ()) -> None:
        super().__init__(message)
        self.contradictions = list(contradictions)


@dataclass(frozen=True)
class Contradiction:
    """Sources that do not agree.

    Attributes:
        name: of the kind, as `fps`; where `data.believe` can decide, its key there.
        where: in the dataset, as `episode 3` or `meta/info.json`.
        says: what each source says.
        believed: the side that was taken; None: neither, so that packing refuses.
        remedy: what resolves it.
        tolerance: the `data.timestamp_tolerance` with which it would pass, in seconds.
    """

    name: str
    where: str
    says: dict[str, str]
    believed: str | None = None
    remedy: str = ""
    tolerance: float | None = None

    def __post_init__(self) -> None:
        says = {one_plain_line(source, _LONGEST): one_plain_line(text, _LONGEST) for source, text in self.says.items()}
        object.__setattr__(self, "says", says)
        object.__setattr__(self, "where", one_plain_line(self.where, _LONGEST))

    def __str__(self) -> str:
        said = "; ".join(f"{source} {text}" for source, text in self.says.items())
        return f"{self.where}: {self.name}: {said}; " + (
            self.remedy if self.believed is None else f"believed: {self.believed}"
        )


def decide(believe: BelieveConfig, name: str, fix: str, *sides: str) -> tuple[str | None, str]:
    """(the side that `data.believe` names, what an error says to do otherwise).

    Args:
        fix: the remedy in the dataset itself.
        sides: those that can be taken here; all of the setting's by default.
    """
    sides = sides or BELIEVABLE[name]
    assert set(sides) <= set(BELIEVABLE[name]), name
    chosen = getattr(believe, name)
    choices = " or ".join(f"data.believe.{name}={side}" for side in sides)
    return chosen if chosen in sides else None, f"{fix}, or set {choices}"


def refuse(contradictions: Iterable[Contradiction], prefix: Path | str) -> None:
    """Return unless one is not resolved.

    Args:
        prefix: of the error: the dataset.

    Raises:
        Contradicted: the first such one; where a larger tolerance would let all of them pass, it says which.
    """
    open_ones = [found for found in contradictions if found.believed is None]
    if not open_ones:
        return
    message = f"{prefix}: {open_ones[0]}"
    if len(open_ones) > 1:
        message += f" ({len(open_ones) - 1} more: `data verify` lists all)"
    needed = [found.tolerance for found in open_ones]
    if None not in needed:
        message += f"; data.timestamp_tolerance={max(needed):g} would pass"
    raise Contradicted(message, open_ones)


def grouped(contradictions: Iterable[Contradiction]) -> list[dict[str, Any]]:
    """One JSON value for each kind and what was believed, with the first of them and their number."""
    groups: dict[tuple[str, str | None], dict[str, Any]] = {}
    for found in contradictions:
        entry = {"name": found.name, "where": found.where, "believed": found.believed, "count": 0}
        entry["says"] = [[source, text] for source, text in found.says.items()]
        groups.setdefault((found.name, found.believed), entry)["count"] += 1
    return list(groups.values())


def report(contradictions: Sequence[Contradiction], believe: BelieveConfig, tolerance: float) -> dict[str, Any]:
    """The content of consistency.json."""
    named = {name: side for name, side in asdict(believe).items() if side is not None}
    return {
        "format": FORMAT,
        "settings": {"timestamp_tolerance": tolerance, "believe": named},
        "unresolved": sum(found.believed is None for found in contradictions),
        "contradictions": grouped(contradictions),
    }


def read_report(folder: Path | str) -> dict[str, Any] | None:
    """The content of a shard folder's consistency.json; None where an earlier version packed it, without one.

    Raises:
        UserError: it cannot be read, or is of another format.
    """
    path = join(folder, CONSISTENCY)
    try:
        found = parse_json(decode_text(read_url(path, most_bytes=JSON_BYTES), path))
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); restore it or pack again") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or not _whole(found):
        raise UserError(f"{path}: is not in the format {FORMAT!r}, or incomplete; pack again")
    return found


def _whole(found: dict[str, Any]) -> bool:
    """Whether a report has all that `lines` wants of it."""
    try:
        unresolved = sum(entry["count"] for entry in found["contradictions"] if entry["believed"] is None)
        pairs = [pair for entry in found["contradictions"] for pair in entry["says"]]
        texts = [entry[key] for entry in found["contradictions"] for key in ("name", "where")]
        return found["unresolved"] == unresolved and all(
            isinstance(text, str) for text in (*texts, *(text for source, said in pairs for text in (source, said)))
        )
    except (KeyError, TypeError, ValueError):
        return False


def lines(found: dict[str, Any] | None) -> list[str]:
    """One line for each kind of contradiction in a report."""
    out = []
    for entry in [] if found is None else found["contradictions"]:
        said = "; ".join(f"{source} {text}" for source, text in entry["says"])
        more = f" ({entry['count']:,} such)" if entry["count"] > 1 else ""
        out.append(f"{entry['where']}{more}: {entry['name']}: {said}; believed: {entry['believed'] or 'neither'}")
    return out


def announced(folder: Path | str) -> list[str]:
    """What a command that uses a folder of shards reports of its source.

    Raises:
        UserError: a contradiction is not resolved.
    """
    found = read_report(folder)
    if found is not None and found.get("unresolved"):
        first = next((line for line in lines(found) if line.endswith("believed: neither")), "")
        raise UserError(f"{folder}: its dataset contradicts itself: {first}; fix it or set data.believe and pack again")
    return [f"{redacted(str(folder))}: its dataset contradicts itself: {line}" for line in lines(found)]
