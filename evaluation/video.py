"""Temporal drift: long rollouts beside the recorded episode, frame by frame as the horizon grows.

A policy is given a window's first frames and goes on by itself, chunk after chunk (`Predictor.rollout`). What it shows
is compared with the frames that the episode holds behind that window (`evaluation.episodes`), and so are:

- copy: the last given frame, standing still. A model whose pictures are further from the recording than this has lost
  the thread.
- encoder: the recording through the video encoder and back, which no latents can surpass.

Frames of the horizon count from 1, the first that was not given. PSNR is in dB and per frame.

Shapes: V videos, N frames of a rollout, J = N − given frames of the horizon, H W pixels, T frames of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from dataloaders.loading.batch import Batch, collate
from dataloaders.shards import ShardIndex
from evaluation.episodes import Recording, choose, places, read
from evaluation.held_out import given_frames, observe, window_seed
from evaluation.intervals import ratio_half_width
from evaluation.quality import QualityModel, frechet, ssim
from evaluation.rollout import psnr
from kairos_train.basics.errors import UserError
from kairos_train.basics.geometry import TIME_STRIDE
from kairos_train.basics.progress import track
from kairos_train.inference.predict import Predictor

BATCH = 8
ROWS = ("model", "copy", "encoder")
DIFFERENCE = "model_minus_copy"

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of two clips (n, H, W, 3), one number per frame (n,)."""


@dataclass(frozen=True)
class DriftSettings:
    """What is rolled out.

    Attributes:
        videos: rollouts.
        chunks: how far each goes; see `Predictor.rollout`, as for `history` and `carried`.
    """

    videos: int = 8
    chunks: int = 4
    history: int | None = None
    carried: bool = False


@dataclass(frozen=True)
class ComparedClip:
    """One rollout beside its recording, uint8 (n, H, W, 3) each, n ≤ N the frames that were recorded."""

    key: str
    task: str
    episode: tuple
    recorded: np.ndarray
    model: np.ndarray
    encoder: np.ndarray

    def row(self, name: str, given: int) -> np.ndarray:
        """The frames behind the given ones, of one of ROWS."""
        if name == "copy":
            return np.broadcast_to(self.recorded[given - 1], self.recorded[given:].shape)
        return getattr(self, name)[given:]


def measure(
    predictor: Predictor,
    index: ShardIndex,
    settings: DriftSettings,
    *,
    seed: int,
    lpips: QualityModel | None = None,
    fvd: QualityModel | None = None,
) -> tuple[dict[str, Any], list[ComparedClip]]:
    """Roll out and compare; `lpips` and `fvd` judge as well where they are given.

    Returns:
        The numbers, and the clips that they are of. Numbers: "metrics": {"psnr" | "ssim" | "lpips": {row: {"mean",
        "ci95"}}} with lists over the horizon, for each of ROWS and for DIFFERENCE (video by video), None where no
        recording reaches; "count": how many reach there; "chunks": the same means over the frames of each chunk;
        "beats_copy_frames": for how many frames, from the first on, the model's mean PSNR is above the copy's; "fvd".

    Raises:
        UserError: a model that cannot go on, no frames behind any window, damaged shards, an unusable judge.
    """
    policy = predictor.policy
    memory = predictor.memory(mode="video", history=settings.history, carried=settings.carried)
    given, window = given_frames(policy.history_frames), policy.config.data.window.frames
    new = TIME_STRIDE * (policy.latent_frames - memory.chunk.history)
    frames, ratio = window + (settings.chunks - 1) * new, index.window.action_video_freq_ratio
    recordings = choose(places(index), count=settings.videos, frames=frames, ratio=ratio)
    recordings = [recording for recording in recordings if recording.frames > given]
    if not recordings:
        raise UserError(f"{index.folder}: no window has a recorded frame behind those that the model is given")
    clips = _clips(predictor, index, recordings, settings, frames=frames, seed=seed)
    distances = {"psnr": _psnr, "ssim": ssim} | ({} if lpips is None else {"lpips": lpips.distances})
    values = {name: _values(clips, distance, given, frames - given) for name, distance in distances.items()}
    episodes = [clip.episode for clip in clips]
    metrics = {name: {row: _curve(v, episodes) for row, v in rows.items()} for name, rows in values.items()}
    bounds = [given, *range(window, frames + 1, new)]
    result = {
        "metrics": metrics,
        "count": np.isfinite(values["psnr"]["model"]).sum(0).tolist(),
        "chunks": [_chunk(values, slice(a - given, b - given)) for a, b in pairwise(bounds)],
        "beats_copy_frames": _leading(metrics["psnr"][DIFFERENCE]["mean"]),
        "fvd": None if fvd is None else _fvd(clips, fvd, given, frames),
        "seconds_per_frame": ratio / index.fps,
        "given_frames": given,
        "videos": [{"key": clip.key, "task": clip.task, "frames": len(clip.recorded) - given} for clip in clips],
        "settings": {"chunks": settings.chunks, "history": memory.chunk.history, "carried": settings.carried},
        "steps": predictor.sampler.steps,
        "guidance": predictor.sampler.guidance,
        "seed": seed,
    }
    return result, clips


