"""VideoPhy and VideoPhy-2: captions, judged for following the text (SA) and for physical common sense (PC).

Formats as in github.com/Hritikbansal/videophy. VideoPhy: README.md and examples/example.csv (`videopath,caption`),
examples/videocon_physics_pc_testing.csv (result without heading: path, the judge's whole prompt, probability of yes).
VideoPhy-2: VIDEOPHY2/examples/sa_pc.csv (`caption,videopath`), output_pc.csv (result: number, caption, videopath, score
1 to 5) and VIDEOPHY2/inference.py. Names of videos are free there; here `<number>.mp4`. Prompt lists are tables with a
column `caption`; the columns of the published sets on Hugging Face were not verified beyond that one. The probability
from which a video counts as "SA=1" is not in the repository; one half is used here, and the mean is given beside it.

VIDEOPHY2/inference.py judges only the first 20 rows of its table (`df.iloc[:20]`): take that line out, or the result is
refused here as incomplete. It writes 0 where it cannot read the judge's answer; such rows are refused, too. VideoPhy's
script appends to its output file: a second run doubles rows, which are refused as well.

These benchmarks give captions and no picture. A table with a column `image` gives first frames to models that need one.
"""

from __future__ import annotations

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from evaluation.benchmarks.interface import (
    PlainBenchmark,
    VideoJob,
    check_jobs,
    number,
    read_rows,
    read_table,
    same_set,
)
from evaluation.benchmarks.scores import mean, rate
from kairos_train.basics.errors import UserError

TABLE = "videos.csv"
YES = 0.5  # VideoPhy: probability from which a video counts
GOOD = 4  # VideoPhy-2: score from which it counts (its README: SA>=4, PC>=4)


class _Captions(PlainBenchmark, ABC):
    """What both have in common."""

    prompts = "a CSV with a column caption (and image, for models that need a first frame)"
    columns: tuple[str, str]

    def jobs(self, prompts: Path, *, images: Path | None = None, samples: int = 1) -> list[VideoJob]:
        """One job per different caption, in the table's order: published tables repeat captions, once per model."""
        jobs: dict[tuple[str, str], VideoJob] = {}
        for i, row in enumerate(read_table(prompts, ["caption"], self.prompts), start=2):
            caption, image = row["caption"], row.get("image", "")
            if not caption.strip():
                raise UserError(f"{prompts}: row {i} has an empty caption; give {self.prompts}")
            key = f"{len(jobs):05d}"
            job = VideoJob(f"{key}.mp4", key, caption, prompts.parent / image if image else None)
            jobs.setdefault((caption, image), job)
        return check_jobs(list(jobs.values()), prompts)

    def companions(self, folder: Path, jobs: Sequence[VideoJob]) -> dict[str, bytes]:
        """The table that the judge is given; paths are absolute."""
        out = io.StringIO()
        table = csv.DictWriter(out, self.columns, lineterminator="\n")
        table.writeheader()
        for job in jobs:
            table.writerow({"videopath": str((folder / job.name).absolute()), "caption": job.instruction})
        return {TABLE: out.getvalue().encode()}

    def read_results(self, files: Mapping[str, Path], jobs: Sequence[VideoJob]) -> dict[str, Any]:
        """Rates and means of SA and PC, and the rate of videos that have both, where both files are given."""
        scores, passed = {}, {}
        for kind, path in files.items():
            values, good = self._judged(path, kind, jobs)
            passed[kind] = {name: good(value) for name, value in values.items()}
            scores[f"{kind}_mean"] = {"total": mean(list(values.values()))}
            scores[kind] = {"total": rate(passed[kind].values())}
        if len(passed) == len(self.results):
            scores["sa_and_pc"] = {"total": rate(passed["sa"][job.name] and passed["pc"][job.name] for job in jobs)}
        return {"scores": scores}

    @abstractmethod
    def _judged(
        self, path: Path, kind: str, jobs: Sequence[VideoJob]
    ) -> tuple[dict[str, float], Callable[[float], bool]]:
        """Name -> score of one result file, and which scores count."""


class VideoPhy(_Captions):
    """VideoPhy (first). See the module."""

    name = "videophy"
    about = f"VideoPhy, captions: videos and {TABLE} (videopath,caption)"
    columns = ("videopath", "caption")
    results: ClassVar[Mapping[str, str]] = {
        "sa": "the output of entailment_inference.py on sa_testing.csv",
        "pc": "the output of entailment_inference.py on physics_testing.csv",
    }

    def _judged(
        self, path: Path, kind: str, jobs: Sequence[VideoJob]
    ) -> tuple[dict[str, float], Callable[[float], bool]]:
        rows = read_rows(path, self.results[kind])
        if wrong := next((row for row in rows if len(row) != 3), None):
            raise UserError(
                f"{path}: a row has {len(wrong)} fields, not path, prompt, score; give {self.results[kind]}"
            )
        remedy = "judge the complete table into a new file"
        same_set((Path(row[0]).name for row in rows), (job.name for job in jobs), str(path), remedy)
        captions = {job.name: job.instruction for job in jobs}
        for video, prompt, _ in rows:
            # The SA prompt quotes the caption, the PC prompt asks for physical laws: found out if they are exchanged.
            if (captions[Path(video).name] in prompt) != (kind == "sa"):
                raise UserError(f"{path}: {video} was not asked for {kind}; give {self.results[kind]}")
        values = {Path(row[0]).name: number(row[2], f"{path}: {row[0]}", 0, 1) for row in rows}
        return values, lambda value: value >= YES


class VideoPhy2(_Captions):
    """VideoPhy-2. See the module. Its third task, physical rules, is asked with tables of its own and not imported."""

    name = "videophy2"
    about = f"VideoPhy-2, captions: videos and {TABLE} (caption,videopath)"
    columns = ("caption", "videopath")
    results: ClassVar[Mapping[str, str]] = {
        "sa": "the output CSV of VIDEOPHY2/inference.py for semantic adherence",
        "pc": "the output CSV of VIDEOPHY2/inference.py for physical commonsense",
    }

    def _judged(
        self, path: Path, kind: str, jobs: Sequence[VideoJob]
    ) -> tuple[dict[str, float], Callable[[float], bool]]:
        rows = read_table(path, ["caption", "videopath", "score"], self.results[kind])
        remedy = "judge the complete table; the official script stops after 20 rows unless `df.iloc[:20]` is taken out"
        same_set((Path(row["videopath"]).name for row in rows), (job.name for job in jobs), str(path), remedy)
        captions, values = {job.name: job.instruction for job in jobs}, {}
        for row in rows:
            asked = captions[Path(row["videopath"]).name]
            if asked not in row["caption"] and not (kind == "pc" and "physical laws" in row["caption"]):
                raise UserError(f"{path}: {row['videopath']} was judged for {row['caption']!r}, not for {asked!r}")
            where = f"{path}: {row['videopath']} (the official script writes 0 for an answer that it cannot read)"
            values[Path(row["videopath"]).name] = number(row["score"], where, 1, 5)
        return values, lambda value: value >= GOOD
