"""Whether a folder holds exactly the videos that a benchmark expects, each of them readable.

The official scripts judge whatever files they find, so a number over half of a set looks like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataloaders.files.video import read_through
from evaluation.benchmarks.interface import VideoBenchmark, VideoJob, read_json
from kairos_train.basics.errors import UserError

MANIFEST = "kairos_benchmark.json"
"""What `write` says of how a folder's videos were made; the only file of ours among them."""


def check(
    benchmark: VideoBenchmark, *, prompts: Path, videos: Path, images: Path | None = None, samples: int = 1
) -> dict[str, Any]:
    """Compare a folder with a prompt list; every video is decoded to its end.

    Args:
        prompts, images, samples: as for `write`.
        videos: the folder that is to be judged; where it has a manifest, frames and size must be as that says.

    Returns:
        "complete", "expected" (videos), and the names that are "missing", "unreadable" (name -> why), "unexpected"
        (files that are none of the benchmark's), "missing_images" (first frames that the official code reads, too).

    Raises:
        UserError: no such folder, one that the official code would misread, or no prompt list.
    """
    jobs = benchmark.jobs(prompts, images=images, samples=samples)
    if not videos.is_dir():
        raise UserError(f"{videos}: is no folder; give the one with the videos")
    benchmark.refuse_folder(videos)
    made = read_manifest(videos)
    companions = benchmark.companions(videos, jobs)
    names = [job.name for job in jobs]
    missing = [name for name in (*names, *companions) if not (videos / name).is_file()]
    faults = {name: video_fault(videos / name, made) for name in names if name not in missing}
    unreadable = {name: why for name, why in faults.items() if why}
    for name, content in companions.items():
        if name not in missing and (videos / name).read_bytes() != content:
            unreadable[name] = "is not that of this folder and prompt list; run `write` again"
    found = videos.rglob("*") if benchmark.recursive else videos.iterdir()
    known = {videos / name for name in (*names, *companions, MANIFEST)}
    report: dict[str, Any] = {
        "benchmark": benchmark.name,
        "expected": len(jobs),
        "missing": missing,
        "unreadable": unreadable,
        "unexpected": sorted(str(path.relative_to(videos)) for path in found if path.is_file() and path not in known),
        "missing_images": missing_images(jobs) if benchmark.takes_images else [],
    }
    complete = not any(report[fault] for fault in ("missing", "unreadable", "unexpected", "missing_images"))
    return {"complete": complete, **report}


def read_manifest(videos: Path) -> dict[str, Any]:
    """What `write` says of a folder; {} where it did not write there.

    Raises:
        UserError: a file of this name that is no manifest.
    """
    path, what = videos / MANIFEST, "the manifest that `write` leaves, or remove it"
    if not path.exists():
        return {}
    made = read_json(path, what)
    if not isinstance(made, dict) or not {"frames", "height", "width"} <= set(made):
        raise UserError(f"{path}: has no frames, height and width; give {what}")
    return made


def video_fault(path: Path, made: dict[str, Any]) -> str:
    """What is wrong with a video; "" for nothing.

    Args:
        made: its folder's manifest: "frames", "height" and "width" must be those of the video; {} asks for none.
    """
    try:
        codec, shape = read_through(path)
    except UserError as error:
        return f"cannot be decoded: {error}"
    if codec != "h264":  # decord, which the judges read with, fails on others
        return f"is {codec}, not H.264"
    wanted = tuple(made[key] for key in ("frames", "height", "width")) if made else shape
    return "" if shape == wanted else f"has {_told(shape)}; the manifest says {_told(wanted)}"


def missing_images(jobs: Sequence[VideoJob]) -> list[str]:
    """First frames that are not there."""
    return sorted({str(job.image) for job in jobs if job.image is not None and not job.image.is_file()})


def _told(shape: Sequence[int]) -> str:
    return f"{shape[0]} frames of {shape[1]}×{shape[2]}"
