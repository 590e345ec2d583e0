"""Sampling of both streams (model specification, "Objective and schedule" and "Modes").

Shapes: B batch, C latent channels (16), K history latent frames, F latent frames (history included), H W latent height
and width, N context tokens, A actions, D action dimensions.

Every stream walks down its own shifted schedule, z ← z + V·(σ_next − σ), the last σ_next being 0. A distilled model
takes fixed steps instead: to x₀ = z − σV and noised again, z ← (1 − σ_next)x₀ + σ_next·ε, the last one to x₀. The
integration is float32 whatever the weights' precision. Noise is drawn per sample on the CPU in float32 from the
sample's own seed, so it depends neither on the device nor on the batch that a sample happens to sit in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kairos_train.basics.errors import UserError
from kairos_train.model import HistoryCache
from kairos_train.objective import schedule

MODES = ("video", "joint", "action")
SCHEDULES = ("shifted", "distilled")
CHOICES = {"schedule": SCHEDULES, "renoise": ("fresh", "same"), "timestep_dtype": ("float32", "bfloat16")}


@dataclass(frozen=True)
class SamplerConfig:
    """How a model is sampled; saved as `sampler.json` in an export.

    `shifted` takes `steps` uniform steps under the shape-aware shift (video) and `action_shift` (action). `distilled`
    takes the four fixed times of the distilled model under its constant shift on both streams, without guidance;
    `steps`, `action_shift` and `guidance` must then say so.
    """

    schedule: str = "shifted"  # shifted | distilled
    steps: int = 10
    guidance: float = 5.0  # CFG scale of the video; 1: the positive branch alone
    action_shift: float = 5.0
    negative_prompt: str | None = None  # null: context zeros, mask kept; text: encoded without image, "" included
    renoise: str = (
        "fresh"  # fresh | same: noise of each distilled step (the public sampler with a seed: the first again)
    )
    timestep_dtype: str = "float32"  # float32 | bfloat16 (as the public pipelines round what the model is given)

    def check(self) -> SamplerConfig:
        """Return self.

        Raises:
            UserError: a setting that is out of range or does not fit the schedule.
        """
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"sampler.{name}={getattr(self, name)!r}: must be one of {', '.join(known)}")
        if type(self.steps) is not int or not 1 <= self.steps <= schedule.TRAINING_STEPS:
            raise UserError(
                f"sampler.steps={str(self.steps)[:40]}: must be a whole number from 1 to {schedule.TRAINING_STEPS}, the"
                " times that training knows"
            )
        if self.schedule == "distilled":
            fixed = {"steps": len(schedule.DISTILLED_TIMES), "action_shift": schedule.DISTILLED_SHIFT, "guidance": 1.0}
            for name, value in fixed.items():
                if getattr(self, name) != value:
                    raise UserError(f"sampler.{name}={getattr(self, name)}: a distilled schedule has {value}; set that")
        if not 0 < self.action_shift < math.inf:
            raise UserError(f"sampler.action_shift={self.action_shift}: must be above 0; the default is 5")
        if not 0 <= self.guidance < math.inf:
            raise UserError(f"sampler.guidance={self.guidance}: must be at least 0; 1 switches guidance off")
        return self

    def replaced(self, **changes: Any) -> SamplerConfig:
        """A checked copy; changes that are None keep the present value."""
        return dataclasses.replace(self, **{k: v for k, v in changes.items() if v is not None}).check()


@dataclass(frozen=True)
class Conditions:
    """What one batch is sampled under. All tensors on one device.

    Attributes:
        context: (B, N, text_dim) encoded prompts, without the state token (the model appends it).
        context_mask: (B, N) bool, true where a token is real.
        history: (B, C, K, H, W) clean latents of the given first frames, or None for K = 0.
        state: (B, 1, state_dim) normalised proprioception, or None: no state token.
        negative: context and mask of an encoded negative prompt, or None: zeros under the positive prompt's mask.
        action_dim: dimensions of actions that the robot has; the model's further ones stay 0, as in training. None:
            all are.
    """

    context: Tensor
    context_mask: Tensor
    history: Tensor | None = None
    state: Tensor | None = None
    negative: tuple[Tensor, Tensor] | None = None
    action_dim: int | None = None

    @property
    def history_frames(self) -> int:
        return 0 if self.history is None else self.history.shape[2]

    def negative_branch(self) -> tuple[Tensor, Tensor]:
        """Context and mask of the unconditional branch; the state token joins it inside the model, so it stays."""
        if self.negative is not None:
            return self.negative
        return torch.zeros_like(self.context), self.context_mask


@dataclass(frozen=True)
class SampledOutput:
    """Both float32: latents (B, C, F, H, W), None in mode action; normalised actions (B, A, D), None in mode video."""

    latents: Tensor | None
    actions: Tensor | None


def sampling_sigmas(steps: int, shift: float) -> Tensor:
    """σ of `steps` Euler steps with the final 0: float64 (steps + 1,), descending from 1."""
    return _with_zero(schedule.shifted_sigmas(steps, shift))


def distilled_sigmas() -> Tensor:
    """σ of the four distilled steps with the final 0: float64 (5,)."""
    return _with_zero(schedule.distilled_sigmas())


def video_sigmas(config: SamplerConfig, latent_frames: int, tokens_per_frame: int) -> Tensor:
    """The video's σ with the final 0, float64 (steps + 1,); `latent_frames` counts the history, too."""
    if config.schedule == "distilled":
        return distilled_sigmas()
    return sampling_sigmas(config.steps, schedule.video_shift(latent_frames, tokens_per_frame))


