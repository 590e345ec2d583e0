"""PAI-Bench Predict (also: Generation): videos from a condition image and a text, measured and questioned.

Formats as in github.com/SHI-Labs/physical-ai-bench, folder predict: README.md (names of videos, the dataset's files),
evaluate.py and pbench/ (results_<time>_eval_results.json: dimension -> [mean, one entry per video]), evaluate_vqa.py
and pbench/vqa_evaluation.py (vqa_detailed_results.json). The fields of cosmos_predict2_bench_full_info.json (video_id,
prompt_en, image_name) are those that this code and public users of it read; the list itself was not verified.

The official code takes whatever videos there are: evaluate.py those named `{video_id}__*.mp4`, evaluate_vqa.py seeds 0
to 4 alone and a missing video with a warning. imaging_quality's mean is the videos' mean over 100, as in VBench's code;
so videos are divided by 100 where they are a hundred times the file's mean. How the other dimensions average was not
verified, so the file's mean stands beside ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from evaluation.benchmarks.interface import (
    PlainBenchmark,
    VideoJob,
    check_jobs,
    number,
    read_json,
    same_set,
    text_field,
)
from evaluation.benchmarks.scores import grouped, mean
from kairos_train.basics.errors import UserError

CATEGORIES = ("av", "common_sense", "human", "industry", "misc", "physics", "robot")
MOST_SAMPLES = 5  # evaluate_vqa.py looks for seeds 0 to 4
QUALITY = (
    *("aesthetic_quality", "background_consistency", "imaging_quality", "motion_smoothness", "overall_consistency"),
    *("subject_consistency", "i2v_background", "i2v_subject"),
)


class PaiPredict(PlainBenchmark):
    """See the module."""

    name = "pai"
    about = "PAI-Bench Predict, image to video: {video_id}__{seed}.mp4"
    prompts = "the official cosmos_predict2_bench_full_info.json"
    results: ClassVar[Mapping[str, str]] = {
        "quality": "results_<time>_eval_results.json, saved by the official evaluate.py",
        "vqa": "vqa_detailed_results.json, saved by the official evaluate_vqa.py",
    }
    takes_images = True
    takes_samples = True

    def jobs(self, prompts: Path, *, images: Path | None = None, samples: int = 1) -> list[VideoJob]:
        """`samples` jobs per entry, seeds from 0; images from `images`, or condition_image/ beside the list."""
        if not 1 <= samples <= MOST_SAMPLES:
            raise UserError(f"samples={samples}: the official questioning looks for 1 to {MOST_SAMPLES} a prompt")
        entries = read_json(prompts, self.prompts)
        if not isinstance(entries, list):
            raise UserError(f"{prompts}: is no list; give {self.prompts}")
        folder = prompts.parent / "condition_image" if images is None else images
        jobs = []
        for i, entry in enumerate(entries):
            where = f"{prompts}: entry {i}"
            video_id, prompt = text_field(entry, "video_id", where), text_field(entry, "prompt_en", where)
            image, group = folder / text_field(entry, "image_name", where), _category(video_id, where)
            jobs += [VideoJob(f"{video_id}__{seed}.mp4", video_id, prompt, image, group) for seed in range(samples)]
        return check_jobs(jobs, prompts)

    def read_results(self, files: Mapping[str, Path], jobs: Sequence[VideoJob]) -> dict[str, Any]:
        """Every quality dimension over videos, and the questions' accuracy over prompts; both by category.

        Videos of one prompt are no independent samples, so that a dimension is first averaged over a prompt's videos.
        The file's own means are kept as "official_means".
        """
        scores: dict[str, Any] = {}
        official: dict[str, float] = {}
        if "quality" in files:
            found, official = _quality(files["quality"], self.results["quality"], jobs)
            scores |= found
        if "vqa" in files:
            scores["vqa_accuracy"] = _questions(files["vqa"], self.results["vqa"], jobs)
        return {"official_means": official, "scores": scores}


def _category(video_id: str, where: str) -> str:
    """As vqa_evaluation.py takes it from the name."""
    for category in CATEGORIES:
        if video_id.startswith(f"{category}_"):
            return category
    raise UserError(f"{where}: video_id {video_id!r} begins with none of {', '.join(CATEGORIES)}, and an underscore")


def _quality(path: Path, what: str, jobs: Sequence[VideoJob]) -> tuple[dict[str, Any], dict[str, float]]:
    """Scores by dimension, and the file's own means."""
    saved = read_json(path, what)
    if not isinstance(saved, dict) or not saved or not set(saved) <= set(QUALITY):
        raise UserError(f"{path}: does not hold dimensions out of {', '.join(QUALITY)}; give {what}")
    scores, official = {}, {}
    for dimension, found in saved.items():
        where = f"{path}: {dimension}"
        try:
            told, entries = found
            videos = [(Path(entry["video_path"]).name, entry["video_results"]) for entry in entries]
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"{where}: is not [mean, videos with video_path and video_results]; give {what}") from error
        same_set((name for name, _ in videos), [job.name for job in jobs], where, "measure the complete folder")
        official[dimension] = number(told, where, -math.inf, math.inf)
        values = {name: number(value, f"{where}: {name}", -math.inf, math.inf) for name, value in videos}
        percent = math.isclose(fmean(values.values()), 100 * official[dimension], rel_tol=0.01)
        measured = {name: value / 100 if percent else value for name, value in values.items()}
        prompts = {job.key: fmean(measured[j.name] for j in jobs if j.key == job.key) for job in jobs}
        scores[dimension] = grouped(mean, prompts, {job.key: job.group for job in jobs})
    return scores, official


def _questions(path: Path, what: str, jobs: Sequence[VideoJob]) -> dict[str, Any]:
    """Accuracy over prompts; the file has averaged a prompt's videos and questions."""
    saved = read_json(path, what)
    if not isinstance(saved, list) or not all(isinstance(entry, dict) for entry in saved):
        raise UserError(f"{path}: is no list of videos; give {what}")
    names = [Path(str(video)).name for entry in saved for video in entry.get("video_paths") or ()]
    same_set(names, (job.name for job in jobs), str(path), "question the complete folder")
    groups = {job.key: job.group for job in jobs}
    same_set((str(entry.get("video_id")) for entry in saved), groups, str(path), "question the complete folder")
    accuracy = {e["video_id"]: number(e.get("accuracy"), f"{path}: {e['video_id']}", 0, 1) for e in saved}
    return grouped(mean, accuracy, groups)
