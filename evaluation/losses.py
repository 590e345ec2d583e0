"""Validation loss of an export with fixed noise, by noise level, stream and dataset.

The equation is the training's own (`kairos_train.objective.flow_matching`): L = Σ w(t)·e² / Σ n, with the stage's
weights and shifts. What a window is given is what the sampler gives it: its first frames if the stage trained with
given frames, its text always, nothing dropped. Noise and σ are functions of (seed, draw, window's key), so that two
exports see the same, whatever the batching; draw 0 is the noise of the validation during training.

Shapes: B batch, W windows times draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dataloaders.loading.batch import Batch
from dataloaders.shards import ShardIndex
from evaluation.held_out import observe, spread_batches
from evaluation.intervals import ratio_half_width
from kairos_train.inference.predict import Predictor
from kairos_train.objective.flow_matching import ConditionedBatch, FlowMatching

FIRST_STEP = -1
"""Draw d takes the noise of step −1 − d: no training step has it."""

SIGMA_BINS = 5
"""Equal bins of σ in [0, 1], as in the training's report."""


def objective_of(predictor: Predictor, *, seed: int) -> FlowMatching:
    """The objective that the model was trained with, under the one condition that it is sampled under."""
    policy = predictor.policy
    stage = dataclasses.replace(
        policy.config.stage,
        conditions={"ti2v" if policy.history_frames else "t2v": 1.0},
        image_conditions={"t2i": 1.0},
        cfg_dropout=0.0,
    )
    return FlowMatching(stage, seed=seed, patch=tuple(policy.config.model.video.patch_size[1:]))


@torch.no_grad()
def conditioned(predictor: Predictor, objective: FlowMatching, batch: Batch, *, draw: int) -> ConditionedBatch:
    """Noisy inputs and targets of a batch of windows, on the model's device.

    Args:
        objective: of `objective_of`.
        draw: number of the draw, from 0.
    """
    policy = predictor.policy
    seen = observe(predictor, batch)
    latents = batch.latents
    if latents is None:
        latents = predictor.encoders.video.encode(batch.frames.to(policy.device))
    numbers = {}
    if policy.acts:
        actions, dims = predictor.padded_actions(batch.actions)
        numbers = {
            "state": seen.state,
            "actions": actions.to(policy.device),
            "action_mask": batch.action_mask.to(policy.device),
            "action_dim_mask": None if dims is None else dims.to(policy.device),
        }
    return objective.condition(
        keys=batch.keys,
        step=FIRST_STEP - draw,
        latents=latents.to(policy.device, torch.float32),
        context=seen.context,
        context_mask=seen.context_mask,
        **numbers,
    )


@torch.no_grad()
def measure(
    predictor: Predictor, index: ShardIndex, *, samples: int, seed: int, batch_size: int, draws: int
) -> dict[str, Any]:
    """Losses of a policy on held-out windows; one forward pass per window and draw.

    Args:
        samples: windows, spread evenly over the shards.
        seed: of the noise; with the seed of a training run, its validation's.
        draws: σ and noises per window.

    Returns:
        {"streams": {stream: {"loss", "ci95", "bins", "datasets": {name: {"loss", "ci95", "bins"}}}}, "total", …}.
        "bins" are dictionaries of "sigma" (from, to), "loss" (None where nothing was drawn) and "draws"; "ci95" is the
        half width of a 95 % interval with episodes as the independent units, None for a single one.
    """
    if draws < 1:
        raise ValueError(f"draws={draws}: must be at least 1")
    objective, rows, keys = objective_of(predictor, seed=seed), {"video": [], "action": []}, []
    sizes, with_frames = {"count": samples, "batch_size": batch_size}, index.encoders is None
    for batch in spread_batches(index, **sizes, with_frames=with_frames, what="losses"):
        keys += batch.keys
        whose = [
            (meta.get("dataset") or "unnamed", meta.get("episode", key)) for key, meta in zip(batch.keys, batch.meta)
        ]
        for draw in range(draws):
            noisy = conditioned(predictor, objective, batch, draw=draw)
            output = predictor.policy.model(**noisy.model_inputs())
            sums = objective.loss_sums(noisy, output.video, output.action)
            rows["video"] += _rows(noisy.video_sigma, sums.video, noisy.video_elements(), whose)
            if sums.action is not None:
                rows["action"] += _rows(noisy.action_sigma, sums.action, noisy.action_mask.sum(1).tolist(), whose)
    streams = {stream: _stream(found) for stream, found in rows.items() if found}
    stage = predictor.policy.config.stage
    weights = {"video": stage.video_loss_weight, "action": stage.action_loss_weight}
    return {
        "streams": streams,
        "total": sum(weights[stream] * values["loss"] for stream, values in streams.items()),
        "windows": len(keys),
        "draws": draws,
        "condition": next(iter(objective.stage.conditions)),
        "weighting": stage.loss_weighting,
        "seed": seed,
    }


def _rows(sigma: torch.Tensor, sums: torch.Tensor, counts: Sequence[int], whose: Sequence[Any]) -> list[tuple]:
    """(dataset, episode, σ, Σ w·e², n) of each sample."""
    return [(*who, *values) for who, *values in zip(whose, sigma.tolist(), sums.double().tolist(), counts)]


def _stream(rows: list[tuple]) -> dict[str, Any]:
    datasets = sorted({row[0] for row in rows})
    return _losses(rows) | {"datasets": {name: _losses([r for r in rows if r[0] == name]) for name in datasets}}


def _losses(rows: list[tuple]) -> dict[str, Any]:
    """The loss equation over some samples, and over those of each bin."""
    sigma, totals, counts = (np.array([row[i] for row in rows], float) for i in (2, 3, 4))
    episodes = [row[:2] for row in rows]
    inside = np.minimum((sigma * SIGMA_BINS).astype(int), SIGMA_BINS - 1)
    bins = []
    for number in range(SIGMA_BINS):
        chosen = inside == number
        bins.append(
            {
                "sigma": [number / SIGMA_BINS, (number + 1) / SIGMA_BINS],
                "loss": _ratio(totals[chosen], counts[chosen]),
                "draws": int((counts[chosen] > 0).sum()),
            }
        )
    return {
        "loss": _ratio(totals, counts) or 0.0,  # nothing counted at all: 0, as in training
        "ci95": ratio_half_width(totals, counts, episodes),
        "bins": bins,
    }


def _ratio(totals: np.ndarray, counts: np.ndarray) -> float | None:
    return float(totals.sum() / counts.sum()) if counts.sum() else None
