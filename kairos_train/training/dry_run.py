"""The largest micro-batch of a run before its first step: what does not fit is found in the first minute.

It goes the whole way of a step (forward, backward, reduction), and its update is dropped: weights, moments, averages
and random states stay as they are, bit for bit.
"""

from __future__ import annotations

from typing import Any

import psutil
import torch

from dataloaders.loading.buckets import Bucket
from kairos_train.basics.errors import UserError
from kairos_train.objective.flow_matching import ConditionedBatch
from kairos_train.training.engine.deepspeed_engine import TrainingEngine
from kairos_train.training.inputs.feed import Feed
from kairos_train.training.step import train_step

MICRO_BATCHES = 2
"""At most: the second adds to the gradients of the first, a third would use nothing more."""


def dry_run(
    engine: TrainingEngine, feed: Feed, *, accumulation: int, like: ConditionedBatch, largest: tuple[Bucket, int]
) -> dict[str, Any]:
    """One step on the largest batch there can be, without its update. Collective.

    Args:
        accumulation: micro-batches of a step.
        like: a batch of this run; contexts are as long as its.
        largest: bucket and samples of the micro-batch with the most tokens.

    Returns:
        {"used_gb", "total_gb", "text"} of this process: peak so far, of the device or of the machine's memory.

    Raises:
        UserError: it does not fit into the device's memory.
    """
    bucket, samples = largest
    batches = [feed.zeros(bucket, samples, like=like)] * min(accumulation, MICRO_BATCHES)
    engine.set_lr(0.0)
    try:
        train_step(engine, feed.objective, feed.stage, batches, refuses=lambda loss: True)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the largest micro-batch, {samples} × {bucket}, does not fit: {str(error).splitlines()[0]} Lower "
            "data.tokens_per_micro_batch or train.micro_batch, set train.recompute=selective, or raise "
            "parallel.context (`kairos-train plan` compares them)"
        ) from error
    return _memory(engine.topology.device, f"{samples} × {bucket}")


def _memory(device: torch.device, what: str) -> dict[str, Any]:
    if device.type == "cuda":
        used, total = torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
        where = "the GPU's"
    else:
        memory = psutil.virtual_memory()
        used, total, where = memory.total - memory.available, memory.total, "the machine's"
    text = (
        f"dry run of the largest micro-batch ({what}): {used / 1e9:.1f} of {where} {total / 1e9:.1f} GB are used, "
        f"{(total - used) / 1e9:.1f} GB are left"
    )
    return {"used_gb": used / 1e9, "total_gb": total / 1e9, "text": text}
