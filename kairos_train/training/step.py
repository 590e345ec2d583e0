"""One optimiser step: count, forward, backward, update.

The loss equation of `kairos_train.objective.flow_matching` across micro-batches and processes: the denominators of the
whole global step are counted first (one small all-reduce), then every micro-batch's numerator over them, times the
number of processes because the engine averages gradients over processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from kairos_train.config.schema import StageConfig
from kairos_train.model import ModelOutput
from kairos_train.objective.flow_matching import ConditionedBatch, FlowMatching, LossSums
from kairos_train.training.engine import TrainingEngine

SIGMA_BINS = 5


@dataclass
class StepReport:
    """What a step did, equal on all ranks.

    Attributes:
        video_loss, action_loss: of the whole global step; action is None in a video stage.
        loss: their weighted sum.
        grad_norm: before clipping, inf when not finite.
        stepped: False when the gradient was not finite and was dropped.
        bins: {"video": (SIGMA_BINS, 2), "action": …}: Σ w·e² and Σ n by σ in equal bins of [0, 1].
        samples: of the whole global step.
    """

    video_loss: float
    action_loss: float | None
    loss: float
    grad_norm: float
    stepped: bool
    samples: int
    bins: dict[str, Tensor] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class LossMeter:
    """Sums of the loss equation over micro-batches, per stream and σ bin. Double precision, on the CPU."""

    def __init__(self) -> None:
        self.bins = {stream: torch.zeros(SIGMA_BINS, 2, dtype=torch.float64) for stream in ("video", "action")}
        self.samples = torch.zeros(1, dtype=torch.float64)

    def add(self, batch: ConditionedBatch, sums: LossSums) -> None:
        """Take in one micro-batch."""
        frames = batch.latents.shape[2]
        per_frame = batch.latents[0, :, 0].numel()
        counts = torch.tensor([(frames - k) * per_frame for k in batch.history], dtype=torch.float64)
        self._add("video", batch.video_sigma, sums.video, counts)
        if sums.action is not None:
            self._add("action", batch.action_sigma, sums.action, batch.action_mask.sum(1))
        self.samples += len(batch.keys)

    def _add(self, stream: str, sigma: Tensor, sums: Tensor, counts: Tensor) -> None:
        index = (sigma * SIGMA_BINS).long().clamp(max=SIGMA_BINS - 1).cpu()
        values = torch.stack([sums.detach().double().cpu(), counts.double().cpu()], dim=1)
        self.bins[stream].index_add_(0, index, values)

    def reduce(self, device: torch.device) -> None:
        """Add up over processes."""
        flat = torch.cat([self.bins["video"].flatten(), self.bins["action"].flatten(), self.samples]).to(device)
        dist.all_reduce(flat)
        video, action, self.samples = flat.cpu().split([2 * SIGMA_BINS, 2 * SIGMA_BINS, 1])
        self.bins = {"video": video.view(-1, 2), "action": action.view(-1, 2)}

    def loss(self, stream: str) -> float:
        """Σ w·e² / Σ n, 0 without any counted element."""
        total, count = self.bins[stream].sum(0).tolist()
        return total / count if count else 0.0


def train_step(
    engine: TrainingEngine, objective: FlowMatching, stage: StageConfig, batches: list[ConditionedBatch]
) -> StepReport:
    """Run one optimiser step on the micro-batches of this rank. Collective."""
    counts = _global_counts(batches, engine.world.device)
    meter = LossMeter()
    for i, batch in enumerate(batches):
        output = ModelOutput(*engine(**batch.model_inputs()))
        sums = objective.loss_sums(batch, output.video, output.action)
        meter.add(batch, sums)
        engine.backward(scaled_loss(stage, sums, counts) * engine.world.size, last=i == len(batches) - 1)
    result = engine.step()
    meter.reduce(engine.world.device)
    joint = stage.streams == "joint"
    video, action = meter.loss("video"), meter.loss("action") if joint else None
    return StepReport(
        video_loss=video,
        action_loss=action,
        loss=weighted_loss(stage, video, action),
        grad_norm=result.norm,
        stepped=result.stepped,
        samples=int(meter.samples),
        bins={"video": meter.bins["video"]} | ({"action": meter.bins["action"]} if joint else {}),
    )


def scaled_loss(stage: StageConfig, sums: LossSums, counts: tuple[int, int]) -> Tensor:
    """w_video·Σ_video/N_video + w_action·Σ_action/N_action of one micro-batch; a stream nobody counts in gives 0."""
    loss = stage.video_loss_weight * sums.video.sum() / max(counts[0], 1)
    if sums.action is not None:
        loss = loss + stage.action_loss_weight * sums.action.sum() / max(counts[1], 1)
    return loss


def weighted_loss(stage: StageConfig, video: float, action: float | None) -> float:
    """The reported total."""
    return stage.video_loss_weight * video + stage.action_loss_weight * (action or 0.0)


def _global_counts(batches: list[ConditionedBatch], device: torch.device) -> tuple[int, int]:
    """N_video and N_action of the whole global step. int64: exact at any size."""
    local = [sum(b.video_elements() for b in batches), sum(b.action_steps() for b in batches)]
    counts = torch.tensor(local, device=device)
    dist.all_reduce(counts)
    return int(counts[0]), int(counts[1])
