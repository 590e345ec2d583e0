"""The world-action model: video and action streams, joined layer by layer (model specification, "Modes").

Shapes: B batch, C latent channels, F latent frames, L tokens per frame, A actions, N context tokens, D width, H heads,
E head width, K history frames, Fk key frames at hand.
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
from kairos_train.model.kernels import attention
from kairos_train.model.kernels.windows import WindowSpec, frames_read
from kairos_train.model.precision import dtype_of
from kairos_train.model.streams import ActionStream, VideoStream, layer_kinds

Keys = tuple[Tensor, Tensor]
"""Keys and values of the frames at hand, (B, Fk, L, H, E) each."""


class ModelOutput(NamedTuple):
    """Velocities of the frames held here (B, C, F, H, W) and of the actions (B, A, action_dim).

    Without actions `action` is None; but a joint model in training gives one of a dummy (1, 1, action_dim), which
    belongs into the loss as 0.0 · sum.
    """

    video: Tensor
    action: Tensor | None


@dataclass
class HistoryCache:
    """Keys and values of the history frames at every joint layer, (B, K·L, H, E) each; None at GATED layers."""

    layers: list[tuple[Tensor, Tensor] | None]


@dataclass
class ActionContext:
    """What the action stream reads of the text and the state, at every layer, with the mask (B, N)."""

    layers: list[Keys]
    mask: Tensor | None


class WorldActionModel(nn.Module):
    """Mixture-of-Transformers of a video and (unless `config.action` is None) an action stream.

    `state_dict()` keys are those of the public checkpoints (`video_dit.…`, `action_dit.…`).

    Args:
        config: sizes, layer kinds and window rules.
        kernels: which implementation computes windows and recurrences.
        hooks: what a parallel layout changes; one device by default.
        activations: what is kept for the backward pass.

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
        self.config, self.hooks, self.activations = config, hooks, activations or ActivationPolicy()
        self.attention_backend = attention.select_backend(kernels.attention)
        self.kinds = layer_kinds(config)
        self.rules = [None if kind == "GATED" else WindowSpec.of(kind, config.video) for kind in self.kinds]
        self.video_dit = VideoStream(config, hooks.video, kernels.gated_delta)
        self.action_dit = None if config.action is None else ActionStream(config, hooks.action)
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
            latents: whole samples (B, C, F, H, W), the first K frames of each clean.
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
        everything = self.training and self.action_dit is not None  # parameters that this batch leaves unused as well
        context, context_mask = self.with_state(context, context_mask, state)
        if everything and state is None:
            context = context + self._dummy_state(context)
        shared = 0 if action is None else max(history)
        video = _VideoPass(self, latents, context, context_mask, video_timestep, history, shared)
        actions = None
        if action is not None:
            actions = _ActionPass(self, action, action_timestep, context, context_mask, action_mask)
        elif everything:
            actions = self._dummy_actions(context)
        with self.hooks.autocast():
            for layer in range(len(self.kinds)):
                keys = video.layer(layer)
                if actions is not None:
                    joined = None if keys is None or action is None else _history_keys(keys, history)
                    actions.layer(layer, joined)
        return ModelOutput(video.finish(), None if actions is None else actions.finish())

    def local_frames(self, frames: int) -> range:
        """The frames of a sample of `frames` frames that this rank holds, and `forward` gives velocities of."""
        return self.hooks.video.local_frames(frames)

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
        context, context_mask = self.with_state(context, context_mask, state)
        clean = latents.new_zeros(len(history)).float()
        video = _VideoPass(self, latents, context, context_mask, clean, history, latents.shape[2])
        # What comes after the last joint layer gives no keys, and nothing else is asked for.
        joint = max((layer for layer, rule in enumerate(self.rules) if rule is not None), default=-1) + 1
        layers = [video.layer(layer) for layer in range(joint)] + [None] * (len(self.rules) - joint)
        return HistoryCache(
            [None if keys is None else (keys[0].flatten(1, 2), keys[1].flatten(1, 2)) for keys in layers]
        )

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
            context: as for `forward`; or what `encode_action_context` made of it, the mask and the state.
        """
        if isinstance(context, Tensor):
            context, context_mask = self.with_state(context, context_mask, state)
        actions = _ActionPass(self, action, action_timestep, context, context_mask, action_mask)
        for layer, keys in enumerate(cache.layers):
            actions.layer(layer, None if keys is None else (*keys, None))
        return actions.finish()

    def encode_action_context(
        self, context: Tensor, context_mask: Tensor | None, *, state: Tensor | None = None
    ) -> ActionContext:
        """What stays the same of the text from one denoising step of the actions to the next."""
        context, mask = self.with_state(context, context_mask, state)
        embedded = self.action_dit.embed_context(context)
        return ActionContext([block.cross_attn.context_keys(embedded) for block in self.action_dit.blocks], mask)

    def _dummy_actions(self, context: Tensor) -> _ActionPass:
        """One token of zeros through the action stream.

        On a rank whose samples have no actions the action stream's parameters still take part in the backward pass, at
        the same places as elsewhere: ZeRO reduces gradients in the order in which they come, and ZeRO 3 gathers weights
        in the order in which modules ran, the outermost one's outputs included, and frees them where gradients went
        through: so the context is a real one, of which gradients are wanted.
        """
        token = context.new_zeros(1, 1, self.config.action.action_dim)
        return _ActionPass(self, token, token.new_zeros(1).float(), context[:1], None, None)

    def _dummy_state(self, like: Tensor) -> Tensor:
        """Exactly zero, but a function of the state encoder; see `_dummy_actions`."""
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


class _VideoPass:
    """One forward of the video stream, layer by layer.

    Args:
        shared: of the first so many frames, the keys are wanted on every rank (for actions).
    """

    def __init__(
        self,
        model: WorldActionModel,
        latents: Tensor,
        context: Tensor,
        context_mask: Tensor | None,
        timestep: Tensor,
        history: tuple[int, ...],
        shared: int,
    ) -> None:
        stream, self.frames = model.video_dit, latents.shape[2]
        self.model, self.stream, self.history, self.context_mask = model, stream, history, context_mask
        self.shared = tuple(range(shared))
        self.height, self.width = latents.shape[-2:]
        here = model.local_frames(self.frames)
        self.x = stream.patchify(latents[:, :, here.start : here.stop])  # (B, F, l, D)
        times = stream.frame_times(timestep, history, self.frames)[:, here.start : here.stop]
        self.time, self.modulation = stream.embed_time(times)
        self.context = stream.embed_context(context)
        self.rotations: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def layer(self, index: int) -> Keys | None:
        """Run layer `index`; returns keys and values (B, Fk, L, H, E) at hand, None at a GATED layer."""
        block, rule = self.stream.blocks[index], self.model.rules[index]

        def run(x: Tensor, time: Tensor, context: Tensor) -> tuple[Tensor, Keys | None]:
            keys: list[Keys] = []

            def gated(h: Tensor) -> Tensor:
                return block.gated_delta(h, self.frames)

            def windowed(h: Tensor) -> Tensor:
                attended, at_hand = self._attend(block.self_attn, rule, h)
                keys.append(at_hand)
                return attended

            x = block(x, time, gated if rule is None else windowed, context, self.context_mask)
            return x, keys[0] if keys else None

        self.x, keys = self.model.activations.run(run, self.x, self.modulation, self.context)
        return keys

    def finish(self) -> Tensor:
        return self.stream.unpatchify(self.stream.head(self.x, self.time), self.height, self.width)

    def _attend(self, layer: attention.Attention, rule: WindowSpec, h: Tensor) -> tuple[Tensor, Keys]:
        """Windowed self-attention of h (B, F, l, D), wherever its frames are computed."""
        exchange = layer.hooks.exchange_frames(
            self.frames,
            frames_read(rule, self.frames, self.history),
            self.shared,
            period=rule.step(self.frames),
            hidden=h.shape[2] * h.shape[3],
            kv=2 * self.stream.tokens(self.height, self.width) * layer.heads * layer.head_dim,
        )
        h = layer.hooks.enter_heads(exchange.move(h))
        if exchange.query_frames not in self.rotations:
            self.rotations[exchange.query_frames] = self.stream.rotation(
                exchange.query_frames, self.height, self.width, h
            )
        q, k, v = layer.project(h, h, self.rotations[exchange.query_frames])
        k, v = exchange.collect(k, v)
        windows = attention.Windows(rule, self.history, self.frames, exchange.query_frames, exchange.key_frames)
        out = attention.window_attention(q, k, v, windows=windows, backend=self.model.attention_backend)
        return exchange.restore(layer.finish(out, h)), (k, v)


class _ActionPass:
    """One forward of the action stream, layer by layer."""

    def __init__(
        self,
        model: WorldActionModel,
        action: Tensor,
        timestep: Tensor | None,
        context: Tensor | ActionContext,
        context_mask: Tensor | None,
        action_mask: Tensor | None,
    ) -> None:
        if model.action_dit is None or timestep is None:
            raise UserError(
                "actions need a model with an action stream (model.action) and an action timestep per sample"
            )
        self.model, self.stream = model, model.action_dit
        encoder = self.stream.action_encoder
        self.x = encoder(action.to(dtype_of(encoder)))[:, None]  # (B, 1, A, D)
        self.modulation = self.stream.embed_time(timestep)
        if isinstance(context, Tensor):
            self.contexts = [self.stream.embed_context(context)] * len(model.kinds)
            self.context_mask = context_mask
        else:
            self.contexts, self.context_mask = context.layers, context.mask
        self.rotation = self.stream.rotation(action.shape[1], self.x)
        self.mask = None
        if action_mask is not None:
            # A sample without any valid action still needs a key: its outputs carry no loss, but must be finite.
            self.mask = action_mask | ~action_mask.any(1, keepdim=True)

    def layer(self, index: int, history: tuple[Tensor, Tensor, Tensor | None] | None) -> None:
        """Run layer `index`; `history` holds video keys, values (B, M, H, E) and their mask (B, M) or None."""
        block = self.stream.blocks[index]
        keys, values, seen = (None, None, None) if history is None else history

        def run(x: Tensor, time: Tensor, context: Tensor | Keys, keys: Tensor | None, values: Tensor | None) -> Tensor:
            def attend(h: Tensor) -> Tensor:
                return self._attend(block.self_attn, h, keys, values, seen)

            return block(x, time, attend, context, self.context_mask)

        self.x = self.model.activations.run(run, self.x, self.modulation, self.contexts[index], keys, values)

    def finish(self) -> Tensor:
        return self.stream.head(self.x[:, 0])

    def _attend(
        self, layer: attention.Attention, h: Tensor, keys: Tensor | None, values: Tensor | None, seen: Tensor | None
    ) -> Tensor:
        """Attention of h (B, 1, A, D) on the actions and the video keys (B, M, H, E) that `seen` (B, M) shows."""
        h = layer.hooks.enter_heads(h)
        q, k, v = (x.flatten(1, 2) for x in layer.project(h, h, self.rotation))
        mask = self.mask
        if keys is not None and keys.shape[1]:
            if mask is not None or seen is not None:
                own = k.new_ones(k.shape[:2], dtype=torch.bool) if mask is None else mask
                seen = keys.new_ones(keys.shape[:2], dtype=torch.bool) if seen is None else seen
                mask = torch.cat([seen, own], dim=1)
            k, v = torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1)
        out = attention.scaled_dot_product(q, k, v, None if mask is None else mask[:, None, None, :])
        return layer.finish(out, h)


def _history_keys(keys: Keys, history: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values (B, M, H, E) of the first max(K) frames, and which are a sample's own history (None: all).

    Keys are at hand in the order of their frames, and those of all history frames are.
    """
    most, tokens = max(history), keys[0].shape[2]
    # Copies: a view would keep the keys of all frames alive from here to its layer's backward pass.
    k, v = (x[:, :most].flatten(1, 2).clone() for x in keys)
    if min(history) == most:
        return k, v, None
    known = torch.tensor(history, device=k.device)[:, None] * tokens
    return k, v, torch.arange(most * tokens, device=k.device) < known
