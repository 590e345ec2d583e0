"""Open-loop error: sampled action chunks against the recorded ones, beside predictors that see less.

Rows of the table:

- model: the policy as it acts, action mode with its cached history.
- blind: the same policy, noise and instruction, its pictures a constant mid-grey and its state the dataset's mean. What
  the model gains over it, it gains from looking.
- mean: the dataset's mean action at every step.
- hold: the action 0 in raw units at every step. For delta actions that is to stand still; for absolute actions it is
  another constant.

An open-loop error says how well recorded actions are imitated, not how often a task succeeds.

Shapes: B batch, A actions of a chunk, D action dimensions, W windows.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataloaders.loading.batch import Batch
from dataloaders.shards import ShardIndex
from evaluation.held_out import given_frames, mean_of, observe, open_policy, spread_batches, window_seed
from evaluation.intervals import ratio_half_width
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import write_json
from kairos_train.inference.predict import Predictor
from kairos_train.inference.sampler import Conditions

ROWS = ("model", "blind", "mean", "hold")
GREY = 128


def evaluate(
    export: Path,
    *,
    shards: Path,
    out: Path | None,
    samples: int = 200,
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    device: str = "cpu",
    dtype: str | None = None,
) -> dict[str, Any]:
    """Compare a policy with its baselines on held-out windows.

    Args:
        export: folder written by `kairos-train export`.
        shards: folder of windows the model was not trained on.
        out: folder for `open_loop.json` and `open_loop.png`; None writes nothing.
        samples: windows, spread evenly over the shards; all of them when there are fewer.
        steps: Euler steps; None takes the export's.
        seed: of the noise; each window has its own, whatever the batching.
        batch_size: windows sampled at a time.
        device, dtype: as for `kairos_train.inference.load.load`.

    Returns:
        {"rows": {name: errors}, "windows", "episodes", "steps", "seed", …}. Errors are "mse" and "mae" in normalised
        units and "mse_raw", "mae_raw" in raw ones, averaged over the valid actions; "mse_ci95" is the half width of a
        95 % interval of "mse" with episodes as the independent units (None for a single episode); "mse_per_step",
        "mse_raw_per_step" and so on hold one value per step of the chunk, None where no window has a valid action.

    Raises:
        UserError: the model has no actions, the shards do not fit it or are damaged.
    """
    policy, index = open_policy(export, shards, device=device, dtype=dtype)
    if not policy.acts:
        raise UserError(f"{export}: was trained without actions; open-loop error needs a joint model")
    predictor = Predictor(policy, sampler=policy.sampler.replaced(steps=steps))
    result = measure(predictor, index, samples=samples, seed=seed, batch_size=batch_size)
    if out is not None:
        write(Path(out), result)
    return result


def measure(predictor: Predictor, index: ShardIndex, *, samples: int, seed: int, batch_size: int) -> dict[str, Any]:
    """`evaluate` of a loaded policy with actions on opened shards; nothing is written."""
    chunks: dict[str, list[Tensor]] = {name: [] for name in (*ROWS, "recorded", "valid")}
    episodes: list[tuple[Any, Any]] = []
    policy, with_frames = predictor.policy, index.encoders is None
    for batch in spread_batches(index, count=samples, batch_size=batch_size, with_frames=with_frames, what="open loop"):
        for name, chunk in _predictions(predictor, batch, seed).items():
            chunks[name].append(chunk)
        chunks["recorded"].append(batch.actions)
        chunks["valid"].append(batch.action_mask)
        episodes += [(meta.get("dataset"), meta.get("episode")) for meta in batch.meta]
    stacked = {name: torch.cat(parts) for name, parts in chunks.items()}
    recorded, valid = stacked.pop("recorded"), stacked.pop("valid")
    normalise = predictor.action_normalizer.normalize
    return {
        "rows": {
            name: _errors(normalise(chunk), normalise(recorded), valid, episodes)
            | _errors(chunk, recorded, valid, episodes, suffix="_raw")
            for name, chunk in stacked.items()
        },
        "windows": len(episodes),
        "episodes": len(set(episodes)),
        "valid_actions": int(valid.sum()),
        "horizon": policy.horizon,
        "steps": predictor.sampler.steps,
        "seed": seed,
        "model": {key: policy.about.get(key) for key in ("weights", "dtype", "step", "checkpoint_sha256")},
        "shards": index.fingerprint,
    }


def format_table(result: dict[str, Any]) -> str:
    """The result as a plain-text table."""
    lines = [
        f"Open-loop error on {result['windows']} windows of {result['episodes']} episodes, {result['steps']} sampling"
        f" steps, seed {result['seed']}",
        f"{'':8}{'MSE':>10}{'± 95 %':>10}{'MAE':>10}{'MSE raw':>12}{'MAE raw':>12}",
    ]
    for name in ROWS:  # not the order of a JSON file
        row = result["rows"][name]
        interval = "n/a" if row["mse_ci95"] is None else f"{row['mse_ci95']:.4f}"
        lines.append(
            f"{name:8}{row['mse']:10.4f}{interval:>10}{row['mae']:10.4f}{row['mse_raw']:12.5g}{row['mae_raw']:12.5g}"
        )
    return "\n".join(lines)


def _predictions(predictor: Predictor, batch: Batch, seed: int) -> dict[str, Tensor]:
    """Raw chunks (B, A, D) of every row of the table, on the CPU."""
    seeds = [window_seed(seed, key) for key in batch.keys]
    seen = observe(predictor, batch)

    def act(conditions: Conditions) -> Tensor:
        return torch.from_numpy(predictor.actions(predictor.sample(conditions, mode="action", seeds=seeds)))

    return {
        "model": act(seen),
        "blind": act(_blinded(predictor, batch, seen)),
        "mean": mean_of(predictor.policy, "action").expand_as(batch.actions),
        "hold": torch.zeros_like(batch.actions),
    }


def _blinded(predictor: Predictor, batch: Batch, seen: Conditions) -> Conditions:
    """`seen` with constant pictures and the mean state; text is encoded again where its encoder sees pictures."""
    policy = predictor.policy
    height, width = (8 * size for size in seen.history.shape[-2:])
    shape = (len(batch.keys), given_frames(policy.history_frames), height, width, 3)
    looks = predictor.encoders.text.identity.get("image", True)
    blind = predictor.conditions(
        texts=batch.text,
        state=mean_of(policy, "state").expand(len(batch.keys), -1),
        frames=torch.full(shape, GREY, dtype=torch.uint8),
        context=None if looks else (seen.context, seen.context_mask),
    )
    return dataclasses.replace(blind, negative=seen.negative)


def _errors(
    predicted: Tensor, recorded: Tensor, valid: Tensor, episodes: list[Any], *, suffix: str = ""
) -> dict[str, Any]:
    """Mean squared and absolute error over the valid actions of (W, A, D), overall and per step."""
    difference = (predicted - recorded).double()
    out: dict[str, Any] = {}
    for name, error in ((f"mse{suffix}", difference.square().mean(-1)), (f"mae{suffix}", difference.abs().mean(-1))):
        error = torch.where(valid, error, 0.0)  # (W, A)
        per_step = zip(error.sum(0).tolist(), valid.sum(0).tolist())
        out[name] = float(error.sum() / valid.sum())
        out[f"{name}_per_step"] = [total / count if count else None for total, count in per_step]
    squared = torch.where(valid, difference.square().mean(-1), 0.0)
    out[f"mse{suffix}_ci95"] = ratio_half_width(squared.sum(1).numpy(), valid.sum(1).numpy(), episodes)
    return out


def write(out: Path, result: dict[str, Any]) -> None:
    """`open_loop.json` and `open_loop.png` in the folder `out`."""
    from evaluation.pictures import horizon_errors

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "open_loop.json", result)
    curves = {name: row["mse_per_step"] for name, row in result["rows"].items()}
    title = f"open-loop error, {result['windows']} windows of {result['episodes']} episodes"
    horizon_errors(out / "open_loop.png", curves, title=title)
