"""Write docs/numerics.md: the numbers this project claims, measured now, with machine, date and commit.

    python benchmarks/numerics.py --golden REFERENCE.safetensors ... [--demo runs/demo] [--only SECTION ...]

Runs the reference vectors and the benchmarks named below (about half an hour on two cores; a quiet machine); takes the
demo's table from a finished `make demo`. With --only the other sections stay as they were measured before.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from evaluation.open_loop import format_table
from kairos_train.basics.files import write_whole
from kairos_train.config.compose import load_config
from kairos_train.model.golden import verify_files
from kairos_train.model.summary import numbers, table

ROOT = Path(__file__).resolve().parents[1]


def machine() -> str:
    """Processor, cores, software, commit and date in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"torch {torch.__version__}; commit {commit.stdout.strip() or 'unknown'}; {datetime.date.today().isoformat()}"
    )


def reference_vectors(files: list[Path]) -> list[str]:
    """A table of worst relative errors."""
    lines = ["| file | outputs | worst in | gradients | worst in |", "| --- | --- | --- | --- | --- |"]
    for r in verify_files(files):
        lines.append(
            f"| {r.path.stem} | {r.outputs:.1e} | `{r.worst_output}` | {r.gradients:.1e} | `{r.worst_gradient}` |"
        )
    return lines


def output_of(name: str, *arguments: str) -> list[str]:
    """What a benchmark prints, without its JSON line."""
    script = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore::FutureWarning"}  # DeepSpeed's, by the hundred
    result = subprocess.run(script, stdout=subprocess.PIPE, text=True, check=True, env=quiet)
    return result.stdout.strip().splitlines()[:-1]


def listing(lines: list[str]) -> list[str]:
    """As a code block."""
    return ["```", *lines, "```"]


def reference(args: argparse.Namespace) -> list[str]:
    """The reference vectors."""
    return [
        "`kairos-train verify golden FILE...`, float32: max |a − b| / max |b| over outputs and over gradients.",
        "",
        *reference_vectors(args.golden),
    ]


def full_size(args: argparse.Namespace) -> list[str]:
    """Parameters, keys and FLOPs of the published sizes."""
    text = table(numbers(load_config(["model=kairos_4b"], sections=("model",))))
    return ["`kairos-train model summary model=kairos_4b`:", "", *listing([text])]


def step_time(args: argparse.Namespace) -> list[str]:
    """Seconds against frames, on one process and two."""
    return [
        "`benchmarks/step_time.py`: the video stream, beside the same model with full attention in every layer.",
        "",
        *listing(output_of("step_time.py")),
        "",
        "On two context ranks beside one process, one thread each (`--context 2`):",
        "",
        *listing(output_of("step_time.py", "--context", "2")),
    ]


def parity(args: argparse.Namespace) -> list[str]:
    """Every layout beside one process."""
    return parity_text(output_of("parity.py"))


def parity_text(printed: list[str]) -> list[str]:
    """What benchmarks/parity.py printed, in words and as its table."""
    return [
        "`benchmarks/parity.py`: five optimiser steps of a small model of all kinds of layers, float32, relative",
        "deviations (weights under SGD: absolute, per element); clipping active, accumulation 2, 5 latent frames,",
        "mixed micro-batches. The sharded model itself is held to 1e-10 in float64 by",
        "`tests/distributed/test_sharded_model.py`.",
        "",
        *printed[1:],
    ]


def state_passing(args: argparse.Namespace) -> list[str]:
    """Gated DeltaNet layers between context ranks."""
    return [
        "`benchmarks/state_passing.py`: Gated DeltaNet layers between context ranks.",
        "",
        *listing(output_of("state_passing.py")),
    ]


def frame_exchange(args: argparse.Namespace) -> list[str]:
    """Windowed layers between context ranks."""
    return [
        "`benchmarks/frame_exchange.py`: windowed layers between context ranks. A rank computes as many frames as it",
        "holds; classes are dealt to neighbouring ranks, so that less moves than if every rank took some of each.",
        "",
        *listing(output_of("frame_exchange.py")),
    ]


def fp8_rounding(args: argparse.Namespace) -> list[str]:
    """What FP8 layers round on their own or again."""
    return [
        "`benchmarks/fp8_rounding.py`: a Gated DeltaNet projection at full width by recipe `emulated`.",
        "",
        *listing(output_of("fp8_rounding.py")),
    ]


def demo(args: argparse.Namespace) -> list[str]:
    """The demo's table."""
    result = json.loads((args.demo / "evaluation" / "open_loop.json").read_text())
    return [
        "`make demo`: errors of sampled action chunks on episodes of unseen seeds, normalised units. *blind* is the",
        "same model shown a constant picture and the mean state. This is imitation error, not task success.",
        "",
        *listing([format_table(result)]),
    ]


SECTIONS = {
    "The model against reference vectors": reference,
    "The full size": full_size,
    "Step time against frames": step_time,
    "Layouts against one process": parity,
    "State passing": state_passing,
    "Frame exchange": frame_exchange,
    "FP8 rounding": fp8_rounding,
    "The demo": demo,
}
"""Heading → what measures it, in the order of the page."""


def write(out: Path, measured: dict[str, list[str]]) -> None:
    """Put sections that were measured now, with machine, commit and date, into the page; the others stay."""
    found = out.read_text().split("\n## ")[1:] if out.exists() else []
    texts = {text.partition("\n")[0]: text.partition("\n")[2].strip() for text in found}
    texts |= {heading: "\n".join([f"*{machine()}*", "", *lines]) for heading, lines in measured.items()}
    head = "# Numbers\n\nWritten by `benchmarks/numerics.py`; run it to see yours. Each section says where and when.\n"
    page = [head, *(f"## {heading}\n\n{texts[heading]}\n" for heading in SECTIONS if heading in texts)]
    write_whole(out, "\n".join(page))


def main() -> None:
    """Measure and write."""
    names = {function.__name__: heading for heading, function in SECTIONS.items()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, nargs="+", default=[], metavar="FILE", help="for the section reference")
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), metavar="DIR", help="for the section demo")
    parser.add_argument("--only", nargs="+", choices=names, default=list(names), help="sections to measure again")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "numerics.md")
    args = parser.parse_args()
    if "reference" in args.only and not args.golden:
        parser.error("--golden FILE ... is missing: the section reference compares with them")
    for name in args.only:
        write(args.out, {names[name]: SECTIONS[names[name]](args)})
        print(f"{names[name]}: in {args.out}", flush=True)


if __name__ == "__main__":
    main()
