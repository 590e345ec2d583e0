"""What is drawn for a sample, as a function of (seed, step, sample key) alone.

The same sample at the same step gets the same noise, σ, condition and dropout whatever rank, batch or layout it lands
in (model specification, "Objective and schedule"). Drawn on the CPU in float32, so that devices agree too.
"""

import hashlib
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from kairos_train.config.schema import StageConfig
from kairos_train.objective.schedule import TRAINING_STEPS


@dataclass(frozen=True)
class Choices:
    """What is chosen for one sample at one step.

    Attributes:
        condition: t2v | ti2v | i2v | null2v; of an image t2i | n2i.
        drop_context: classifier-free guidance dropout: the context is zeroed, or that of the empty prompt.
        video_index, action_index: entries of the streams' shifted 1000-step tables.
        caption: in [0, 1), picks one of several captions.
    """

    condition: str
    drop_context: bool
    video_index: int
    action_index: int
    caption: float


@dataclass(frozen=True)
class SampleDraw(Choices):
    """The choices and the noise of one sample at one step.

    Attributes:
        video_noise: (C, F, H, W) float32.
        action_noise: (A, action_dim) float32; None without actions.
    """

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
    return SampleDraw(
        **asdict(_choose(stage, generator, frames=video_shape[1])),
        video_noise=torch.randn(video_shape, generator=generator),
        action_noise=None if action_shape is None else torch.randn(action_shape, generator=generator),
    )


def choose(stage: StageConfig, *, seed: int, step: int, key: str, frames: int) -> Choices:
    """What `draw_sample` chooses for a sample of `frames` latent frames, without its noise."""
    return _choose(stage, sample_generator(seed, step, key), frames=frames)


def pick(shares: dict[str, float], draw: float) -> str:
    """The entry in whose interval of the running sum `draw` in [0, 1) falls, by sorted name; shares sum to 1."""
    total, names = 0.0, sorted(name for name, p in shares.items() if p > 0)
    for name in names:
        total += shares[name]
        if draw < total:
            return name
    return names[-1]  # the shares' sum rounds to a little under 1


def _choose(stage: StageConfig, generator: torch.Generator, *, frames: int) -> Choices:
    condition, dropout, caption = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    indices = torch.randint(TRAINING_STEPS, (2,), generator=generator).tolist()
    return Choices(
        condition=pick(stage.image_conditions if frames == 1 else stage.conditions, condition),
        drop_context=dropout < stage.cfg_dropout,
        video_index=indices[0],
        action_index=indices[1],
        caption=caption,
    )
