"""Validation loss on held-out windows with fixed noise: equal weights give equal numbers, whenever and wherever."""

from __future__ import annotations

import torch

from dataloaders.config import DataConfig
from dataloaders.loading.loader import fixed_batches
from kairos_train.config.schema import TrainConfig
from kairos_train.model import ModelOutput
from kairos_train.training.engine.deepspeed_engine import TrainingEngine
from kairos_train.training.inputs.feed import Feed
from kairos_train.training.step import LossMeter

FIXED_STEP = -1
"""The step whose noise validation draws: no training step has it."""


@torch.no_grad()
def validate(engine: TrainingEngine, feed: Feed, data: DataConfig, train: TrainConfig) -> dict[str, float]:
    """Losses by stream over the first `train.validation_batches` batches, split over data ranks. Collective.

    Returns:
        {"video": …, "action": …} (action in a joint stage).
    """
    topology = engine.topology
    meter, ranks = LossMeter(topology), topology.degrees.data
    batches = list(
        fixed_batches(
            data.validation_shards,
            batch_size=train.micro_batch,
            count=train.validation_batches,
            with_frames=feed.needs_frames,
            on_corrupt=data.on_corrupt,
        )
    )
    engine.model.eval()
    rounds = -(-len(batches) // ranks)
    for i in range(rounds):
        # Every rank runs every round, because the forward pass may be collective; a surplus one is not counted.
        mine = i * ranks + topology.data_rank
        batch = feed.condition(batches[min(mine, len(batches) - 1)], step=FIXED_STEP, source=feed.held_out)
        output = ModelOutput(*engine(**batch.model_inputs()))
        if mine < len(batches):
            frames = engine.model.local_frames(batch.latents.shape[2])
            meter.add(batch, feed.objective.loss_sums(batch, output.video, output.action, frames), frames)
    engine.model.train()
    meter.reduce()
    streams = ["video", "action"] if feed.stage.streams == "joint" else ["video"]
    return {stream: meter.loss(stream) for stream in streams}
