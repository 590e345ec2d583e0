"""Held-out windows sampled while a model trains, to be looked at.

Every denoising step is a pass of training: the whole model in whatever layout it has, all ranks in each pass. So
sharded runs show samples too, without a second copy of the weights.

Shapes: B windows, C latent channels, F latent frames, T frames, H W height and width, A actions, D action dimensions.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dataloaders.config import DataConfig
from dataloaders.loading.loader import fixed_batches
from kairos_train.basics.pages import png_of
from kairos_train.config.schema import StageConfig
from kairos_train.inference.sampler import SamplerConfig, StreamNoise, integrate, video_sigmas
from kairos_train.model import ModelOutput
from kairos_train.objective.flow_matching import HISTORY_CONDITIONS
from kairos_train.training.engine.deepspeed_engine import TrainingEngine
from kairos_train.training.inputs.feed import Feed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WINDOWS = 2


@dataclass(frozen=True)
class Samples:
    """Of every window what was sampled and what was recorded, each None where there is none.

    Attributes:
        frames: uint8 (B, T, H, 2 W, 3), sampled left, recorded right, both through the video encoder and back; None
            where the run has no encoder.
        actions: normalised float32 (B, 2, A, D), sampled and recorded; None in a video stage.
        valid: bool (B, A).
    """

    frames: np.ndarray | None
    actions: np.ndarray | None
    valid: np.ndarray | None


@torch.no_grad()
def draw_samples(engine: TrainingEngine, feed: Feed, data: DataConfig) -> Samples | None:
    """Sample the first `WINDOWS` held-out windows by the stage's sampler, unguided, always from the same noise.

    They are conditioned on their text and, where the stage trains so, on their first frames. Collective.

    Returns:
        None for images: there is nothing to go on from.
    """
    known = feed.stage.history_frames if _goes_on(feed.stage) else 0
    (batch,) = fixed_batches(
        data.validation_shards,
        batch_size=WINDOWS,
        count=1,
        with_frames=feed.needs_frames,
        on_corrupt=data.on_corrupt,
    )
    given = feed.encode(batch, HISTORY_CONDITIONS[0] if known else "t2v", source=feed.held_out)
    recorded, actions = given["latents"], given.get("actions")
    if recorded.shape[2] <= known:
        return None
    engine.model.eval()
    sampler = SamplerConfig(guidance=1.0, action_shift=feed.stage.action_shift).check()
    tokens = recorded[0, 0, 0].numel() // (feed.objective.patch[0] * feed.objective.patch[1])
    seeds, mask = range(len(batch.keys)), given.get("action_mask")
    own = None if "action_dim_mask" not in given else int(given["action_dim_mask"][0].sum())  # windows of one robot

    def velocities(z: Tensor, t: Tensor, a: Tensor | None, t_action: Tensor) -> tuple[Tensor, Tensor | None]:
        acting = {} if a is None else {"action": a, "action_timestep": t_action, "action_mask": mask}
        output = ModelOutput(
            *engine(
                latents=z,
                context=given["context"],
                context_mask=given["context_mask"],
                video_timestep=t,
                history_frames=[known] * len(z),
                state=given.get("state"),
                **acting,
            )
        )
        return _all_frames(output.video.float(), z, engine), output.action

    sampled = integrate(
        velocities,
        lambda z, t: z,  # never asked: unguided
        config=sampler,
        sigmas=video_sigmas(sampler, recorded.shape[2], tokens),
        latents=StreamNoise(recorded.shape[1:], seeds, "video", feed.device),
        actions=None if actions is None else StreamNoise(actions.shape[1:], seeds, "action", feed.device, own=own),
        history=recorded[:, :, :known] if known else None,
    )
    engine.model.train()
    return Samples(
        frames=_side_by_side(feed, sampled.latents, recorded),
        actions=None if actions is None else torch.stack([sampled.actions, actions], dim=1).float().cpu().numpy(),
        valid=None if mask is None else mask.cpu().numpy(),
    )


def images_of(samples: Samples) -> dict[str, bytes]:
    """Image files by name: of every window its frames as an animated GIF, its actions as curves."""
    images = {}
    for i in range(WINDOWS):
        if samples.frames is not None and i < len(samples.frames):
            images[f"video_{i}.gif"] = _moving_picture(samples.frames[i])
        if samples.actions is not None and i < len(samples.actions):
            images[f"actions_{i}.png"] = png_of(_curves(samples.actions[i], samples.valid[i]))
    return images


def _goes_on(stage: StageConfig) -> bool:
    return any(stage.conditions.get(name, 0) > 0 for name in HISTORY_CONDITIONS)


def _all_frames(velocity: Tensor, like: Tensor, engine: TrainingEngine) -> Tensor:
    """The velocity of all frames, from the ranks that hold some each."""
    group = engine.topology.context_group
    if group is None:
        return velocity
    frames, whole = engine.model.local_frames(like.shape[2]), torch.zeros_like(like)
    whole[:, :, frames.start : frames.stop] = velocity
    dist.all_reduce(whole, group=group)
    return whole


def _side_by_side(feed: Feed, sampled: Tensor, recorded: Tensor) -> np.ndarray | None:
    if feed.encoders is None:
        return None
    decode = feed.encoders.video.decode
    return torch.cat([decode(sampled), decode(recorded)], dim=3).cpu().numpy()


def _moving_picture(frames: np.ndarray) -> bytes:
    """An animated GIF of frames (T, H, W, 3), five a second."""
    from PIL import Image

    file, (first, *others) = io.BytesIO(), [Image.fromarray(frame) for frame in frames]
    first.save(file, "GIF", save_all=True, append_images=others, duration=200, loop=0)
    return file.getvalue()


def _curves(actions: np.ndarray, valid: np.ndarray) -> Figure:
    """One panel per dimension of (2, A, D), four in a row; steps of padding are left out."""
    from matplotlib.figure import Figure

    dims = actions.shape[2]
    columns, rows, steps = min(dims, 4), -(-dims // 4), np.flatnonzero(valid)
    figure = Figure(figsize=(3 * columns, 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for dim, panel in enumerate(panels[:dims]):
        panel.plot(steps, actions[1, valid, dim], color="black", label="recorded")
        panel.plot(steps, actions[0, valid, dim], color="tab:orange", label="sampled")
        panel.set_title(f"action {dim}, normalised", fontsize=8)
    for panel in panels[dims:]:
        panel.set_visible(False)
    panels[0].legend(fontsize=7)
    return figure
