"""One optimiser step: count, forward, backward, update.

The loss equation of `kairos_train.objective.flow_matching` across micro-batches and ranks, for every layout:

    loss of a micro-batch on a rank = dp·cp · (w_video · Σ_video / N_video + w_action · Σ_action / (cp · N_action))

N counts the whole global step, before its first forward pass (one small all-reduce). Σ_video is over the frames that
the rank holds. Every context rank computes all actions, hence 1/cp. The engine averages gradients over the dp·cp ranks
that hold the same parameters, hence dp·cp. Tensor ranks compute the same loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from kairos_train.config.schema import StageConfig
from kairos_train.model import ModelOutput
from kairos_train.objective.flow_matching import ConditionedBatch, FlowMatching, LossSums
from kairos_train.training.engine.deepspeed_engine import TrainingEngine
from parallel.topology import Topology

SIGMA_BINS = 5


@dataclass
class StepReport:
    """What a step did, equal on all ranks.

    Attributes:
        video_loss, action_loss: of the whole global step; action is None in a video stage.
        loss: their weighted sum.
        grad_norm: before clipping, inf when not finite.
        stepped: False when the gradient was not finite, or refused, and was dropped.
        bins: {"video": (SIGMA_BINS, 2), "action": …}: Σ w·e² and Σ n by σ in equal bins of [0, 1].
        samples, tokens, flops: of the whole global step.
    """

    video_loss: float
    action_loss: float | None
    loss: float
    grad_norm: float
    stepped: bool
    samples: int
    tokens: int = 0
    flops: float = 0.0
    bins: dict[str, Tensor] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class LossMeter:
    """Sums of the loss equation over micro-batches, per stream and σ bin. Double precision, on the CPU."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.bins = {stream: torch.zeros(SIGMA_BINS, 2, dtype=torch.float64) for stream in ("video", "action")}
        self.work = torch.zeros(3, dtype=torch.float64)  # samples, tokens, FLOPs

    def add(self, batch: ConditionedBatch, sums: LossSums, frames: range) -> None:
        """Take in one micro-batch, of which this rank holds `frames`. Actions count on the first context rank."""
        self._add("video", batch.video_sigma, sums.video, torch.tensor(batch.video_elements(frames)))
        if self.topology.context_rank:
            return
        if sums.action is not None:
            self._add("action", batch.action_sigma, sums.action, batch.action_mask.sum(1))
        self.work += len(batch.keys) * torch.tensor([1, batch.tokens, batch.flops], dtype=torch.float64)

    def _add(self, stream: str, sigma: Tensor, sums: Tensor, counts: Tensor) -> None:
        index = (sigma * SIGMA_BINS).long().clamp(max=SIGMA_BINS - 1).cpu()
        values = torch.stack([sums.detach().double().cpu(), counts.double().cpu()], dim=1)
        self.bins[stream].index_add_(0, index, values)

    def reduce(self) -> None:
        """Add up over ranks."""
        flat = torch.cat([self.bins["video"].flatten(), self.bins["action"].flatten(), self.work])
        if self.topology.gradient_group is not None:
            flat = flat.to(self.topology.device)
            dist.all_reduce(flat, group=self.topology.gradient_group)
        video, action, self.work = flat.cpu().split([2 * SIGMA_BINS, 2 * SIGMA_BINS, 3])
        self.bins = {"video": video.view(-1, 2), "action": action.view(-1, 2)}

    def loss(self, stream: str) -> float:
        """Σ w·e² / Σ n, 0 without any counted element."""
        total, count = self.bins[stream].sum(0).tolist()
        return total / count if count else 0.0

    def losses(self, stage: StageConfig) -> tuple[float, float | None]:
        """Of the video and, in a joint stage, of the actions."""
        return self.loss("video"), self.loss("action") if stage.streams == "joint" else None


def train_step(
    engine: TrainingEngine,
    objective: FlowMatching,
    stage: StageConfig,
    batches: list[ConditionedBatch],
    *,
    refuses: Callable[[float], bool] = lambda loss: False,
    before_update: Callable[[], None] = lambda: None,
) -> StepReport:
    """Run one optimiser step on the micro-batches of this rank. Collective.

    Args:
        refuses: whether the update of a step with this loss is to be dropped; asked once, with the same loss on all
            ranks, before the last backward pass. That pass is then given NaN, and the gradient goes the way of every
            gradient that is not finite: the one way that all ZeRO stages have to drop it.
        before_update: called between the last backward pass and the update.
    """
    topology = engine.topology
    counts, meter = global_counts(batches, topology), LossMeter(topology)
    copies = topology.degrees.data * topology.degrees.context
    for i, batch in enumerate(batches):
        output = ModelOutput(*engine(**batch.model_inputs()))
        frames = engine.model.local_frames(batch.latents.shape[2])
        sums = objective.loss_sums(batch, output.video, output.action, frames)
        meter.add(batch, sums, frames)
        loss = copies * scaled_loss(stage, sums, counts, topology.degrees.context)
        last = i == len(batches) - 1
        if last:
            meter.reduce()
            if refuses(weighted_loss(stage, *meter.losses(stage))):
                loss = loss * math.nan
        engine.backward(loss, last=last)
    before_update()
    result = engine.step()
    joint = stage.streams == "joint"
    video, action = meter.losses(stage)
    return StepReport(
        video_loss=video,
        action_loss=action,
        loss=weighted_loss(stage, video, action),
        grad_norm=result.norm,
        stepped=result.stepped,
        samples=round(meter.work[0].item()),
        tokens=round(meter.work[1].item()),
        flops=meter.work[2].item(),
        bins={"video": meter.bins["video"]} | ({"action": meter.bins["action"]} if joint else {}),
    )


def scaled_loss(stage: StageConfig, sums: LossSums, counts: tuple[int, int], context: int = 1) -> Tensor:
    """What the equation at the top of this file has in brackets; a stream nobody counts in gives 0.

    Args:
        counts: N_video and N_action.
        context: cp, the ranks that compute the same actions.
    """
    loss = stage.video_loss_weight * sums.video.sum() / max(counts[0], 1)
    if sums.action is not None:
        loss = loss + stage.action_loss_weight * sums.action.sum() / (context * max(counts[1], 1))
    return loss


def weighted_loss(stage: StageConfig, video: float, action: float | None) -> float:
    """The reported total."""
    return stage.video_loss_weight * video + stage.action_loss_weight * (action or 0.0)


def global_counts(batches: list[ConditionedBatch], topology: Topology) -> tuple[int, int]:
    """N_video and N_action of the whole global step. int64: exact at any size. Collective."""
    local = [sum(sum(b.video_elements()) for b in batches), sum(b.action_steps() for b in batches)]
    counts = torch.tensor(local, device=topology.device)
    if topology.data_group is not None:
        dist.all_reduce(counts, group=topology.data_group)
    return int(counts[0]), int(counts[1])