def _clips(
    predictor: Predictor,
    index: ShardIndex,
    recordings: Sequence[Recording],
    settings: DriftSettings,
    *,
    frames: int,
    seed: int,
) -> list[ComparedClip]:
    """Roll out from the first window of every recording, BATCH at a time."""
    found = []
    for first in track(range(0, len(recordings), BATCH), "video", -(-len(recordings) // BATCH), "batches"):
        some = recordings[first : first + BATCH]
        pairs = read(index, some)
        predicted = _rolled(predictor, collate([sample for sample, _ in pairs]), settings, seed)
        for recording, (sample, recorded), model in zip(some, pairs, predicted):
            known, task = len(recorded), sample.meta.get("task", sample.meta["text"])
            encoder = _through_encoder(predictor, recorded, frames)[:known]
            found.append(ComparedClip(sample.key, task, recording.first.episode, recorded, model[:known], encoder))
    return found


def _rolled(predictor: Predictor, batch: Batch, settings: DriftSettings, seed: int) -> np.ndarray:
    """Pictures (B, N, H, W, 3) of a rollout from each window; its noise is of its own key."""
    parts = predictor.rollout(
        observe(predictor, batch),
        mode="video",
        seeds=[window_seed(seed, key) for key in batch.keys],
        chunks=settings.chunks,
        texts=batch.text,
        history=settings.history,
        carried=settings.carried,
    )
    return np.concatenate([part.frames for part in parts], axis=1)


@torch.no_grad()
def _through_encoder(predictor: Predictor, recorded: np.ndarray, frames: int) -> np.ndarray:
    """A recording (n, H, W, 3), its last frame repeated to N frames, encoded and decoded."""
    encoder, rest = predictor.encoders.video, np.repeat(recorded[-1:], frames - len(recorded), axis=0)
    clip = torch.from_numpy(np.concatenate([recorded, rest]))[None]
    return encoder.decode(encoder.encode(clip.to(predictor.policy.device)))[0].cpu().numpy()


def _psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([psnr(x, y) for x, y in zip(a, b)])


def _values(clips: Sequence[ComparedClip], distance: Distance, given: int, horizon: int) -> dict[str, np.ndarray]:
    """(V, J) of each row and of the difference, NaN where nothing was recorded."""
    values = {name: np.full((len(clips), horizon), np.nan) for name in ROWS}
    for i, clip in enumerate(clips):
        recorded = clip.recorded[given:]
        for name in ROWS:
            values[name][i, : len(recorded)] = distance(clip.row(name, given), recorded)
    return values | {DIFFERENCE: values["model"] - values["copy"]}


def _curve(values: np.ndarray, episodes: Sequence[tuple]) -> dict[str, list[float | None]]:
    """Mean over the videos at each frame of the horizon, and half the width of its 95 % interval."""
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    return {
        "mean": [float(v.sum() / n.sum()) if n.any() else None for v, n in zip(filled.T, known.T)],
        "ci95": [
            ratio_half_width(v[n], np.ones(n.sum()), [e for e, there in zip(episodes, n) if there])
            for v, n in zip(filled.T, known.T)
        ],
    }


def _chunk(values: dict[str, dict[str, np.ndarray]], part: slice) -> dict[str, Any]:
    """Means over the recorded frames of one chunk, of all videos together."""
    known = np.isfinite(values["psnr"]["model"][:, part])
    means = {
        name: {row: float(v[:, part][known].mean()) if known.any() else None for row, v in rows.items()}
        for name, rows in values.items()
    }
    return {"frames": [part.start + 1, part.stop], "videos": int(known.any(1).sum())} | means


def _leading(differences: Sequence[float | None]) -> int:
    """How many values from the first on are above 0."""
    count = 0
    while count < len(differences) and differences[count] is not None and differences[count] > 0:
        count += 1
    return count


def _fvd(clips: Sequence[ComparedClip], judge: QualityModel, given: int, frames: int) -> dict[str, Any]:
    """Fréchet distance of each row's features from the recording's, over the clips that are recorded to the end.

    A clip is what was given and all that follows it. With fewer clips than some hundreds the number is far above what
    many clips give; compare only runs of equally many.
    """
    whole = [clip for clip in clips if len(clip.recorded) == frames]
    if len(whole) < 2:
        return {"clips": len(whole)} | dict.fromkeys(ROWS)
    start = [clip.recorded[:given] for clip in whole]

    def features(name: str) -> np.ndarray:
        rest = [clip.recorded[given:] if name == "recorded" else clip.row(name, given) for clip in whole]
        return judge.features(np.stack([np.concatenate(parts) for parts in zip(start, rest)]))

    recorded = features("recorded")
    return {"clips": len(whole)} | {name: frechet(features(name), recorded) for name in ROWS}
