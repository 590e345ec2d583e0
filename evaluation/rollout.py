"""Predicted video and actions beside what was recorded, as files to look at.

Shapes: B batch, T video frames, H W pixels, A actions, D action dimensions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataloaders.loading.batch import Batch
from evaluation.held_out import given_frames, observe, open_policy, spread_batches, window_seed
from evaluation.pictures import action_curves, contact_sheet, side_by_side
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import write_json
from kairos_train.inference.predict import Predictor
from kairos_train.inference.sampler import MODES

BATCH = 8
MAX_PSNR = 100.0  # dB, of identical pictures


def rollout(
    export: Path,
    *,
    source: Path,
    out: Path,
    mode: str = "joint",
    count: int = 4,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    chunks: int = 1,
    history: int | None = None,
    carried: bool = False,
    compiled: bool = False,
    robot: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> dict[str, Any]:
    """Sample windows of a shard folder and write predictions beside the recording.

    Args:
        export: folder written by `kairos-train export`.
        source: folder of packed shards.
        out: folder to write; must be empty or not exist. Per window: `NNN.mp4` (predicted left, recorded right, black
            from where the window ends) and `NNN_frames.png` in modes video and joint, `NNN_actions.png` in joint and
            action; `summary.json` for all.
        mode: "video", "joint" or "action".
        count: windows, spread evenly over the shards.
        steps, guidance: None takes the export's.
        seed: of the noise; each window has its own.
        chunks, history, carried: how far, and how, each window goes on; see `Predictor.rollout`. Numbers and action
            curves are of the first chunk, which alone has a recording.
        compiled: as for `Predictor`.
        robot: name of one of several that the model was trained on; None: the one that the shards are of.
        device, dtype: as for `kairos_train.inference.load.load`.

    Returns:
        The content of summary.json: settings, one entry per window, and "mean" over the windows. PSNR is over the
        frames that were not given and lie inside the episode, in dB: "model" of the prediction, "copy" of repeating
        the last given frame, "encoder" of the recording through the video encoder and back, which bounds "model". It
        is left out where no frame is given.

    Raises:
        UserError: `out` is not empty, the model cannot do `mode` or go on, the shards do not fit it.
    """
    out = Path(out)
    if mode not in MODES:
        raise UserError(f"mode={mode!r}: must be one of {', '.join(MODES)}")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"out={out}: is not empty; give another folder or remove it")
    policy, index = open_policy(export, source, robot=robot, device=device, dtype=dtype)
    if mode != "video" and not policy.acts:
        raise UserError(f"mode={mode!r}: {export} was trained without actions; use mode 'video'")
    predictor = Predictor(policy, sampler=policy.sampler.replaced(steps=steps, guidance=guidance), compiled=compiled)
    onward = {"chunks": chunks, "history": history, "carried": carried}
    if chunks > 1:
        predictor.memory(mode=mode, history=history, carried=carried)
    elif history is not None or carried:
        raise UserError(f"chunks={chunks}: history and carried are about later chunks; use chunks=2 or more")
    out.mkdir(parents=True, exist_ok=True)
    fps = index.fps / index.window.action_video_freq_ratio
    entries: list[dict[str, Any]] = []
    for batch in spread_batches(index, count=count, batch_size=BATCH, with_frames=True, what="rollout"):
        entries += _roll(predictor, batch, out, mode=mode, seed=seed, fps=fps, first=len(entries), onward=onward)
    summary = {
        "mode": mode,
        **onward,
        "count": len(entries),
        "steps": predictor.sampler.steps,
        "guidance": predictor.sampler.guidance,
        "seed": seed,
        "model": {key: policy.about.get(key) for key in ("weights", "dtype", "step", "checkpoint_sha256")},
        "shards": index.fingerprint,
        "samples": entries,
        "mean": _means(entries),
    }
    write_json(out / "summary.json", summary)
    return summary


def psnr(predicted: np.ndarray, recorded: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures of one shape, over all of them; at most MAX_PSNR."""
    mse = np.square(predicted.astype(np.float64) - recorded).mean()
    return MAX_PSNR if mse == 0 else float(min(MAX_PSNR, 10 * np.log10(255**2 / mse)))


