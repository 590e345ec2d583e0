"""The world-action model: video and action streams, joined layer by layer (model specification, "Modes").

Shapes: B batch, C latent channels, F latent frames, L tokens per frame, A actions, N context tokens, D width, H heads,
E head width, K history frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kairos_train.basics.errors import UserError
from kairos_train.config.schema import KernelsConfig, ModelConfig
from kairos_train.model.activations import ActivationPolicy
from kairos_train.model.hooks import ModelHooks, single_device
from kairos_train.model.initialise import initialise
from kairos_train.model.kernels.attention import KeyValue
from kairos_train.model.passes import ActionContext, ActionPass, ClipPass, history_keys
from kairos_train.model.precision import dtype_of
from kairos_train.model.streams import ActionStream, VideoStream, layer_kinds


class ModelOutput(NamedTuple):
    """Velocities of the local frames (B, C, F, H, W) and of the actions (B, A, action_dim).

    Without actions `action` is None; but a model with both streams returns that of a dummy (1, 1, action_dim) while it
    trains, which belongs into the loss as 0.0 · sum.
    """

    video: Tensor
    action: Tensor | None


@dataclass
class HistoryCache:
    """Keys and values (B, K·L, H, E) of the history frames at each cross-stream layer, None at Gated DeltaNet ones."""

    layers: list[KeyValue | None]


class WorldActionModel(nn.Module):
    """Mixture-of-Transformers of a video and (unless `config.action` is None) an action stream.

    `state_dict()` keys are those of the public checkpoints (`video_dit.…`, `action_dit.…`).

    Args:
        config: sizes, layer kinds and windows.
        kernels: which implementation computes windows and recurrences.
        hooks: what a parallel layout changes; one device by default.
        activations: what layers keep for the backward pass.

    Weights follow from torch's seed and their names (`initialise`); on the meta device they are left out.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: KernelsConfig | None = None,
        *,
        hooks: ModelHooks | None = None,
        activations: ActivationPolicy | None = None,
    ) -> None:
        super().__init__()
        kernels, hooks = kernels or KernelsConfig(), hooks or single_device()
        activations = activations or ActivationPolicy()
        self.config, self.hooks, self.kinds = config, hooks, layer_kinds(config)
        self.video_dit = VideoStream(config, hooks.video, kernels, activations)
        self.action_dit = None if config.action is None else ActionStream(config, hooks.action, activations)
        if not self.video_dit.head.modulation.is_meta:
            initialise(self, torch.initial_seed())

    def forward(
        self,
        latents: Tensor,
        context: Tensor,
        context_mask: Tensor | None,
        video_timestep: Tensor,
        history_frames: Sequence[int],
        *,
        state: Tensor | None = None,
        action: Tensor | None = None,
        action_timestep: Tensor | None = None,
        action_mask: Tensor | None = None,
    ) -> ModelOutput:
        """Mode `video`, or mode `joint` when `action` is given.

        Args:
            latents: whole samples (B, C, F, H, W), the first K frames of each clean (history).
            context: (B, N, text_dim).
            context_mask: bool (B, N), true where there is a token; None: all are tokens.
            video_timestep: σ·1000 per sample (B,), float32; history frames get 0.
            history_frames: K of each sample, length B.
            state: normalised proprioception (B, 1, state_dim), one more context token of both streams.
            action: noisy normalised actions (B, A, action_dim).
            action_timestep: σ·1000 per sample (B,).
            action_mask: bool (B, A), false on padded actions, which are no keys; None: all valid.
        """
        history = self._check_history(latents, history_frames)
        everything = self.training and self.action_dit is not None  # also parameters that this batch does not use
        context, context_mask = self.with_state(context, context_mask, state)
        if everything and state is None:
            context = context + self._dummy_state(context)
        shared = 0 if action is None else max(history)
        video = ClipPass(self.video_dit, latents, context, context_mask, video_timestep, history, shared)
        actions = None
        if action is not None:
            actions = ActionPass(self.action_dit, action, action_timestep, context, context_mask, action_mask)
        elif everything:
            actions = self._dummy_actions(context)
        with self.hooks.autocast():
            for layer in range(len(self.kinds)):
                kv = video.layer(layer, video.context)
                if actions is not None:
                    joined = None if kv is None or action is None else history_keys(kv, history)
                    actions.layer(layer, joined)
        return ModelOutput(video.finish(), None if actions is None else actions.finish())

    def local_frames(self, frames: int) -> range:
        """Of a sample's `frames` frames, those on this rank, of which `forward` returns velocities."""
        return self.hooks.video.local_frames(frames)

    def encode_history(
        self, latents: Tensor, context: Tensor, context_mask: Tensor | None, *, state: Tensor | None = None
    ) -> HistoryCache:
        """Run the video stream once on K clean history frames (B, C, K, H, W) at timestep 0: their KV cache.

        Raises:
            UserError: this model's history keys depend on the noisy frames, so that a cache would not be exact.
        """
        config = self.config.video
        if not config.restrict_history_query_to_history or config.window_semantics == "token":
            raise UserError(
                "action with cache needs model.video.restrict_history_query_to_history=true and "
                "window_semantics=frame: otherwise history keys depend on the noise; use mode joint"
            )
        history = (latents.shape[2],) * latents.shape[0]
        context, context_mask = self.with_state(context, context_mask, state)
        clean = latents.new_zeros(len(history)).float()
        video = ClipPass(self.video_dit, latents, context, context_mask, clean, history, latents.shape[2])
        # Layers behind the last cross-stream layer have no keys, and callers need nothing else of them.
        specs = self.video_dit.window_specs
        count = max((layer for layer, spec in enumerate(specs) if spec is not None), default=-1) + 1
        layers = [video.layer(layer, video.context) for layer in range(count)] + [None] * (len(specs) - count)
        return HistoryCache([None if kv is None else kv.map(lambda x: x.flatten(1, 2)) for kv in layers])

    def forward_action(
        self,
        cache: HistoryCache,
        action: Tensor,
        action_timestep: Tensor,
        context: Tensor | ActionContext,
        context_mask: Tensor | None = None,
        *,
        state: Tensor | None = None,
        action_mask: Tensor | None = None,
    ) -> Tensor:
        """The action stream alone on cached history: velocity (B, A, action_dim), equal to mode `joint`'s.

        Args:
            context: as for `forward`; or the result of `encode_action_context`, which includes mask and state.
        """
        if isinstance(context, Tensor):
            context, context_mask = self.with_state(context, context_mask, state)
        actions = ActionPass(self.action_dit, action, action_timestep, context, context_mask, action_mask)
        for layer, kv in enumerate(cache.layers):
            actions.layer(layer, None if kv is None else (kv, None))
        return actions.finish()

    def encode_action_context(
        self, context: Tensor, context_mask: Tensor | None, *, state: Tensor | None = None
    ) -> ActionContext:
        """Keys and values of the context, which stay the same from one denoising step of the actions to the next."""
        context, mask = self.with_state(context, context_mask, state)
        embedded = self.action_dit.embed_context(context)
        return ActionContext([block.cross_attn.context_keys(embedded) for block in self.action_dit.blocks], mask)

    def _dummy_actions(self, context: Tensor) -> ActionPass:
        """One token of zeros through the action stream.

        On a rank whose samples have no actions the action stream's parameters still take part in the backward pass, at
        the same points as on other ranks: ZeRO reduces gradients in the order in which they arrive, and ZeRO 3 gathers
        weights in the order in which modules ran, the outputs of the outermost one included, and frees them once
        gradients have passed. So the context is a real one, which needs gradients.
        """
        token = context.new_zeros(1, 1, self.config.action.action_dim)
        return ActionPass(self.action_dit, token, token.new_zeros(1).float(), context[:1], None, None)

    def _dummy_state(self, like: Tensor) -> Tensor:
        """Exactly zero, but with gradients for the state encoder; see `_dummy_actions`."""
        state = like.new_zeros(1, 1, self.config.action.state_dim)
        return 0.0 * self.action_dit.proprio_encoder(state).sum()

    def _check_history(self, latents: Tensor, history_frames: Sequence[int]) -> tuple[int, ...]:
        history = tuple(int(k) for k in history_frames)
        batch, frames = latents.shape[0], latents.shape[2]
        if len(history) != batch or not all(0 <= k <= frames for k in history):
            raise UserError(f"history_frames={list(history)}: need {batch} numbers from 0 to {frames} latent frames")
        return history

    def with_state(self, context: Tensor, mask: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Append the state token, whose mask is true, to the context."""
        context = context.to(dtype_of(self.video_dit.text_embedding))
        if state is None:
            return context, mask
        if self.action_dit is None:
            raise UserError("a robot state was given to a model without an action stream (model.action is null)")
        token = self.action_dit.proprio_encoder(state.to(context.dtype))
        mask = None if mask is None else torch.cat([mask, mask.new_ones(*token.shape[:2])], dim=1)
        return torch.cat([context, token], dim=1), mask
