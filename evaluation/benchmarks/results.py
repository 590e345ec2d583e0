"""Official result files, or the answers of a judge of one's own, over a complete set → one JSON form.

    {"benchmark": …, "complete": true, "jobs": n, "sources": {kind: {"file", "sha256"}},
     "scores": {name: {"total" or a category: {"kind": "rate" | "mean", "n", "value", "low", "high"}}}}

An incomplete or doubled set is refused: there is no total over whatever files exist.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from evaluation.benchmarks.completeness import check
from evaluation.benchmarks.interface import VideoBenchmark, VideoJob, listed
from evaluation.benchmarks.scores import grouped, mean, rate
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import sha256_of, write_json

Judge = Callable[[Path, VideoJob], Mapping[str, bool | int | float]]
"""(video, job) -> names and scores of this video. True and False make a rate, numbers a mean."""


def import_results(
    benchmark: VideoBenchmark,
    *,
    prompts: Path,
    files: Mapping[str, Path],
    out: Path,
    images: Path | None = None,
    samples: int = 1,
) -> dict[str, Any]:
    """Read official result files and write them in one form.

    Args:
        benchmark: out of the registry.
        prompts, images, samples: as for `write`: they say which videos a complete set has.
        files: kind -> file; kinds as in `benchmark.results`.
        out: JSON to write.

    Returns:
        The content of `out`.

    Raises:
        UserError: a file that is not of its kind, or does not cover every job exactly once.
    """
    if unknown := sorted(set(files) - set(benchmark.results)):
        raise UserError(f"results {unknown[0]}: {benchmark.name} has {_kinds(benchmark)}")
    if not files:
        raise UserError(f"results: none given; {benchmark.name} has {_kinds(benchmark)}")
    jobs = benchmark.jobs(prompts, images=images, samples=samples)
    read = benchmark.read_results(files, jobs)
    sources = {kind: {"file": str(path), "sha256": sha256_of(path)} for kind, path in files.items()}
    return _save(out, {"benchmark": benchmark.name, "complete": True, "jobs": len(jobs), "sources": sources, **read})


def judge(
    benchmark: VideoBenchmark,
    *,
    prompts: Path,
    videos: Path,
    entry: str,
    out: Path,
    images: Path | None = None,
    samples: int = 1,
) -> dict[str, Any]:
    """Have a Python function judge every video of a complete folder.

    Args:
        entry: `module:function` of a `Judge`; the module is looked for where Python looks, and in the working folder.
        videos: the folder; it must be complete, as `check` sees it.
        Others as for `import_results`.

    Returns:
        The content of `out`, which also holds every video's own scores.

    Raises:
        UserError: no such function, an incomplete folder, answers that are no scores or not the same for all videos.
    """
    function = load_judge(entry)
    report = check(benchmark, prompts=prompts, videos=videos, images=images, samples=samples)
    if not report["complete"]:
        faults = ", ".join(f"{len(v)} {k}" for k, v in report.items() if isinstance(v, list | dict) and v)
        raise UserError(f"{videos}: is not complete ({faults}); see `kairos-train benchmark check {benchmark.name}`")
    jobs = benchmark.jobs(prompts, images=images, samples=samples)
    answers = {job.name: _answer(function(videos / job.name, job), f"{entry} on {job.name}") for job in jobs}
    names = set(answers[jobs[0].name])
    if other := [name for name, given in answers.items() if set(given) != names]:
        raise UserError(
            f"{entry}: scores {listed(other)} by other names than the rest; return the same for every video"
        )
    scores = {name: _score({job: given[name] for job, given in answers.items()}, jobs) for name in sorted(names)}
    found = {"benchmark": benchmark.name, "complete": True, "jobs": len(jobs), "judge": entry, "scores": scores}
    return _save(out, {**found, "videos": answers})


def load_judge(entry: str) -> Judge:
    """The function that `module:function` names; UserError where there is none."""
    module, _, name = entry.partition(":")
    if not module or not name.isidentifier():
        raise UserError(f"judge={entry!r}: must be module:function")
    if "" not in sys.path:
        sys.path.append("")  # a console script does not look into the working folder
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a package that the judge itself needs
        raise UserError(f"judge={entry!r}: there is no module {error.name}; name one that Python finds") from error
    if not callable(function):
        raise UserError(f"judge={entry!r}: {module} has no function {name}")
    return function


def _answer(given: Any, where: str) -> dict[str, bool | float]:
    """A judge's answer as plain bools and finite numbers."""
    if not isinstance(given, Mapping) or not given:
        raise UserError(f"{where}: returned {given!r}; return a map from names to scores")
    answer: dict[str, bool | float] = {}
    for name, value in given.items():
        plain = value.item() if hasattr(value, "item") else value  # of numpy and torch
        if not isinstance(name, str) or not isinstance(plain, bool | int | float) or not math.isfinite(plain):
            raise UserError(f"{where}: {name!r} is {value!r}; scores are bools and finite numbers")
        answer[name] = plain if isinstance(plain, bool) else float(plain)
    return answer


def _score(values: Mapping[str, bool | float], jobs: Sequence[VideoJob]) -> dict[str, Any]:
    """A rate or a mean, by group. Several videos of one prompt are averaged first: they are no independent samples."""
    groups = {job.key: job.group for job in jobs}
    by_key: dict[str, list[bool | float]] = {}
    for job in jobs:
        by_key.setdefault(job.key, []).append(values[job.name])
    if len(by_key) == len(jobs) and all(isinstance(value, bool) for value in values.values()):
        return grouped(rate, {key: found[0] for key, found in by_key.items()}, groups)
    return grouped(mean, {key: fmean(found) for key, found in by_key.items()}, groups)


def _kinds(benchmark: VideoBenchmark) -> str:
    return "; ".join(f"{kind}: {what}" for kind, what in benchmark.results.items())


def _save(out: Path, content: dict[str, Any]) -> dict[str, Any]:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, content, sort_keys=False)
    return content
