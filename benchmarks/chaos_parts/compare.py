"""Is a run that went through faults the one that did not? Losses, weights, samples, and what lies about."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from kairos_train.checkpoint.canonical import CheckpointReader, find_latest
from kairos_train.training.measure.sample_log import SAMPLES

SECTIONS = ("model", "ema", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class RunComparison:
    """A run beside the reference.

    Attributes:
        differing: "losses" and sections of the last checkpoint that are not the reference's, bit for bit.
        lost, repeated: samples of a step that were not trained on there, or more often.
        leftovers: temporary files and folders that are still there.
    """

    differing: list[str]
    lost: int
    repeated: int
    leftovers: list[str]

    @property
    def identical(self) -> bool:
        return not self.differing


def compare_runs(run_dir: Path, reference: Path) -> RunComparison:
    """A finished run beside a finished reference of the same settings."""
    differing = [] if _losses(run_dir) == _losses(reference) else ["losses"]
    differing += _differing_sections(run_dir, reference)
    here, there = _samples(run_dir), _samples(reference)
    return RunComparison(
        differing,
        lost=(there - here).total(),
        repeated=(here - there).total(),
        leftovers=sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob(".*") if path.name != ".lock"),
    )


def _losses(run_dir: Path) -> str:
    return (run_dir / "losses.jsonl").read_text()


def _differing_sections(run_dir: Path, reference: Path) -> list[str]:
    paths = [find_latest(folder / "checkpoints", deep=True)[0] for folder in (run_dir, reference)]
    if None in paths or paths[0].name != paths[1].name:
        return ["last checkpoint"]
    readers = [CheckpointReader(path) for path in paths]
    differing = []
    for section in SECTIONS:
        here, there = (reader.read_section(section) for reader in readers)
        if here.keys() != there.keys() or not all(torch.equal(here[name], there[name]) for name in there):
            differing.append(section)
    return differing


def _samples(run_dir: Path) -> Counter[tuple[int, str]]:
    """(step, sample) with how often."""
    found: Counter[tuple[int, str]] = Counter()
    for path in sorted((run_dir / SAMPLES).glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            found.update((entry["step"], key) for keys in entry["samples"] for key in keys)
    return found
