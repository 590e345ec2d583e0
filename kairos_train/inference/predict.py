"""Raw observation and prompt in, raw actions (and predicted video) out: the whole path of an exported policy.

Shapes: B batch, T video frames, K history latent frames, F latent frames, H W pixels, h w latent height and width,
A actions, D action dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kairos_train.conditioning.build import build_encoders
from kairos_train.conditioning.interfaces import SPACE_STRIDE, TIME_STRIDE, Encoders, identities_match
from kairos_train.errors import UserError
from kairos_train.inference.load import Policy
from kairos_train.inference.normalization import Normalizer, from_statistics
from kairos_train.inference.sampler import Conditions, Sample, SamplerConfig, sample


@dataclass(frozen=True)
class Prediction:
    """One chunk.

    Attributes:
        actions: (A, D) float32, raw units; None in mode video.
        frames: (T, H, W, 3) uint8 RGB, the given frames included; None in mode action.
    """

    actions: np.ndarray | None
    frames: np.ndarray | None


class Predictor:
    """A policy with its encoders and normalisation.

    Args:
        policy: from `kairos_train.inference.load.load`.
        encoders: as `build_encoders` makes them; None builds those of the policy's configuration.
        sampler: how to sample; None takes the export's `sampler.json`.

    Raises:
        UserError: the encoders are not those the model was trained with.
    """

    def __init__(
        self, policy: Policy, *, encoders: Encoders | None = None, sampler: SamplerConfig | None = None
    ) -> None:
        self.policy = policy
        self.sampler = (sampler or policy.sampler).check()
        if (self.sampler.schedule == "distilled") != (policy.sampler.schedule == "distilled"):
            raise UserError(
                f"sampler.schedule={self.sampler.schedule!r}: this model is sampled {policy.sampler.schedule!r}"
            )
        self.encoders = build_encoders(policy.config.encoders, policy.device) if encoders is None else encoders
        if policy.encoders is not None:
            identities_match(policy.encoders, self.encoders.identity)
        self.action_normalizer = self.state_normalizer = None
        if policy.acts:
            self.action_normalizer, self.state_normalizer = normalizers(policy)

    def prompt(self, instruction: str) -> str:
        """The text the model was trained on for this instruction."""
        return self.policy.config.data.prompt_template.replace("{task}", instruction)

    @torch.no_grad()
    def conditions(
        self,
        *,
        texts: Sequence[str],
        state: np.ndarray | Tensor | None,
        frames: np.ndarray | Tensor | None,
        history: Tensor | None = None,
        context: tuple[Tensor, Tensor] | None = None,
    ) -> Conditions:
        """Encode one batch of observations.

        Args:
            texts: full prompts (see `prompt`), one per sample.
            state: (B, state_dim) or (B, 1, state_dim) raw; None for a model without action stream.
            frames: (B, T, H, W, 3) uint8, the given frames, T = 4·(K − 1) + 1; None with K = 0 or with `history`.
            history: (B, 16, K, h, w) latents already encoded.
            context: (B, N, text_dim) and mask (B, N) already encoded; None encodes `texts` (and the first frame).
        """
        policy = self.policy
        given = policy.history_frames
        if history is None and given:
            history = self.encoders.video.encode(self._frames(frames, given))
        if context is None:
            images = None if frames is None else torch.as_tensor(frames)[:, 0].to(policy.device)
            context = self.encoders.text.encode(list(texts), images)
        negative = None
        if self.sampler.negative_prompt is not None:
            # A negative prompt never sees the image.
            negative = self.encoders.text.encode([self.sampler.negative_prompt] * len(texts), None)
        return Conditions(
            context=context[0].to(policy.device, torch.float32),
            context_mask=context[1].to(policy.device),
            history=None if history is None else history.to(policy.device, torch.float32),
            state=self._state(state),
            negative=None if negative is None else tuple(part.to(policy.device) for part in negative),
        )

    def sample(self, conditions: Conditions, *, mode: str, seeds: Sequence[int]) -> Sample:
        """Latents and normalised actions of one batch; see `kairos_train.inference.sampler.sample`."""
        policy = self.policy
        latent_shape = None
        if mode != "action":
            latent_shape = (policy.latent_frames, *self._latent_size(conditions))
        return sample(
            policy.model,
            conditions,
            mode=mode,
            config=self.sampler,
            seeds=seeds,
            latent_shape=latent_shape,
            horizon=policy.horizon,
        )

    def actions(self, sampled: Sample) -> np.ndarray:
        """Raw actions (B, A, D) float32 of a sample."""
        return self.action_normalizer.unnormalize(sampled.actions).float().cpu().numpy()

    @torch.no_grad()
    def frames(self, sampled: Sample) -> np.ndarray:
        """Decoded video (B, T, H, W, 3) uint8 of a sample."""
        return self.encoders.video.decode(sampled.latents).cpu().numpy()

    def predict(
        self,
        frames: np.ndarray,
        state: np.ndarray | None,
        instruction: str,
        *,
        seed: int,
        mode: str = "action",
    ) -> Prediction:
        """Predict from one observation.

        Args:
            frames: (H, W, 3) or (T, H, W, 3) uint8 RGB at the training window's size, cameras side by side.
            state: (state_dim,) raw; None for a model without action stream.
            instruction: the task in words; the training template is put around it.
            seed: of the noise; give another at every replan.
            mode: "action" (chunk only, cached history), "joint" (chunk and video) or "video".

        Raises:
            UserError: an observation that does not fit the model.
        """
        frames = np.asarray(frames)
        clip = frames[None, None] if frames.ndim == 3 else frames[None]
        conditions = self.conditions(
            texts=[self.prompt(instruction)], state=None if state is None else np.asarray(state)[None], frames=clip
        )
        sampled = self.sample(conditions, mode=mode, seeds=[seed])
        return Prediction(
            actions=None if sampled.actions is None else self.actions(sampled)[0],
            frames=None if sampled.latents is None else self.frames(sampled)[0],
        )

    def _frames(self, frames: np.ndarray | Tensor | None, history_frames: int) -> Tensor:
        if frames is None:
            raise UserError(f"frames=None: this model is given {history_frames} history latent frames; pass pictures")
        clip = torch.as_tensor(frames)
        count = TIME_STRIDE * (history_frames - 1) + 1
        window = self.policy.config.data.window
        if clip.dtype != torch.uint8 or clip.ndim != 5 or clip.shape[-1] != 3:
            raise UserError(f"frames: {clip.dtype} of shape {list(clip.shape)}; must be uint8 (…, T, H, W, 3)")
        if clip.shape[1] != count:
            raise UserError(f"frames: {clip.shape[1]} given; {history_frames} history latent frames take {count}")
        height, width = clip.shape[2:4]
        if height != window.height or width % window.width:
            raise UserError(
                f"frames: {height}×{width} pixels; the model was trained on {window.height}×{window.width} per camera,"
                " cameras side by side; resize first"
            )
        return clip.to(self.policy.device)

    def _state(self, state: np.ndarray | Tensor | None) -> Tensor | None:
        action = self.policy.config.model.action
        if not self.policy.acts:
            return None
        if state is None:
            raise UserError(f"state=None: this model takes a state of {action.state_dim} dimensions; pass it")
        state = torch.as_tensor(state, dtype=torch.float32)
        state = state[:, None] if state.ndim == 2 else state
        if state.ndim != 3 or tuple(state.shape[1:]) != (1, action.state_dim):
            raise UserError(f"state: shape {list(state.shape)}; must be (B, {action.state_dim})")
        return self.state_normalizer.normalize(state).to(self.policy.device)

    def _latent_size(self, conditions: Conditions) -> tuple[int, int]:
        if conditions.history is not None:
            return tuple(conditions.history.shape[-2:])
        window = self.policy.config.data.window
        cameras = max(1, len(window.cameras))
        return window.height // SPACE_STRIDE, window.width * cameras // SPACE_STRIDE


def normalizers(policy: Policy) -> tuple[Normalizer, Normalizer]:
    """Of actions and of the state, from the export's own statistics."""
    data = policy.config.data
    return (
        from_statistics(policy.statistics, group="action", key=data.window.action_key, mode=data.normalize_action),
        from_statistics(policy.statistics, group="state", key=data.window.state_key, mode=data.normalize_state),
    )
