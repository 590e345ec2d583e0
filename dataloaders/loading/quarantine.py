"""What could not be read: named, counted, listed in a file, limited.

`quarantine.jsonl` holds one line per shard or sample, `{"name", "reason", "samples", "count"}`: the samples that are
lost with it and how often one of them was due. It is written as a whole and renamed, by one process.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kairos_train.basics.errors import RunStopped
from kairos_train.basics.files import write_whole


@dataclass(frozen=True)
class CorruptSample:
    """A sample that was due and could not be read, or that was lost with its shard.

    Attributes:
        name: of the sample or of the shard.
        reason: what is wrong with it.
        samples: how many are lost with it.
    """

    name: str
    reason: str
    samples: int


class Quarantine:
    """All findings of a run so far.

    Args:
        samples: of all sources together.
        limit: share of them that may be lost before the run stops.
        file: where the list is written; None: nowhere.

    Attributes:
        entries: {name: {"reason", "samples", "count"}}.
    """

    def __init__(self, *, samples: int, limit: float, file: Path | None) -> None:
        self.samples, self.limit, self.file = samples, limit, file
        self.entries: dict[str, dict[str, Any]] = {}

    @property
    def count(self) -> int:
        """How often a sample was due that could not be read."""
        return sum(entry["count"] for entry in self.entries.values())

    def add(self, findings: Iterable[CorruptSample]) -> None:
        """Take findings in and write the file.

        Raises:
            RunStopped: more samples are lost than the limit allows.
        """
        for found in (findings := list(findings)):
            entry = self.entries.setdefault(found.name, {"count": 0})
            entry.update(reason=found.reason, samples=found.samples, count=entry["count"] + 1)
        if not findings:
            return
        self._write()
        lost = sum(entry["samples"] for entry in self.entries.values())
        if lost > self.limit * self.samples:
            name, entry = max(self.entries.items(), key=lambda item: item[1]["samples"])
            listed = f"; {self.file} lists all" if self.file else ""
            raise RunStopped(
                f"data.max_corrupt={self.limit:g}: {lost} of {self.samples} samples cannot be read, as {name} "
                f"({entry['reason']}){listed}; restore or repack them, or raise the limit"
            )

    def state_dict(self) -> dict[str, Any]:
        """A copy of the entries."""
        return {name: dict(entry) for name, entry in self.entries.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the entries of `state`."""
        self.entries = {name: dict(entry) for name, entry in state.items()}
        if self.entries or (self.file and self.file.exists()):
            self._write()

    def _write(self) -> None:
        if self.file is None:
            return
        lines = [json.dumps({"name": name} | self.entries[name], sort_keys=True) for name in sorted(self.entries)]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.file, "".join(line + "\n" for line in lines))
