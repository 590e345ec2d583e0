"""The cheapest layout for a number of GPUs: all legal ones that fit, by seconds per sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from kairos_train.basics.errors import UserError
from kairos_train.config.schema import Config
from kairos_train.plan.estimate import HEADROOM, Plan
from kairos_train.plan.layout import SampleShape

RECOMPUTE = ("none", "selective", "block")

SHOWN = 5


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        legal: how many layouts the degrees allow.
        fitting: those that fit, cheapest first; equal ones in the order of the simplest.
    """

    legal: int
    fitting: list[Plan]

    @property
    def best(self) -> Plan:
        return self.fitting[0]


def search(config: Config, sample: SampleShape, *, gpus: int) -> Found:
    """Try every degree of tensor and context, sequence parallelism, ZeRO stage and recomputation.

    All else stays as configured: the sample, micro-batch, accumulation, precision, offloading.

    Raises:
        UserError: nothing is legal, or nothing fits.
    """
    plans, reason = [], "no degree divides"
    for candidate in _candidates(config, gpus, sample.frames):
        try:
            plans.append(Plan.of(candidate, sample, gpus=gpus))
        except UserError as error:
            reason = str(error)
    if not plans:
        raise UserError(f"--gpus {gpus}: no layout is legal; the last one tried: {reason}")
    fitting = sorted((plan for plan in plans if plan.fits), key=lambda plan: plan.seconds_per_sample)
    if not fitting:
        least = min(plans, key=lambda plan: plan.memory.total)
        raise UserError(
            f"--gpus {gpus}: none of {len(plans)} layouts fits cluster.memory_gb={config.cluster.memory_gb:g} with "
            f"{HEADROOM:.0%} left free; the smallest ({' '.join(least.overrides())}) takes "
            f"{least.memory.total / 1e9:.1f} GB: use more GPUs or smaller micro-batches"
        )
    return Found(legal=len(plans), fitting=fitting)


def _candidates(config: Config, gpus: int, frames: int) -> Iterator[Config]:
    """Simplest first. More context ranks than frames would idle."""
    for tensor in _divisors(gpus):
        for context in _divisors(gpus // tensor):
            if context > frames:
                continue
            for sequence in (False, True)[: 1 if tensor == 1 else 2]:
                parallel = replace(config.parallel, tensor=tensor, context=context, sequence=sequence)
                for stage in (1, 0, 2, 3):
                    for recompute in RECOMPUTE:
                        train = replace(config.train, zero_stage=stage, recompute=recompute)
                        yield replace(config, parallel=parallel, train=train)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
