"""DreamGen Bench: robot videos named by their instruction, judged for following it.

Formats as in README.md of github.com/NVIDIA/GR00T-Dreams, section 5 (names of videos), eval_sr_qwen_whole.py and
eval_sr_gpt4o_whole.py in dreamgenbench/ of its fork hafnium49/GR00T-Dreams (how names are read, the result CSV), and
the use of the dataset nvidia/EVAL-175 in github.com/nvidia-cosmos/cosmos-predict2, documentations/
post-training_video2world_gr00t.md, and in the script prepare_batch_input_json.py of its successors: one folder per
subset, an image `<index>_<instruction>.png` each, its text beside it, `.txt` or, where the name ends in a full stop,
`..txt`. Not verified: the dataset itself, and the CSV of dreamgenbench.eval_qwen_pa (physics), which is not imported.

The judges take the prompt from the path. The first of these words that the path holds decides how: cogvideo, hunyuan,
wan. The GPT-4o judge knows no other way than these and `cosmos`: without any of the four it keeps the prompt of the
video before, so for that judge the folder's path must hold `cosmos`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from evaluation.benchmarks.interface import PlainBenchmark, VideoJob, check_jobs, listed, read_text, same_set, yes_or_no
from evaluation.benchmarks.scores import rate
from kairos_train.basics.errors import UserError

PARSER_WORDS = ("cogvideo", "hunyuan", "wan")
IMAGES = (".png", ".jpg")
HEADING = ["video_path", "prompt", "prediction"]


class DreamGen(PlainBenchmark):
    """See the module. One subset (gr1_object, gr1_behavior, …) at a time."""

    name = "dreamgen"
    about = "DreamGen Bench, image to video: <index>_<Instruction_with_underscores>.mp4"
    prompts = "a subset's folder of nvidia/EVAL-175, images <index>_<instruction>.png with .txt files beside them"
    results: ClassVar[Mapping[str, str]] = {
        "sr": "the CSV of dreamgenbench.eval_sr_qwen_whole or eval_sr_gpt4o_whole (instruction following)"
    }
    recursive = True

    def jobs(self, prompts: Path, *, images: Path | None = None, samples: int = 1) -> list[VideoJob]:
        """One job per image, by index."""
        if not prompts.is_dir():
            raise UserError(f"{prompts}: is no folder; give {self.prompts}")
        jobs = []
        for image in sorted(path for path in prompts.iterdir() if path.suffix in IMAGES):
            match = re.fullmatch(r"(\d+)_.+", image.stem)
            if not match:
                raise UserError(f"{image}: is not named <index>_<instruction>; give {self.prompts}")
            instruction = _instruction(image)
            if word := next((word for word in PARSER_WORDS[:2] if word in instruction), None):
                raise UserError(f"{image}: its instruction holds {word!r}, by which the judges misread the file's name")
            jobs.append(VideoJob(f"{match[1]}_{instruction.replace(' ', '_')}.mp4", match[1], instruction, image))
        if len({job.key for job in jobs}) < len(jobs):
            raise UserError(f"{prompts}: two images have one index; give one subset's own folder")
        return check_jobs(sorted(jobs, key=lambda job: int(job.key)), prompts)

    def refuse_folder(self, folder: Path) -> None:
        """Refuse a path, made absolute, that holds a word which changes the judges' parser, in any case.

        In a file's own name `wan` (as in "swan") is harmless: it leads to the right way of reading it.
        """
        path = str(folder.absolute())
        if words := [word for word in PARSER_WORDS if word in path.lower()]:
            raise UserError(
                f"{path}: holds {listed(words)}, by which DreamGen Bench's judges take the prompt from another place of"
                " the path; write to a folder whose whole path holds none of " + ", ".join(PARSER_WORDS)
            )

    def read_results(self, files: Mapping[str, Path], jobs: Sequence[VideoJob]) -> dict[str, Any]:
        """The rate of instructions followed, of a CSV written without quotes: a path may hold commas, a prompt none."""
        path = files["sr"]
        lines = read_text(path, self.results["sr"]).rstrip("\n").split("\n")
        heading, *rows = [line.split(",") for line in lines]
        if heading != HEADING:
            raise UserError(f"{path}: begins with {','.join(heading)!r}; give {self.results['sr']}")
        if short := next((row for row in rows if len(row) < len(HEADING)), None):
            raise UserError(f"{path}: row {','.join(short)!r} is cut short; judge the folder again")
        judged = [(Path(",".join(row[:-2])).name, row[-2], row[-1]) for row in rows]
        same_set((name for name, _, _ in judged), (job.name for job in jobs), str(path), "judge the complete folder")
        instructions = {job.name: job.instruction for job in jobs}
        answers = []
        for name, prompt, answer in judged:
            wanted = instructions[name].replace("_", " ").replace(",", " ")
            if prompt != wanted:
                raise UserError(
                    f"{path}: {name} was judged by the prompt {prompt!r}, not {wanted!r}: the judge misread its path;"
                    " for the GPT-4o judge it must hold `cosmos`, and for none of them " + ", ".join(PARSER_WORDS)
                )
            answers.append(yes_or_no(answer, f"{path}: {name}"))
        return {"scores": {"instruction_following": {"total": rate(answers)}}}


def _instruction(image: Path) -> str:
    """The text beside an image."""
    for text in (image.with_suffix(".txt"), image.with_name(f"{image.stem}..txt")):
        if text.is_file():
            instruction = text.read_text(encoding="utf-8").strip()
            if not instruction or re.search(r"[/\0\n]", instruction):
                raise UserError(f"{text}: is {instruction!r}; it must be an instruction in one line, without slashes")
            return instruction
    raise UserError(f"{image}: has no {image.stem}.txt beside it; give {DreamGen.prompts}")
