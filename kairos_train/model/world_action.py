"""The world-action model: video and action streams, joined layer by layer (model specification, "Modes").

Shapes: B batch, C latent channels, F latent frames, L tokens per frame, S = F·L, A actions, N context tokens, D width,
H heads, E head width, K history frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kairos_train.config.schema import KernelsConfig, ModelConfig
from kairos_train.errors import UserError
from kairos_train.model import attention
from kairos_train.model.initialise import initialise
from kairos_train.model.seams import Seams, SingleDevice
from kairos_train.model.streams import ActionStream, VideoStream, layer_kinds
from kairos_train.model.windows import WindowRule


class ModelOutput(NamedTuple):
    """Velocities: video (B, C, F, H, W); action (B, A, action_dim), None without actions."""

    video: Tensor
    action: Tensor | None


@dataclass
class HistoryCache:
    """Keys and values of the history frames at every joint layer, (B, K·L, H, E) each; None at GATED layers."""

    layers: list[tuple[Tensor, Tensor] | None]


class WorldActionModel(nn.Module):
    """Mixture-of-Transformers of a video and (unless `config.action` is None) an action stream.

    `state_dict()` keys are those of the public checkpoints (`video_dit.…`, `action_dit.…`).

    Args:
        config: sizes, layer kinds and window rules.
        kernels: which implementation computes windows and recurrences.
        seams: what a parallel layout replaces; everything on one device by default.
    """

    def __init__(
        self, config: ModelConfig, kernels: KernelsConfig | None = None, *, seams: Seams | None = None
    ) -> None:
        super().__init__()
        kernels, seams = kernels or KernelsConfig(), seams or SingleDevice()
        self.config = config
        self.attention_backend = attention.select_backend(kernels.attention)
        self.kinds = layer_kinds(config)
        self.rules = [None if kind == "GATED" else WindowRule.of(kind, config.video) for kind in self.kinds]
        self.video_dit = VideoStream(config, seams, kernels.gated_delta)
        self.action_dit = None if config.action is None else ActionStream(config, seams)
        initialise(self)

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
            latents: (B, C, F, H, W), the first K frames of each sample clean.
            context: (B, N, text_dim).
            context_mask: bool (B, N), true where there is a token; None: everywhere.
            video_timestep: σ·1000 per sample (B,), float32; history frames get 0.
            history_frames: K of each sample, length B.
            state: normalised proprioception (B, 1, state_dim), one more context token of both streams.
            action: noisy normalised actions (B, A, action_dim).
            action_timestep: σ·1000 per sample (B,).
            action_mask: bool (B, A), false on padded actions, which are no keys; None: all valid.
        """
        history = self._check_history(latents, history_frames)
        context, context_mask = self._with_state(context, context_mask, state)
        video = _VideoPass(self, latents, context, context_mask, video_timestep, history)
        actions = None
        if action is not None:
            actions = _ActionPass(self, action, action_timestep, context, context_mask, action_mask)
        for layer, kind in enumerate(self.kinds):
            keys = video.layer(layer)
            if actions is not None:
                actions.layer(layer, None if kind == "GATED" else _history_keys(keys, history, video.tokens))
        return ModelOutput(video.finish(), None if actions is None else actions.finish())

    def encode_history(
        self, latents: Tensor, context: Tensor, context_mask: Tensor | None, *, state: Tensor | None = None
    ) -> HistoryCache:
        """Run the video stream once on K clean history frames (B, C, K, H, W) at timestep 0 and keep keys and values.

        Raises:
            UserError: this model's history keys depend on the noisy frames, so that a cache would not be exact.
        """
        rules = self.config.video
        if not rules.restrict_history_query_to_history or rules.window_semantics == "token":
            raise UserError(
                "action with cache needs model.video.restrict_history_query_to_history=true and "
                "window_semantics=frame: otherwise history keys depend on the noise; use mode joint"
            )
        history = (latents.shape[2],) * latents.shape[0]
        context, context_mask = self._with_state(context, context_mask, state)
        video = _VideoPass(self, latents, context, context_mask, latents.new_zeros(len(history)).float(), history)
        return HistoryCache([video.layer(layer) for layer in range(len(self.kinds))])

    def forward_action(
        self,
        cache: HistoryCache,
        action: Tensor,
        action_timestep: Tensor,
        context: Tensor,
        context_mask: Tensor | None,
        *,
        state: Tensor | None = None,
        action_mask: Tensor | None = None,
    ) -> Tensor:
        """The action stream alone on cached history: velocity (B, A, action_dim), equal to mode `joint`'s."""
        context, context_mask = self._with_state(context, context_mask, state)
        actions = _ActionPass(self, action, action_timestep, context, context_mask, action_mask)
        for layer, keys in enumerate(cache.layers):
            actions.layer(layer, None if keys is None else (*keys, None))
        return actions.finish()

    def _check_history(self, latents: Tensor, history_frames: Sequence[int]) -> tuple[int, ...]:
        history = tuple(int(k) for k in history_frames)
        batch, frames = latents.shape[0], latents.shape[2]
        if len(history) != batch or not all(0 <= k <= frames for k in history):
            raise UserError(f"history_frames={list(history)}: need {batch} numbers from 0 to {frames} latent frames")
        return history

    def _with_state(self, context: Tensor, mask: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Append the state token, whose mask is true, to the context."""
        context = context.to(self.video_dit.text_embedding[0].weight.dtype)
        if state is None:
            return context, mask
        if self.action_dit is None:
            raise UserError("a robot state was given to a model without an action stream (model.action is null)")
        token = self.action_dit.proprio_encoder(state.to(context.dtype))
        mask = None if mask is None else torch.cat([mask, mask.new_ones(*token.shape[:2])], dim=1)
        return torch.cat([context, token], dim=1), mask


class _VideoPass:
    """One forward of the video stream, layer by layer."""

    def __init__(
        self,
        model: WorldActionModel,
        latents: Tensor,
        context: Tensor,
        context_mask: Tensor | None,
        timestep: Tensor,
        history: tuple[int, ...],
    ) -> None:
        stream = model.video_dit
        self.model, self.stream, self.history, self.context_mask = model, stream, history, context_mask
        _, _, self.frames, self.height, self.width = latents.shape
        self.x = stream.patchify(latents)
        self.tokens = self.x.shape[2]
        self.time, self.modulation = stream.embed_time(stream.frame_times(timestep, history, self.frames))
        self.context = stream.text_embedding(context)
        self.rotation = stream.rotation(self.frames, self.height, self.width, self.x)

    def layer(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Run layer `index`; returns its keys and values (B, S, H, E), None at a GATED layer."""
        block, rule = self.stream.blocks[index], self.model.rules[index]
        factors = block.factors(self.modulation)
        h, keys = block.enter(self.x, factors), None
        if rule is None:
            attended = block.gated_delta(h)
        else:
            q, k, v = block.self_attn.project(h, h, self.rotation)
            grid = [x.unflatten(1, (self.frames, self.tokens)) for x in (q, k, v)]
            out = attention.window_attention(
                *grid, rule=rule, history=self.history, backend=self.model.attention_backend
            )
            attended, keys = block.self_attn.o(out.flatten(2)), (k, v)
        self.x = block.leave(self.x, attended, factors, self.context, self.context_mask)
        return keys

    def finish(self) -> Tensor:
        return self.stream.unpatchify(self.stream.head(self.x, self.time), self.height, self.width)


class _ActionPass:
    """One forward of the action stream, layer by layer."""

    def __init__(
        self,
        model: WorldActionModel,
        action: Tensor,
        timestep: Tensor | None,
        context: Tensor,
        context_mask: Tensor | None,
        action_mask: Tensor | None,
    ) -> None:
        if model.action_dit is None or timestep is None:
            raise UserError(
                "actions need a model with an action stream (model.action) and an action timestep per sample"
            )
        self.stream, self.context_mask = model.action_dit, context_mask
        encoder = self.stream.action_encoder
        self.x = encoder(action.to(encoder.weight.dtype))[:, None]  # (B, 1, A, D)
        self.modulation = self.stream.embed_time(timestep)
        self.context = self.stream.text_embedding(context)
        self.rotation = self.stream.rotation(action.shape[1], self.x)
        self.mask = None
        if action_mask is not None:
            # A sample without any valid action still needs a key: its outputs carry no loss, but must be finite.
            self.mask = action_mask | ~action_mask.any(1, keepdim=True)

    def layer(self, index: int, history: tuple[Tensor, Tensor, Tensor | None] | None) -> None:
        """Run layer `index`; `history` holds video keys, values (B, M, H, E) and their mask (B, M) or None."""
        block = self.stream.blocks[index]
        factors = block.factors(self.modulation)
        h = block.enter(self.x, factors)
        q, k, v = block.self_attn.project(h, h, self.rotation)
        mask = self.mask
        if history is not None and history[0].shape[1]:
            keys, values, seen = history
            if mask is not None or seen is not None:
                own = k.new_ones(k.shape[:2], dtype=torch.bool) if mask is None else mask
                seen = keys.new_ones(keys.shape[:2], dtype=torch.bool) if seen is None else seen
                mask = torch.cat([seen, own], dim=1)
            k, v = torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1)
        out = attention.scaled_dot_product(q, k, v, None if mask is None else mask[:, None, None, :])
        self.x = block.leave(self.x, block.self_attn.o(out.flatten(2)), factors, self.context, self.context_mask)

    def finish(self) -> Tensor:
        return self.stream.head(self.x[:, 0])


def _history_keys(
    keys: tuple[Tensor, Tensor], history: tuple[int, ...], tokens: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values of the first max(K) frames, and which of them are a sample's own history (None: all)."""
    most = max(history)
    k, v = (x[:, : most * tokens] for x in keys)
    if min(history) == most:
        return k, v, None
    known = torch.tensor(history, device=k.device)[:, None] * tokens
    return k, v, torch.arange(most * tokens, device=k.device) < known
