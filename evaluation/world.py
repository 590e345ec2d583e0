"""How well a world model foresees: predicted pictures beside the recording, by how far ahead, where something moves.

Three rows for each horizon: "model", sampled from the first frame, the instruction and (in mode joint) the state;
"copy", the last given frame again; "codec", the recording through the model's own video codec, which no prediction
decoded by it can beat by much. A pixel moves where any colour of the recording differs by more than `MOVED` of 255 from
the last given frame: there, copying is wrong.

Shapes: B windows, T frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.codec import MOVED, psnr_of, squared_error
from evaluation.held_out import given_frames, observe, open_policy, spread_batches, window_seed
from kairos_train.basics.errors import UserError
from kairos_train.inference.predict import Predictor
from kairos_train.inference.sampler import MODES

ROWS = ("model", "copy", "codec")
HORIZONS = (4, 8, 16)


def foresight(
    export: Path,
    *,
    shards: Path,
    horizons: Sequence[int] = HORIZONS,
    windows: int = 64,
    mode: str = "joint",
    steps: int | None = None,
    guidance: float | None = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    device: str = "cpu",
) -> dict[str, Any]:
    """Compare predicted frames with recorded ones.

    Args:
        export: folder written by `kairos-train export`.
        shards: folder of windows with frames that the model was not trained on.
        horizons: frames behind the last given one, from 1 on.
        windows: how many, spread evenly over the shards; those that end before a horizon do not count there.
        mode: "joint" or "video".
        steps, guidance: None takes the export's.
        seed: of the noise; each window has its own, whatever the batching.

    Returns:
        {"horizons": {h: {"windows", "moving_share", row: {"db", "moving_db"}, "moving_gain_db", "gap_closed"}}, …}.
        PSNR is of the squared error's mean over all windows, in dB; "moving_gain_db" is model over copy, "gap_closed"
        the share of the squared error between copy and codec that the model closes, both on moving pixels; None where
        nothing moves.

    Raises:
        UserError: a horizon beyond the windows, a model that cannot do the mode or is given no frame, damaged shards.
    """
    policy, index = open_policy(export, shards, device=device)
    given = given_frames(policy.history_frames)
    if mode not in MODES or mode == "action":
        raise UserError(f"mode={mode!r}: must be joint or video")
    if mode == "joint" and not policy.acts:
        raise UserError(f"mode='joint': {export} was trained without actions; use mode 'video'")
    if not given:
        raise UserError(f"{export}: is given no frame, so there is nothing to copy; evaluate a model with history")
    if beyond := [h for h in horizons if not 1 <= h <= index.window.frames - given]:
        raise UserError(f"horizons={beyond}: must lie from 1 to {index.window.frames - given}, where windows end")
    predictor = Predictor(policy, sampler=policy.sampler.replaced(steps=steps, guidance=guidance))
    sums = {(h, row): np.zeros(4) for h in horizons for row in ROWS}  # squared errors and pixels: all, moving
    counted = dict.fromkeys(horizons, 0)
    for batch in spread_batches(index, count=windows, batch_size=batch_size, with_frames=True):
        recorded = batch.frames.numpy()
        codec = predictor.encoders.video
        sampled = predictor.sample(
            observe(predictor, batch), mode=mode, seeds=[window_seed(seed, key) for key in batch.keys]
        )
        rows = {
            "model": predictor.frames(sampled),
            "copy": np.broadcast_to(recorded[:, given - 1 : given], recorded.shape),
            "codec": codec.decode(codec.encode(batch.frames.to(policy.device))).cpu().numpy(),
        }
        for i, meta in enumerate(batch.meta):
            last = recorded[i, given - 1].astype(np.int16)
            for h in (h for h in horizons if given - 1 + h < meta.get("valid_frames", len(recorded[i]))):
                frame = given - 1 + h
                moving = (np.abs(recorded[i, frame] - last) > MOVED).any(-1)
                counted[h] += 1
                for row, pictures in rows.items():
                    error = squared_error(pictures[i, frame], recorded[i, frame])
                    sums[h, row] += (error.sum(), error.size, error[moving].sum(), moving.sum())
    found = {str(h): _compared({row: sums[h, row] for row in ROWS}) | {"windows": counted[h]} for h in horizons}
    return {
        "horizons": found,
        "mode": mode,
        "steps": predictor.sampler.steps,
        "guidance": predictor.sampler.guidance,
        "seed": seed,
        "model": {key: policy.about.get(key) for key in ("weights", "dtype", "step", "checkpoint_sha256")},
        "shards": index.fingerprint,
    }


def format_table(result: dict[str, Any]) -> str:
    """The result as a plain-text table."""
    lines = [f"{'':8}" + "".join(f"{f'{h} frames':>20}" for h in result["horizons"]), f"{'dB':8}"]
    lines[1] += f"{'all':>12}{'moving':>8}" * len(result["horizons"])
    for row in ROWS:
        cells = [result["horizons"][h][row] for h in result["horizons"]]
        lines.append(f"{row:8}" + "".join(f"{_cell(c['db']):>12}{_cell(c['moving_db']):>8}" for c in cells))
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"


def _compared(sums: dict[str, np.ndarray]) -> dict[str, Any]:
    """One horizon's entry."""
    out: dict[str, Any] = {
        row: {"db": psnr_of(total[0], total[1]), "moving_db": psnr_of(total[2], total[3])}
        for row, total in sums.items()
    }
    model, copy, codec = (sums[row][2] for row in ROWS)
    moving = sums["model"][3]
    out["moving_share"] = float(moving / sums["model"][1]) if sums["model"][1] else None
    out["moving_gain_db"] = out["model"]["moving_db"] - out["copy"]["moving_db"] if moving else None
    out["gap_closed"] = float((copy - model) / (copy - codec)) if moving and copy != codec else None
    return out