def _roll(
    predictor: Predictor,
    batch: Batch,
    out: Path,
    *,
    mode: str,
    seed: int,
    fps: float,
    first: int,
    onward: dict[str, Any],
) -> list[dict[str, Any]]:
    """Sample one batch and write its files; one summary entry per window."""
    seeds, given = [window_seed(seed, key) for key in batch.keys], observe(predictor, batch)
    if onward["chunks"] > 1:
        parts = list(predictor.rollout(given, mode=mode, seeds=seeds, texts=batch.text, **onward))
        actions, frames = parts[0].actions, np.concatenate([part.frames for part in parts], axis=1)
    else:
        sampled = predictor.sample(given, mode=mode, seeds=seeds)
        actions = None if sampled.actions is None else predictor.actions(sampled)
        frames = None if sampled.latents is None else predictor.frames(sampled)
    encoded = None if frames is None else _through_encoder(predictor, batch.frames)
    entries = []
    for i, key in enumerate(batch.keys):
        name = f"{first + i:03d}"
        task = batch.meta[i].get("task", batch.text[i])
        entry: dict[str, Any] = {"key": key, "task": task, "text": batch.text[i], "seed": seeds[i], "files": []}
        if frames is not None:
            entry["psnr"] = _psnr(predictor, batch, frames[i, : batch.frames.shape[1]], encoded[i], i)
            entry["files"] += _write_video(out, name, frames[i], batch.frames[i].numpy(), entry, fps)
        if actions is not None:
            valid, recorded = batch.action_mask[i].numpy(), batch.actions[i].numpy()
            entry["action_mse"] = float(np.square(actions[i] - recorded)[valid].mean()) if valid.any() else None
            entry["files"].append(f"{name}_actions.png")
            action_curves(out / f"{name}_actions.png", predicted=actions[i], recorded=recorded, valid=valid, title=task)
        entries.append(entry)
    return entries


def _write_video(
    out: Path, name: str, predicted: np.ndarray, recorded: np.ndarray, entry: dict[str, Any], fps: float
) -> list[str]:
    """The clip and the contact sheet of one window; returns their names."""
    from dataloaders.files.video_encoder import encode_mp4

    beyond = np.zeros((len(predicted) - len(recorded), *recorded.shape[1:]), np.uint8)
    recorded = np.concatenate([recorded, beyond])
    encode_mp4(out / f"{name}.mp4", side_by_side(predicted, recorded), fps)
    title = entry["task"]
    if entry["psnr"] is not None:
        title = " ".join(f"{k} {v:.1f} dB" for k, v in entry["psnr"].items()) + " | " + title
    contact_sheet(out / f"{name}_frames.png", {"predicted": predicted, "recorded": recorded}, title=title)
    return [f"{name}.mp4", f"{name}_frames.png"]


def _psnr(
    predictor: Predictor, batch: Batch, predicted: np.ndarray, encoded: np.ndarray, i: int
) -> dict[str, float] | None:
    """PSNR of the prediction, of the last given frame repeated, and of the encoder; None without frames to judge."""
    recorded = batch.frames[i].numpy()
    given, valid = given_frames(predictor.policy.history_frames), batch.meta[i].get("valid_frames", len(recorded))
    if not given or valid <= given:
        return None
    judged = slice(given, valid)
    copy = np.broadcast_to(recorded[given - 1], recorded[judged].shape)
    return {
        "model": psnr(predicted[judged], recorded[judged]),
        "copy": psnr(copy, recorded[judged]),
        "encoder": psnr(encoded[judged], recorded[judged]),
    }


def _through_encoder(predictor: Predictor, frames: torch.Tensor) -> np.ndarray:
    """Frames (B, T, H, W, 3) encoded and decoded: the best picture that any latents can give."""
    encoder = predictor.encoders.video
    with torch.no_grad():
        return encoder.decode(encoder.encode(frames.to(predictor.policy.device))).cpu().numpy()


def _means(entries: list[dict[str, Any]]) -> dict[str, float]:
    """Mean PSNRs and action error over the windows that have them."""
    values: dict[str, list[float]] = {}
    for entry in entries:
        for name, value in (entry.get("psnr") or {}).items():
            values.setdefault(f"psnr_{name}", []).append(value)
        if entry.get("action_mse") is not None:
            values.setdefault("action_mse", []).append(entry["action_mse"])
    return {name: float(np.mean(found)) for name, found in values.items()}
