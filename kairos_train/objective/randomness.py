"""What is drawn for a sample, as a function of (seed, step, sample key) alone.

The same sample at the same step gets the same noise, σ, condition and dropout whatever rank, batch or layout it lands
in (model specification, "Objective and schedule"). Drawn on the CPU in float32, so that devices agree too.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from kairos_train.config.schema import StageConfig
from kairos_train.objective.schedule import TRAINING_STEPS


@dataclass(frozen=True)
class SampleDraw:
    """The random choices of one sample at one step.

    Attributes:
        condition: t2v | ti2v | i2v | null2v.
        drop_context: classifier-free guidance dropout: the context is zeroed.
        video_index, action_index: entries of the streams' shifted 1000-step tables.
        video_noise: (C, F, H, W) float32.
        action_noise: (A, action_dim) float32; None without actions.
    """

    condition: str
    drop_context: bool
    video_index: int
    action_index: int
    video_noise: Tensor
    action_noise: Tensor | None


def sample_generator(seed: int, step: int, key: str) -> torch.Generator:
    """A CPU generator seeded by a hash of its arguments."""
    digest = hashlib.blake2b(f"{seed}\0{step}\0{key}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_sample(
    stage: StageConfig, *, seed: int, step: int, key: str, video_shape: torch.Size, action_shape: torch.Size | None
) -> SampleDraw:
    """Draw everything for one sample, always in the same order.

    Args:
        video_shape: (C, F, H, W) of its latents.
        action_shape: (A, action_dim), None without actions.
    """
    generator = sample_generator(seed, step, key)
    condition_draw, dropout_draw = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    indices = torch.randint(TRAINING_STEPS, (2,), generator=generator).tolist()
    return SampleDraw(
        condition=_pick(stage.conditions, condition_draw),
        drop_context=dropout_draw < stage.cfg_dropout,
        video_index=indices[0],
        action_index=indices[1],
        video_noise=torch.randn(video_shape, generator=generator),
        action_noise=None if action_shape is None else torch.randn(action_shape, generator=generator),
    )


def _pick(probabilities: dict[str, float], draw: float) -> str:
    """The entry in whose interval of the running sum `draw` in [0, 1) falls, by sorted name."""
    total, names = 0.0, sorted(name for name, p in probabilities.items() if p > 0)
    for name in names:
        total += probabilities[name]
        if draw < total:
            return name
    return names[-1]  # the probabilities' sum rounds to a little under 1
