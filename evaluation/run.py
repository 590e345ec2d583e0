"""A whole evaluation: the parts that a model can be judged by, in one folder.

    evaluation.json        everything, as below
    report.html            the same to look at, pictures inside
    open_loop.json, .png   sampled actions beside recorded ones (`evaluation.open_loop`)
    losses.png             loss by noise level (`evaluation.losses`)
    video_drift.png        closeness to the recording against the horizon (`evaluation.video`)
    video_NNN.png          some of the rollouts
    memory.png             effective horizons of the GATED heads (`evaluation.memory_probe`)

A `closed_loop.json` that lies in the folder is shown on the page too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataloaders.consistency.report import announced, lines, read_report
from dataloaders.shards import ShardIndex
from evaluation import losses, memory_probe, open_loop, plots, video
from evaluation.held_out import open_policy
from evaluation.pictures import contact_sheet, save_figure
from evaluation.quality import QualityModel
from evaluation.report import EVALUATION, FORMAT, write_page
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import write_json
from kairos_train.basics.log import logger
from kairos_train.inference.load import Policy
from kairos_train.inference.predict import Predictor
from kairos_train.model.capture import gdn_layers

PARTS = ("open_loop", "losses", "video", "memory")
PROBED = 32
"""Most windows that the memory probe looks at: the decays of every token are kept until their quantiles are known."""
SHEETS = 3


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Attributes:
        parts: of PARTS; None: all that the model can do.
        samples: windows for open_loop and losses, spread evenly over the shards.
        steps, guidance: of the sampler; None takes the export's.
        seed: of all noise.
        draws: noises per window for the losses.
        drift: of the part video.
        lpips, fvd: TorchScript files, see `evaluation.quality.QualityModel`.
        batch_size: windows at a time; changes no number but by rounding.
        robot: name of one of several that the model was trained on; None: the one that the shards are of.
    """

    parts: Sequence[str] | None = None
    samples: int = 200
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    draws: int = 1
    drift: video.DriftSettings = field(default_factory=video.DriftSettings)
    lpips: Path | None = None
    fvd: Path | None = None
    batch_size: int = 32
    robot: str | None = None

    def check(self) -> Settings:
        """Return self.

        Raises:
            UserError: an unknown part, or a number below 1.
        """
        if self.parts is not None and not self.parts:
            raise UserError(f"parts: none given; choose from {', '.join(PARTS)}")
        for part in self.parts or ():
            if part not in PARTS:
                raise UserError(f"parts={part}: is unknown; choose from {', '.join(PARTS)}")
        numbers = {name: getattr(self, name) for name in ("samples", "draws", "batch_size")}
        for name, value in (numbers | {"videos": self.drift.videos, "chunks": self.drift.chunks}).items():
            if value < 1:
                raise UserError(f"{name}={value}: must be at least 1")
        return self


def evaluate(
    export: Path, *, shards: Path, out: Path, settings: Settings, device: str = "cpu", dtype: str | None = None
) -> dict[str, Any]:
    """Evaluate an export on held-out windows and write the folder.

    Args:
        export: folder written by `kairos-train export`.
        shards: folder of windows the model was not trained on.
        out: folder to write; must not hold an evaluation.
        device, dtype: as for `kairos_train.inference.load.load`.

    Returns:
        The content of evaluation.json: what was evaluated on what, "parts" with the numbers of each, and "left_out":
        the other parts, each with the reason.

    Raises:
        UserError: `out` holds an evaluation, a part is unknown or beyond this model, a setting does not fit it, the
            shards do not fit it or are damaged.
    """
    out = Path(out)
    if (out / EVALUATION).exists():
        raise UserError(f"out={out}: holds an evaluation already; give another folder or remove it")
    settings.check()
    policy, index = open_policy(export, shards, robot=settings.robot, device=device, dtype=dtype)
    predictor = Predictor(policy, sampler=policy.sampler.replaced(steps=settings.steps, guidance=settings.guidance))
    for line in announced(shards):
        logger.info(line)
    parts, left_out = _chosen(obstacles(policy, index), settings.parts)
    judges = _check_video(predictor, settings) if "video" in parts else {}
    if "video" not in parts and (settings.lpips or settings.fvd):
        raise UserError(f"lpips, fvd: judge pictures of the part video, which is left out; parts={','.join(parts)}")
    out.mkdir(parents=True, exist_ok=True)
    found = {
        part: _timed(part, lambda part=part: _measure(part, predictor, index, settings, judges, out)) for part in parts
    }
    result = {
        "format": FORMAT,
        "experiment": policy.config.experiment,
        "model_name": policy.config.model.name,
        "model": {k: policy.about.get(k) for k in ("weights", "dtype", "step", "checkpoint_sha256", "fingerprint")},
        "shards": {
            "fingerprint": index.fingerprint,
            "dataset": index.source.get("dataset"),
            "samples": index.samples,
            "contradictions": lines(read_report(shards)),
        },
        "seed": settings.seed,
        "parts": found,
        "left_out": left_out,
    }
    write_json(out / EVALUATION, result)
    write_page(out)
    return result