def action_sigmas(config: SamplerConfig) -> Tensor:
    """The action's σ with the final 0, float64 (steps + 1,)."""
    return distilled_sigmas() if config.schedule == "distilled" else sampling_sigmas(config.steps, config.action_shift)


def noise(shape: Sequence[int], seeds: Sequence[int], stream: str) -> Tensor:
    """Standard normal noise, float32 on the CPU, (len(seeds), *shape).

    Args:
        shape: one sample's shape.
        seeds: one per sample; equal seeds give equal noise in any batch.
        stream: "video" or "action": independent noise from the same seed, so that modes joint and action agree.
    """
    rows = []
    for seed in seeds:
        digest = hashlib.sha256(f"{stream}:{int(seed)}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rows.append(torch.randn(tuple(shape), generator=generator, dtype=torch.float32))
    return torch.stack(rows)


@dataclass(frozen=True)
class StreamNoise:
    """The noise of one stream of a batch.

    Attributes:
        shape, seeds, stream: as for `noise`.
        device: where it is used.
        skipped: first latent frames that are left out of what is drawn.
        own: of actions, how many dimensions are the robot's: the others are 0; None: all.
    """

    shape: tuple[int, ...]
    seeds: Sequence[int]
    stream: str
    device: torch.device
    skipped: int = 0
    own: int | None = None

    def draw(self, step: int = 0) -> Tensor:
        """What sampling begins with (0), or independent noise for a later step."""
        drawn = noise(self.shape, self.seeds, self.stream if step == 0 else f"{self.stream}:{step}")
        return self.padded((drawn[:, :, self.skipped :] if self.skipped else drawn).to(self.device))

    def padded(self, values: Tensor) -> Tensor:
        """Noise or velocities (…, D) with 0 in the dimensions that the robot does not have."""
        if self.own is None or self.own == values.shape[-1]:
            return values
        return torch.where(torch.arange(values.shape[-1], device=values.device) < self.own, values, 0.0)


def sample(
    model: nn.Module,
    conditions: Conditions,
    *,
    mode: str,
    config: SamplerConfig,
    seeds: Sequence[int],
    latent_shape: tuple[int, int, int] | None = None,
    horizon: int | None = None,
) -> SampledOutput:
    """Sample one batch.

    Args:
        model: a `WorldActionModel` in evaluation mode.
        conditions: prompts, history, state; on the model's device.
        mode: "video", "joint" or "action".
        config: schedule, steps, guidance.
        seeds: one per sample.
        latent_shape: (F, H, W), modes video and joint; F counts the history frames.
        horizon: A, modes joint and action.

    Raises:
        UserError: a mode that this model or these conditions cannot serve.
    """
    check_request(model, conditions, mode=mode, seeds=seeds, latent_shape=latent_shape, horizon=horizon)
    config.check()
    device = conditions.context.device
    actions = None
    if mode != "video":
        shape = (horizon, model.config.action.action_dim)
        actions = StreamNoise(shape, seeds, "action", device, own=conditions.action_dim)
    with torch.no_grad():
        if mode == "action":
            return SampledOutput(latents=None, actions=_denoise_actions(model, conditions, config, actions))
        latents = StreamNoise((model.config.video.latent_channels, *latent_shape), seeds, "video", device)
        return _denoise(model, conditions, config, latents, actions)


def check_request(
    model: nn.Module,
    conditions: Conditions,
    *,
    mode: str,
    seeds: Sequence[int],
    latent_shape: tuple[int, int, int] | None,
    horizon: int | None,
) -> None:
    """Raise UserError for a mode that this model or these conditions cannot serve; arguments as for `sample`."""
    if mode not in MODES:
        raise UserError(f"mode={mode!r}: must be one of {', '.join(MODES)}")
    if len(seeds) != conditions.context.shape[0]:
        raise UserError(f"seeds: {len(seeds)} for a batch of {conditions.context.shape[0]}; give one per sample")
    if mode != "video" and model.config.action is None:
        raise UserError(f"mode={mode!r}: this model has no action stream; use mode 'video'")
    if mode != "video" and not horizon:
        raise UserError(f"mode={mode!r}: needs horizon, the number of actions")
    if mode != "action":
        if latent_shape is None:
            raise UserError(f"mode={mode!r}: needs latent_shape (frames, height, width)")
        if latent_shape[0] <= conditions.history_frames:
            raise UserError(
                f"latent_shape: {latent_shape[0]} latent frames with {conditions.history_frames} of history leave"
                " nothing to sample; ask for more frames"
            )
        return
    if conditions.history is None:
        raise UserError("mode='action': needs the latents of at least one history frame; use mode 'joint' without")


def _denoise(
    model: nn.Module, conditions: Conditions, config: SamplerConfig, latents: StreamNoise, actions: StreamNoise | None
) -> SampledOutput:
    """Modes video and joint: the history frames are part of every pass."""
    history, state = [conditions.history_frames] * len(latents.seeds), conditions.state
    _, frames, height, width = latents.shape

    def positive(z: Tensor, t: Tensor, a: Tensor | None, t_action: Tensor) -> tuple[Tensor, Tensor | None]:
        times = {} if a is None else {"action": a, "action_timestep": t_action}
        return model(z, conditions.context, conditions.context_mask, t, history, state=state, **times)

    def negative(z: Tensor, t: Tensor) -> Tensor:
        return model(z, *conditions.negative_branch(), t, history, state=state).video

    return integrate(
        positive,
        negative,
        config=config,
        sigmas=video_sigmas(config, frames, tokens_per_frame(model, height, width)),
        latents=latents,
        actions=actions,
        history=conditions.history,
    )


def integrate(
    positive: Callable[[Tensor, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor | None]],
    negative: Callable[[Tensor, Tensor], Tensor],
    *,
    config: SamplerConfig,
    sigmas: Tensor,
    latents: StreamNoise,
    actions: StreamNoise | None,
    history: Tensor | None,
) -> SampledOutput:
    """Both streams step together, each at its own σ; only the video is guided.

    Args:
        positive: latents, their timestep (B,), actions or None, their timestep -> velocities of both. The actions come
            from this branch alone, and no video query sees them.
        negative: latents and their timestep -> velocity of the video without the condition.
        sigmas: of the video.
        latents, actions: their noise; no actions in mode video.
        history: stands in the first frames of the latents, before every step, and but for a distilled model in what
            comes out; None when these are no part of them.
    """
    sigmas_a, last = action_sigmas(config), len(sigmas) - 2
    z, a = _put_history_back(latents.draw(), history), None if actions is None else actions.draw()
    for step in range(len(sigmas) - 1):
        t_video, t_action = (_timestep(table[step], z, config) for table in (sigmas, sigmas_a))
        velocity, action_velocity = positive(z, t_video, a, t_action)
        velocity = velocity.float()
        if config.guidance != 1:
            velocity = guided(velocity, negative(z, t_video).float(), config.guidance)
        z = _advance(config, z, velocity, sigmas, step, latents)
        if config.schedule != "distilled" or step < last:  # a student's last step leaves its own frames there
            z = _put_history_back(z, history)
        if a is not None:
            a = _advance(config, a, actions.padded(action_velocity.float()), sigmas_a, step, actions)
    return SampledOutput(latents=z, actions=a)


def _denoise_actions(model: nn.Module, conditions: Conditions, config: SamplerConfig, actions: StreamNoise) -> Tensor:
    """Mode action: the video stream once on the history, then the action stream alone at every step."""
    context, mask, state = conditions.context, conditions.context_mask, conditions.state
    cache = model.encode_history(conditions.history, context, mask, state=state)
    return denoise_actions(model, cache, conditions, config, actions)


def denoise_actions(
    model: nn.Module, cache: HistoryCache, conditions: Conditions, config: SamplerConfig, actions: StreamNoise
) -> Tensor:
    """The action stream alone on cached history, at every step."""
    context = model.encode_action_context(conditions.context, conditions.context_mask, state=conditions.state)
    a, sigmas = actions.draw(), action_sigmas(config)
    for step in range(len(sigmas) - 1):
        velocity = model.forward_action(cache, a, _timestep(sigmas[step], a, config), context)
        a = _advance(config, a, actions.padded(velocity.float()), sigmas, step, actions)
    return a


def tokens_per_frame(model: nn.Module, height: int, width: int) -> int:
    """L of latents of this height and width."""
    _, patch_height, patch_width = model.config.video.patch_size
    return (height // patch_height) * (width // patch_width)


def euler(z: Tensor, velocity: Tensor, sigmas: Tensor, step: int) -> Tensor:
    """One step z + V·(σ_next − σ), float32; `sigmas` ends with 0."""
    return z + velocity * float(sigmas[step + 1] - sigmas[step])


def _advance(
    config: SamplerConfig, z: Tensor, velocity: Tensor, sigmas: Tensor, step: int, source: StreamNoise
) -> Tensor:
    """One step of a stream: Euler, or that of a distilled model with noise out of `source`."""
    if config.schedule != "distilled":
        return euler(z, velocity, sigmas, step)
    clean, following = z - velocity * float(sigmas[step]), float(sigmas[step + 1])
    if step == len(sigmas) - 2:
        return clean
    return (1 - following) * clean + following * source.draw(step + 1 if config.renoise == "fresh" else 0)


def guided(positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance V_neg + g·(V_pos − V_neg)."""
    return negative + guidance * (positive - negative)


def _put_history_back(latents: Tensor, history: Tensor | None) -> Tensor:
    if history is None:
        return latents
    return torch.cat([history.to(latents.dtype), latents[:, :, history.shape[2] :]], dim=2)


def _timestep(sigma: Tensor, z: Tensor, config: SamplerConfig) -> Tensor:
    """σ·1000 as float32 (B,); rounded to bfloat16, by option, it comes in steps of 4 near 1000."""
    t = torch.full((len(z),), float(sigma) * 1000, dtype=torch.float32, device=z.device)
    return t.to(getattr(torch, config.timestep_dtype)).float()


def _with_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])
