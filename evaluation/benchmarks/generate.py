"""Videos of an export for a benchmark's jobs: resumable, each with noise of its own.

Shapes: T frames, H W pixels of the model's window.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.files.images import read_image
from dataloaders.files.video_encoder import encode_mp4
from dataloaders.windows import cover
from evaluation.benchmarks.completeness import MANIFEST, missing_images, read_manifest, video_fault
from evaluation.benchmarks.interface import (
    VideoBenchmark,
    VideoJob,
    listed,
    noise_seed,
)
from evaluation.held_out import mean_of
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import sha256_of, write_json, write_whole
from kairos_train.basics.geometry import TIME_STRIDE
from kairos_train.basics.progress import track
from kairos_train.inference.load import Policy, load
from kairos_train.inference.predict import Predictor

FIRST_FRAME = "scaled to cover the window (bicubic), centre cropped, never stretched"


def write(
    benchmark: VideoBenchmark,
    *,
    export: Path,
    prompts: Path,
    out: Path,
    fps: float,
    images: Path | None = None,
    samples: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    chunks: int = 1,
    device: str = "cpu",
) -> dict[str, Any]:
    """Generate what is missing of a benchmark's videos in mode video.

    A model with actions also takes a robot state, which no benchmark has: it is given the mean of its dataset.

    Args:
        benchmark: out of the registry.
        export: folder written by `kairos-train export`; its model is given one frame, or none if the jobs have none.
        prompts, images, samples: see the benchmark.
        out: folder of the videos. Files that an earlier call with the same settings completed are kept.
        fps: of the video frames that the model was trained on; an export does not say.
        seed: of all noise; every job's is drawn from it and the file's name.
        steps, guidance: None takes the export's.
        chunks: windows per video, each going on from the last; see `Predictor.rollout`.
        device: where it is computed.

    Returns:
        "videos" in all, "written" and "kept" by this call, and the manifest that lies beside the videos.

    Raises:
        UserError: before anything is generated: a prompt list, folder or image that will not do, a model that does not
            fit the benchmark, videos of other settings in `out`.
    """
    jobs = benchmark.jobs(prompts, images=images, samples=samples)
    benchmark.refuse_folder(out)
    if not 0 < fps < float("inf"):
        raise UserError(f"fps={fps}: must be positive; give that of the frames the model was trained on")
    if missing := missing_images(jobs):
        raise UserError(f"{prompts}: {len(missing)} first frames are not there: {listed(missing)}")
    policy = load(export, device=device)
    predictor = Predictor(policy, sampler=policy.sampler.replaced(steps=steps, guidance=guidance))
    _check_model(policy, jobs)
    if chunks > 1:
        predictor.memory(mode="video")
    manifest = _manifest(benchmark, predictor, jobs, fps=fps, seed=seed, chunks=chunks)
    _claim(out, manifest, [job.name for job in jobs])
    written = 0
    for job in track(jobs, "videos", len(jobs), "videos"):
        path = out / job.name
        if path.is_file() and not video_fault(path, manifest):
            continue
        encode_mp4(path, _video(predictor, job, noise_seed(seed, benchmark.name, job.name), chunks), fps)
        written += 1
    for name, content in benchmark.companions(out, jobs).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(out / name, content)
    return {"videos": len(jobs), "written": written, "kept": len(jobs) - written, "manifest": manifest}


def first_frame(path: Path, height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3) of an image file: turned upright, then scaled to cover and cropped, never stretched.

    Raises:
        UserError: no readable image.
    """
    return cover(read_image(path, name=str(path))[None], height, width)[0]


def _video(predictor: Predictor, job: VideoJob, seed: int, chunks: int) -> np.ndarray:
    """uint8 (T, H, W, 3)."""
    policy, window = predictor.policy, predictor.policy.config.data.window
    frame = first_frame(job.image, window.height, window.width) if policy.history_frames else None
    state = mean_of(policy, "state").numpy() if policy.acts else None
    if chunks == 1:
        return predictor.predict(frame, state, job.instruction, seed=seed, mode="video").frames
    texts = [predictor.prompt(job.instruction)]
    given = predictor.conditions(texts=texts, state=None if state is None else state[None], frames=frame[None, None])
    parts = predictor.rollout(given, mode="video", seeds=[seed], chunks=chunks, texts=texts)
    return np.concatenate([part.frames[0] for part in parts])


def _check_model(policy: Policy, jobs: Sequence[VideoJob]) -> None:
    """Raise UserError unless the model starts from what the jobs have: one picture of one camera, or none."""
    window, given = policy.config.data.window, policy.history_frames
    if window.layout != "side_by_side" or len(window.cameras) > 1:
        raise UserError(
            f"{policy.folder}: was trained on {len(window.cameras)} cameras put together ({window.layout}); a"
            " benchmark's picture is of one; take a model of one camera"
        )
    if given > 1:
        raise UserError(
            f"{policy.folder}: is given {given} history latent frames; a benchmark has one first frame; take a model"
            " trained with stage.history_frames=1"
        )
    without = [job.key for job in jobs if job.image is None]
    if given and without:
        raise UserError(
            f"{policy.folder}: starts from a first frame, and {listed(without)} of {len(jobs)} has none; add a column"
            " image to the prompts, or take a model trained on stage.conditions.t2v alone"
        )
    if not given and len(without) < len(jobs):
        raise UserError(f"{policy.folder}: takes no first frame and would ignore the benchmark's; take one that does")


def _manifest(
    benchmark: VideoBenchmark, predictor: Predictor, jobs: Sequence[VideoJob], *, fps: float, seed: int, chunks: int
) -> dict[str, Any]:
    """All that decides what the videos show."""
    policy, window = predictor.policy, predictor.policy.config.data.window
    new = TIME_STRIDE * (policy.latent_frames - policy.history_frames)
    entries = [[job.name, job.instruction, None if job.image is None else sha256_of(job.image)] for job in jobs]
    return {
        "benchmark": benchmark.name,
        "jobs_sha256": hashlib.sha256(json.dumps(entries).encode()).hexdigest(),
        "model": {key: policy.about.get(key) for key in ("fingerprint", "weights", "dtype", "step", "quantization")},
        "computed_in": [policy.device.type, str(policy.dtype)],
        "steps": predictor.sampler.steps,
        "guidance": predictor.sampler.guidance,
        "seed": seed,
        "chunks": chunks,
        "fps": fps,
        "frames": window.frames + (chunks - 1) * new,
        "height": window.height,
        "width": window.width,
        "first_frame": FIRST_FRAME if policy.history_frames else None,
        "state": "mean of the dataset" if policy.acts else None,
    }


def _claim(out: Path, manifest: dict[str, Any], names: Sequence[str]) -> None:
    """Make the folder one of these settings; UserError if it holds videos of others, or of nobody knows which."""
    before = read_manifest(out)
    if not before:
        if there := [name for name in names if (out / name).exists()]:
            raise UserError(f"{out}: holds {listed(there)} without a {MANIFEST}; give an empty folder")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / MANIFEST, manifest, sort_keys=False)
        return
    now = json.loads(json.dumps(manifest))
    if other := [key for key in now if before.get(key) != now[key]]:
        told = ", ".join(f"{key} {before.get(key)!r}, now {now[key]!r}" for key in other[:3])
        raise UserError(f"{out}: holds videos of other settings ({told}); give another folder")
