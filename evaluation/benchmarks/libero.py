"""LIBERO's and LIBERO-Plus's results, from the lines that `evaluation.benchmarks.libero_client` writes.

The categories of LIBERO-Plus come from libero/libero/benchmark/task_classification.json of
github.com/sylvestf/LIBERO-plus: suite -> tasks with name and category.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.benchmarks.interface import listed, read_json, read_text, same_set
from evaluation.benchmarks.libero_client import FORMAT
from evaluation.benchmarks.scores import rate
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import sha256_of, write_json

STANDARD = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
"""The four suites that are averaged by everybody; LIBERO-Plus has these alone."""
OF_A_SUITE = ("suite", "tasks", "max_steps")
WHAT = "files written by `python -m evaluation.benchmarks.libero_client`"


@dataclass
class _Suite:
    """One suite's header and trials: (task, trial) -> success, and which came twice."""

    header: dict[str, Any]
    trials: dict[tuple[str, int], bool]
    twice: list[str]

    @property
    def missing(self) -> list[str]:
        wanted = [(task, trial) for task in self.header["tasks"] for trial in range(self.header["trials"])]
        return [f"{task} {trial}" for task, trial in wanted if (task, trial) not in self.trials]


def check_libero(files: Sequence[Path], *, benchmark: str, classification: Path | None = None) -> dict[str, Any]:
    """Which trials of the suites begun are missing or doubled, and which standard suites are not begun.

    Args:
        files: of the client; several of one suite are put together.
        benchmark: "libero" or "libero_plus".
        classification: task_classification.json; LIBERO-Plus only.

    Returns:
        "complete" (all that was begun), "suites": name -> trials "expected", "missing" and "twice"; "not_begun".

    Raises:
        UserError: files that are not the client's, or not of one policy and protocol.
    """
    suites = _read(files, benchmark)
    _categories(suites, benchmark, classification)
    told = {
        name: {
            "expected": len(suite.header["tasks"]) * suite.header["trials"],
            "missing": suite.missing,
            "twice": suite.twice,
        }
        for name, suite in suites.items()
    }
    complete = not any(suite["missing"] or suite["twice"] for suite in told.values())
    not_begun = [name for name in STANDARD if name not in suites]
    return {"complete": complete, "benchmark": benchmark, "suites": told, "not_begun": not_begun}


def import_libero(
    files: Sequence[Path], *, benchmark: str, out: Path, classification: Path | None = None
) -> dict[str, Any]:
    """Success by suite and task, or by suite and perturbation; the total once all four standard suites are complete.

    Args:
        out: JSON to write; the others as for `check_libero`.

    Returns:
        The content of `out`. "total" is None, and "total_needs" says what, unless all standard suites are there;
        libero_90 is told, and never part of the total.

    Raises:
        UserError: as `check_libero`, or a suite that is not complete.
    """
    suites = _read(files, benchmark)
    categories = _categories(suites, benchmark, classification)
    for name, suite in suites.items():
        if faults := [*suite.missing, *suite.twice]:
            raise UserError(f"{name}: {len(faults)} trials are missing or doubled ({listed(faults)}); finish the suite")
    needs = [name for name in STANDARD if name not in suites]
    pooled = [
        (f"{name}/{task}", won) for name in STANDARD if name in suites for (task, _), won in suites[name].trials.items()
    ]
    scores: dict[str, Any] = {
        "suites": {name: rate(suite.trials.values()) for name, suite in suites.items()},
        "total": None if needs else rate(won for _, won in pooled),
    }
    if benchmark == "libero":
        scores["tasks"] = {
            f"{name}/{task}": rate(won for (of, _), won in suite.trials.items() if of == task)
            for name, suite in suites.items()
            for task in suite.header["tasks"]
        }
    elif not needs:
        scores["perturbations"] = {
            category: rate(won for task, won in pooled if categories[task] == category)
            for category in sorted(set(categories.values()))
        }
    first = next(iter(suites.values())).header
    content = {
        "benchmark": benchmark,
        "complete": not needs,
        "total_needs": needs,
        "settings": {key: value for key, value in first.items() if key not in OF_A_SUITE},
        "sources": [{"file": str(path), "sha256": sha256_of(path)} for path in files],
        "scores": scores,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, content, sort_keys=False)
    return content


def _read(files: Sequence[Path], benchmark: str) -> dict[str, _Suite]:
    """Suite -> its header and trials; files of one suite are put together."""
    suites: dict[str, _Suite] = {}
    for path in files:
        header, trials = _read_file(path, benchmark)
        suite = suites.setdefault(header["suite"], _Suite(header, {}, []))
        first = next(iter(suites.values())).header
        other = [key for key in header if key not in OF_A_SUITE and header[key] != first.get(key)]
        if other := other or [key for key in OF_A_SUITE if header[key] != suite.header[key]]:
            raise UserError(f"{path}: has another {other[0]} than the files before; import what was run alike")
        for trial, success in trials:
            if trial in suite.trials:
                suite.twice.append(f"{trial[0]} {trial[1]}")
            suite.trials[trial] = success
    if not suites:
        raise UserError(f"results: no files given; give {WHAT}")
    return suites


def _read_file(path: Path, benchmark: str) -> tuple[dict[str, Any], list[tuple[tuple[str, int], bool]]]:
    """The header of one file, and its trials ((task, trial), success)."""
    try:
        header, *lines = [json.loads(line) for line in read_text(path, WHAT).splitlines()]
        trials = [((line["task"], line["trial"]), line["success"]) for line in lines]
        of, planned = (header["format"], header["benchmark"]), {task: header["trials"] for task in header["tasks"]}
        strange = [task for (task, trial), won in trials if not (0 <= trial < planned[task] and isinstance(won, bool))]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is cut short or of another kind ({error!r}); give {WHAT}") from error
    if of != (FORMAT, benchmark):
        raise UserError(f"{path}: is {of[0]} of {of[1]}, not {FORMAT} of {benchmark}; give {WHAT}")
    if strange:
        raise UserError(f"{path}: holds a trial of {strange[0]} that its header does not plan; give {WHAT}")
    return header, trials


def _categories(suites: dict[str, _Suite], benchmark: str, classification: Path | None) -> dict[str, str]:
    """suite/task -> perturbation; {} for LIBERO."""
    if benchmark == "libero":
        return {}
    what = "task_classification.json of LIBERO-Plus"
    if classification is None:
        raise UserError(f"classification: none given; libero_plus needs {what}")
    table, categories = read_json(classification, what), {}
    for name, suite in suites.items():
        try:
            tasks = {entry["name"]: entry["category"] for entry in table[name]}
        except (KeyError, TypeError) as error:
            raise UserError(f"{classification}: has no tasks with name and category of {name}; give {what}") from error
        same_set(
            suite.header["tasks"], tasks, f"{name} as it was run", f"run it in the LIBERO-Plus of {classification}"
        )
        categories |= {f"{name}/{task}": category for task, category in tasks.items()}
    return categories
