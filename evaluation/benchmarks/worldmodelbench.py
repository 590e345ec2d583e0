"""WorldModelBench: 350 first frames with an instruction, judged for instruction, physics and common sense.

Formats as in README.md and evaluation.py of github.com/WorldModelBench-Team/WorldModelBench: the prompt list is
worldmodelbench.json, the result file what evaluation.py saves (worldmodelbench_results.json). Not verified against the
list itself: that it has 350 entries, as the README says, and that no two of them share a first frame.

The official script skips a missing video with a warning and then divides by those it found, so a partial folder has a
total that looks whole; and it adds up the means of its parts (instruction 0 to 3, five laws and two of common sense 0
to 1 each), so 10 is best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from evaluation.benchmarks.interface import (
    PlainBenchmark,
    VideoJob,
    check_jobs,
    number,
    read_json,
    same_set,
    text_field,
    yes_or_no,
)
from evaluation.benchmarks.scores import grouped, mean, rate
from kairos_train.basics.errors import UserError

PARTS = {
    "instruction": ("instruction",),
    "physical_laws": ("newton", "mass", "fluid", "penetration", "gravity"),
    "common_sense": ("framewise", "temporal"),
}
"""Parts in the script's order, and what each of a video's answers in `accs` stands for."""
BEST_INSTRUCTION = 3


class WorldModelBench(PlainBenchmark):
    """See the module."""

    name = "worldmodelbench"
    about = "WorldModelBench, image to video: <stem of first_frame>.mp4"
    prompts = "the official worldmodelbench.json, with images/ beside it"
    results: ClassVar[Mapping[str, str]] = {
        "results": "worldmodelbench_results.json, saved by the official evaluation.py"
    }

    def jobs(self, prompts: Path, *, images: Path | None = None, samples: int = 1) -> list[VideoJob]:
        """One job per entry, told apart by the first frame's stem, as the official script does."""
        entries = read_json(prompts, self.prompts)
        if not isinstance(entries, list):
            raise UserError(f"{prompts}: is no list; give {self.prompts}")
        jobs = []
        for i, entry in enumerate(entries):
            where = f"{prompts}: entry {i}"
            frame = text_field(entry, "first_frame", where)
            jobs.append(
                VideoJob(
                    name=f"{PurePosixPath(frame).stem}.mp4",
                    key=PurePosixPath(frame).stem,
                    instruction=text_field(entry, "text_instruction", where),
                    image=prompts.parent / frame,
                    group=text_field(entry, "domain", where),
                )
            )
        return check_jobs(jobs, prompts)

    def read_results(self, files: Mapping[str, Path], jobs: Sequence[VideoJob]) -> dict[str, Any]:
        """Scores of evaluation.py's file: each part and question, and the official total, by domain, too."""
        path = files["results"]
        saved = read_json(path, self.results["results"])
        preds, accs = (saved.get(name) if isinstance(saved, dict) else None for name in ("preds", "accs"))
        if not isinstance(preds, dict) or not isinstance(accs, dict) or set(accs) != set(PARTS):
            raise UserError(f"{path}: has no preds and accs of {', '.join(PARTS)}; give {self.results['results']}")
        same_set(preds, [job.key for job in jobs], str(path), "judge the complete folder, without the old result file")
        values: dict[str, dict[str, float]] = {key: {} for key in preds}
        for part, questions in PARTS.items():
            answers = _answers(accs[part], len(questions) * len(preds), f"{path}: accs.{part}")
            for i, key in enumerate(preds):  # the script appends to accs in the order of preds
                values[key] |= zip(questions, answers[i * len(questions) :])
        return {
            "judged_model": saved.get("model_name"),
            "scores": _scores(values, {job.key: job.group for job in jobs}),
        }


def _answers(answers: Any, count: int, where: str) -> list[float]:
    """The numbers of a flat list of this length."""
    if not isinstance(answers, list) or len(answers) != count:
        raise UserError(f"{where}: does not hold {count} answers; judge the complete folder again")
    if where.endswith(".instruction"):
        return [number(answer, f"{where}[{i}]", 0, BEST_INSTRUCTION) for i, answer in enumerate(answers)]
    return [yes_or_no(answer, f"{where}[{i}]") for i, answer in enumerate(answers)]


def _scores(values: Mapping[str, Mapping[str, float]], groups: Mapping[str, str]) -> dict[str, Any]:
    """Each question and the official total, over all videos and by domain."""
    scores = {}
    for part, questions in PARTS.items():
        for question in questions:
            score, name = (mean, part) if part == "instruction" else (rate, f"{part}.{question}")
            scores[name] = grouped(score, {key: answers[question] for key, answers in values.items()}, groups)
    scores["total_of_10"] = grouped(mean, {key: sum(answers.values()) for key, answers in values.items()}, groups)
    return scores
