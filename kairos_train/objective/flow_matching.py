"""Flow matching on both streams: z_σ = (1 − σ)x + σε, target u = ε − x (model specification, "Objective and schedule").

The loss equation, stated once. Per stream, over the whole global step (every micro-batch of every data rank),

    L = Σ_i w(t_i) · Σ e²  /  Σ_i n_i,

i over samples. Video: e² over the elements of the frames that are not history, n_i their count. Action: per valid step
e² = Σ_d w_d (V − u)²_d with Σ w_d = 1, n_i the valid steps. No counted element at all: 0. The total is
w_video·L_video + w_action·L_action. `LossSums` holds numerator and denominator apart, because the denominator is known
before the forward pass and the numerator is what a rank differentiates.

Shapes: B batch, C channels, F latent frames, H×W, A actions, D action dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kairos_train.config.schema import StageConfig
from kairos_train.objective import schedule
from kairos_train.objective.randomness import Choices, SampleDraw, choose, draw_sample

HISTORY_CONDITIONS = ("ti2v", "i2v")
"""Those that give the first frames."""
WITHOUT_CONTEXT = ("null2v", "n2i")
"""Those whose context is zeroed."""


@dataclass
class ConditionedBatch:
    """A micro-batch as the model takes it, with what the loss needs. Tensors on the training device.

    Attributes:
        latents: noisy, history frames clean (B, C, F, H, W) float32.
        context, context_mask: (B, N, text_dim), bool (B, N); replaced for i2v, zeroed for null2v, and for dropout as
            `stage.cfg_dropout_form` says.
        video_sigma, action_sigma: per sample (B,) float32.
        history: K of each sample.
        video_target: ε − x (B, C, F, H, W) float32.
        video_weight: w(t) per sample (B,) float32.
        action, action_target: (B, A, D) float32; None without actions, like the rest of action_*.
        action_mask: bool (B, A), true on steps that carry loss.
        action_dim_mask: bool (B, D), true on dimensions that a sample has; None: all.
        tokens, flops: of one sample, video and actions; forward and backward.
        state: (B, 1, state_dim).
    """

    keys: list[str]
    latents: Tensor
    context: Tensor
    context_mask: Tensor
    video_sigma: Tensor
    history: list[int]
    video_target: Tensor
    video_weight: Tensor
    state: Tensor | None = None
    action: Tensor | None = None
    action_sigma: Tensor | None = None
    action_target: Tensor | None = None
    action_weight: Tensor | None = None
    action_mask: Tensor | None = None
    action_dim_mask: Tensor | None = None
    tokens: int = 0
    flops: float = 0.0

    def video_elements(self, frames: range | None = None) -> list[int]:
        """n_i of the video: elements that are not history, of all frames or some."""
        frames = range(self.latents.shape[2]) if frames is None else frames
        per_frame = self.latents[0, :, 0].numel()
        return [max(0, frames.stop - max(frames.start, k)) * per_frame for k in self.history]

    def action_steps(self) -> int:
        """Σ n_i of the actions: valid steps."""
        return 0 if self.action_mask is None else int(self.action_mask.sum())

    def model_inputs(self) -> dict:
        """Keyword arguments of `WorldActionModel.forward`."""
        return {
            "latents": self.latents,
            "context": self.context,
            "context_mask": self.context_mask,
            "video_timestep": self.video_sigma * 1000,
            "history_frames": self.history,
            "state": self.state,
            "action": self.action,
            "action_timestep": None if self.action_sigma is None else self.action_sigma * 1000,
            "action_mask": self.action_mask,
        }


@dataclass
class LossSums:
    """Numerators of the loss equation, per sample (B,) float32 and differentiable."""

    video: Tensor
    action: Tensor | None


class FlowMatching:
    """Makes noisy batches and sums their errors for one stage.

    Args:
        stage: conditions, dropout, weighting, shifts.
        seed: of the run.
        patch: patch height and width, for the shape-aware shift's tokens per frame.
    """

    def __init__(self, stage: StageConfig, *, seed: int, patch: tuple[int, int]) -> None:
        self.stage, self.seed, self.patch = stage, seed, patch
        self._tables: dict[float, tuple[Tensor, Tensor]] = {}

    def condition(
        self,
        *,
        keys: list[str],
        step: int,
        latents: Tensor,
        context: Tensor,
        context_mask: Tensor,
        empty_context: Tensor | None = None,
        state: Tensor | None = None,
        actions: Tensor | None = None,
        action_mask: Tensor | None = None,
        action_dim_mask: Tensor | None = None,
    ) -> ConditionedBatch:
        """Draw conditions, σ and noise for every sample and build the model's inputs and targets.

        Args:
            keys: sample keys, length B; with the step and the seed they determine everything drawn.
            latents: clean (B, C, F, H, W) float32.
            context, context_mask: encoded prompts (B, N, text_dim), bool (B, N).
            empty_context: encoding of the empty prompt (M, text_dim), needed by i2v and cfg_dropout_form=empty_prompt.
            state, actions, action_mask: normalised (B, 1, ds), (B, A, D), bool (B, A), or None.
            action_dim_mask: bool (B, D) where samples have fewer dimensions than the model; the others are 0 in what
                the model sees, noise included, and out of the loss. None: all are there.
        """
        draws = [
            draw_sample(
                self.stage,
                seed=self.seed,
                step=step,
                key=key,
                video_shape=latents.shape[1:],
                action_shape=None if actions is None else actions.shape[1:],
            )
            for key in keys
        ]
        device = latents.device
        history = [self.stage.history_frames if d.condition in HISTORY_CONDITIONS else 0 for d in draws]
        context, context_mask = self._contexts(draws, context, context_mask, empty_context)

        height, width = latents.shape[-2] // self.patch[0], latents.shape[-1] // self.patch[1]
        sigmas, weights = self._table(schedule.video_shift(latents.shape[2], height * width))
        video_index = torch.tensor([d.video_index for d in draws])
        sigma = sigmas[video_index].float().to(device)
        noise = torch.stack([d.video_noise for d in draws]).to(device)
        batch = ConditionedBatch(
            keys=keys,
            latents=_noisy(latents, noise, sigma),
            context=context,
            context_mask=context_mask,
            video_sigma=sigma,
            history=history,
            video_target=noise - latents,
            video_weight=weights[video_index].float().to(device),
            state=state,
        )
        for i, known in enumerate(history):
            batch.latents[i, :, :known] = latents[i, :, :known]
        if actions is not None:
            sigmas, weights = self._table(self.stage.action_shift)
            action_index = torch.tensor([d.action_index for d in draws])
            action_noise = torch.stack([d.action_noise for d in draws]).to(device)
            if action_dim_mask is not None:
                action_noise = action_noise * action_dim_mask[:, None]
                batch.action_dim_mask = action_dim_mask
            batch.action_sigma = sigmas[action_index].float().to(device)
            batch.action = _noisy(actions, action_noise, batch.action_sigma)
            batch.action_target = action_noise - actions
            batch.action_weight = weights[action_index].float().to(device)
            batch.action_mask = action_mask
        return batch

    def loss_sums(
        self, batch: ConditionedBatch, video: Tensor, action: Tensor | None, frames: range | None = None
    ) -> LossSums:
        """Σ w·e² per sample, from the model's velocities (B, C, F, H, W) and (B, A, D).

        Args:
            frames: the frames of the sample that `video` holds; None: all. Sums over shares add up to the whole.
        """
        frames = range(batch.latents.shape[2]) if frames is None else frames
        number = torch.arange(frames.start, frames.stop, device=video.device)
        known = torch.tensor(batch.history, device=video.device)
        counted = (number >= known[:, None])[:, None, :, None, None]
        # where, not a product: what history frames hold must not matter even if it is not finite.
        error = torch.where(counted, _float(video) - batch.video_target[:, :, frames.start : frames.stop], 0.0)
        video_sum = batch.video_weight * error.pow(2).flatten(1).sum(1)
        if action is None:
            return LossSums(video_sum, None)
        if batch.action is None:
            return LossSums(video_sum + 0.0 * action.sum(), None)  # of a dummy: it keeps parameters in the graph
        error = torch.where(batch.action_mask[..., None], _float(action) - batch.action_target, 0.0)
        error = error.pow(2) * self._dim_weights(batch, error)[:, None]
        return LossSums(video_sum, batch.action_weight * error.flatten(1).sum(1))

    def choices(self, keys: list[str], *, step: int, frames: int) -> list[Choices]:
        """What `condition` chooses for samples of `frames` latent frames, ahead of it."""
        return [choose(self.stage, seed=self.seed, step=step, key=key, frames=frames) for key in keys]

    def _dim_weights(self, batch: ConditionedBatch, like: Tensor) -> Tensor:
        """w_d of each sample, (B, D), summing to 1 over the dimensions that it has."""
        dims = like.shape[-1]
        weights = torch.tensor(self.stage.action_dim_weights or [1 / dims] * dims).to(like)
        if batch.action_dim_mask is None:
            return weights.expand(len(like), dims)
        own = weights * batch.action_dim_mask
        return own / own.sum(1, keepdim=True)

    def _table(self, shift: float) -> tuple[Tensor, Tensor]:
        """The 1000-step σ of a shift and their loss weights, float64."""
        if shift not in self._tables:
            sigmas = schedule.shifted_sigmas(schedule.TRAINING_STEPS, shift)
            bell = self.stage.loss_weighting == "bell"
            self._tables[shift] = (sigmas, schedule.bell_weights(sigmas) if bell else torch.ones_like(sigmas))
        return self._tables[shift]

    def _contexts(
        self, draws: list[SampleDraw], context: Tensor, mask: Tensor, empty: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Replace the context of i2v samples by the empty prompt's, zero that of null2v, do either to dropped ones."""
        context, mask = context.clone(), mask.clone()
        zeros = self.stage.cfg_dropout_form == "zeros"
        for i, draw in enumerate(draws):
            zeroed = draw.condition in WITHOUT_CONTEXT or (draw.drop_context and zeros)
            if draw.condition == "i2v" or (draw.drop_context and not zeroed):
                if empty is None:
                    raise ValueError("i2v and cfg_dropout_form=empty_prompt need the encoding of the empty prompt")
                if len(empty) > context.shape[1]:
                    grow = len(empty) - context.shape[1]
                    context = torch.nn.functional.pad(context, (0, 0, 0, grow))
                    mask = torch.nn.functional.pad(mask, (0, grow))
                context[i], mask[i] = 0, False
                context[i, : len(empty)], mask[i, : len(empty)] = empty, True
            if zeroed:
                context[i] = 0  # the mask is kept: attention over no key at all would give NaN
        return context, mask


def _float(x: Tensor) -> Tensor:
    """Errors are taken in float32, or wider where the model computes so."""
    return x if x.dtype == torch.float64 else x.float()


def _noisy(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 − σ)x + σε with σ per sample."""
    sigma = sigma.view(-1, *[1] * (clean.ndim - 1))
    return (1 - sigma) * clean + sigma * noise