def obstacles(policy: Policy, index: ShardIndex) -> dict[str, str]:
    """The parts that a model cannot be judged by on these shards, each with the reason."""
    found, rules = {}, policy.config.model.video
    if not policy.acts:
        found["open_loop"] = "the model was trained without actions"
    elif not policy.history_frames:
        found["open_loop"] = "mode action needs given frames, the model was trained without (stage.conditions)"
    elif not rules.restrict_history_query_to_history or rules.window_semantics == "token":
        found["open_loop"] = (
            "mode action needs model.video.restrict_history_query_to_history=true and window_semantics=frame"
        )
    if not policy.history_frames:
        found["video"] = "the model was trained without given frames (stage.conditions): it follows no recording"
    elif policy.latent_frames <= policy.history_frames:
        found["video"] = f"windows of {policy.latent_frames} latent frames leave nothing to sample behind those given"
    elif index.clips is not None:
        found["video"] = "the shards hold clips, no windows of episodes: nothing is recorded behind them"
    if not gdn_layers(policy.model):
        found["memory"] = "the model has no Gated DeltaNet layer"
    return found


def _chosen(blocked: dict[str, str], wanted: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The parts that are measured, in their order, and the reasons of the others."""
    for part in wanted or ():
        if part in blocked:
            raise UserError(f"parts={part}: {blocked[part]}; leave that part out")
    parts = [part for part in PARTS if part not in blocked and (wanted is None or part in wanted)]
    return parts, {part: blocked.get(part, "not asked for") for part in PARTS if part not in parts}


def _check_video(predictor: Predictor, settings: Settings) -> dict[str, QualityModel]:
    """The judges by name. Raises UserError where a setting does not fit, before any work."""
    drift = settings.drift
    predictor.memory(mode="video", history=drift.history, carried=drift.carried)
    files = {"lpips": settings.lpips, "fvd": settings.fvd}
    device = predictor.policy.device
    return {name: QualityModel(file, option=name, device=device) for name, file in files.items() if file is not None}


def _measure(
    part: str, predictor: Predictor, index: ShardIndex, settings: Settings, judges: dict[str, QualityModel], out: Path
) -> dict[str, Any]:
    """The numbers of one part; its pictures are written."""
    common = {"samples": settings.samples, "seed": settings.seed, "batch_size": settings.batch_size}
    if part == "open_loop":
        result = open_loop.measure(predictor, index, **common)
        open_loop.write(out, result)
    elif part == "losses":
        result = losses.measure(predictor, index, draws=settings.draws, **common)
        save_figure(plots.losses({"model": result}), out / "losses.png")
    elif part == "video":
        result, clips = video.measure(predictor, index, settings.drift, seed=settings.seed, **judges)
        save_figure(plots.drift({"model": result}), out / "video_drift.png")
        result["pictures"] = _sheets(clips[:SHEETS], result["given_frames"], out)
    else:
        common["samples"] = min(settings.samples, PROBED)
        result = memory_probe.measure(predictor, index, **common)
        save_figure(plots.memory({"model": result}), out / "memory.png")
    return result


def _sheets(clips: Sequence[video.ComparedClip], given: int, out: Path) -> list[str]:
    """A contact sheet of each clip; returns their names."""
    names = [f"video_{i:03d}.png" for i in range(len(clips))]
    for name, clip in zip(names, clips):
        rows = {"recorded": clip.recorded, "model": clip.model, "encoder": clip.encoder}
        contact_sheet(out / name, rows, title=f"{clip.task} ({clip.key}; the first {given} given)")
    return names


def _timed(part: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    begun = time.perf_counter()
    result = measure()
    logger.info(f"{part}: {time.perf_counter() - begun:.0f} s")
    return result
