"""One forward pass of each stream, layer by layer (model specification, "Modes").

Shapes: B batch, C latent channels, F latent frames, L tokens per frame, l of them on this rank between layers,
A actions, N context tokens, D width, H heads, E head width, M video keys, Fk frames whose keys this rank has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kairos_train.basics.errors import UserError
from kairos_train.model.block import LayerState
from kairos_train.model.gated_delta_net import GatedDeltaNet, RecurrentState
from kairos_train.model.kernels import attention
from kairos_train.model.kernels.attention import KeyValue
from kairos_train.model.kernels.windows import WindowSpec, frames_read
from kairos_train.model.precision import dtype_of
from kairos_train.model.streams import ActionStream, VideoStream


@dataclass
class ActionContext:
    """Keys and values of text and state for the action stream, at every layer, with the mask (B, N)."""

    layers: list[KeyValue]
    mask: Tensor | None


class VideoPass(ABC):
    """Frames on their way through the video stream, layer by layer; a subclass says what their tokens attend to.

    Args:
        latents: of these frames (B, C, F, H, W).
        times: timestep of each frame (B, F).
        context_mask: as for `WorldActionModel.forward`.

    Attributes:
        x: tokens after the layers so far (B, F, l, D).
    """

    def __init__(self, stream: VideoStream, latents: Tensor, times: Tensor, context_mask: Tensor | None) -> None:
        self.stream, self.context_mask = stream, context_mask
        self.height, self.width = latents.shape[-2:]
        self.x = stream.patchify(latents)
        self.time, self.modulation = stream.embed_time(times)

    def layer(self, index: int, context: Tensor | KeyValue, state: LayerState = None) -> LayerState:
        """Run layer `index`; returns what its attention leaves for other tokens.

        Args:
            context: as `Block.forward` takes it.
            state: what the frames before these left at this layer.
        """
        block, spec = self.stream.blocks[index], self.stream.window_specs[index]

        def attend(h: Tensor) -> tuple[Tensor, LayerState]:
            if spec is None:
                return self.recur(block.gated_delta, h, state)
            return self.attend(block.self_attn, spec, h, state)

        def run(x: Tensor, time: Tensor, context: Tensor | KeyValue) -> tuple[Tensor, LayerState]:
            return block(x, time, attend, context, self.context_mask)

        self.x, left = self.stream.activations.run(run, self.x, self.modulation, context, weights=block)
        return left

    @abstractmethod
    def attend(
        self, layer: attention.Attention, spec: WindowSpec, h: Tensor, state: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """Windowed self-attention of h (B, F, l, D)."""

    @abstractmethod
    def recur(
        self, layer: GatedDeltaNet, h: Tensor, state: RecurrentState | None
    ) -> tuple[Tensor, RecurrentState | None]:
        """The recurrence over h (B, F, l, D)."""

    def finish(self) -> Tensor:
        """Velocities of the frames (B, C, F, H, W)."""
        return self.stream.unpatchify(self.stream.head(self.x, self.time), self.height, self.width)


class ClipPass(VideoPass):
    """The local frames of whole samples. Windows leave keys and values (B, Fk, L, H, E), rotated.

    Args:
        latents: of the whole samples.
        shared: number of first frames whose keys every rank needs (for actions).
    """

    def __init__(
        self,
        stream: VideoStream,
        latents: Tensor,
        context: Tensor,
        context_mask: Tensor | None,
        timestep: Tensor,
        history: tuple[int, ...],
        shared: int,
    ) -> None:
        self.frames, self.history, self.shared = latents.shape[2], history, tuple(range(shared))
        local = stream.hooks.local_frames(self.frames)
        times = stream.frame_times(timestep, history, self.frames)[:, local.start : local.stop]
        super().__init__(stream, latents[:, :, local.start : local.stop], times, context_mask)
        self.context = stream.embed_context(context)
        self.rotations: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def attend(self, layer: attention.Attention, spec: WindowSpec, h: Tensor, state: None) -> tuple[Tensor, KeyValue]:
        exchange = layer.hooks.exchange_frames(
            self.frames,
            frames_read(spec, self.frames, self.history),
            self.shared,
            period=spec.step(self.frames),
            hidden=h.shape[2] * h.shape[3],
            kv=2 * self.stream.tokens(self.height, self.width) * layer.heads * layer.head_dim,
        )
        h = layer.hooks.enter_heads(exchange.move(h))
        if exchange.query_frames not in self.rotations:
            self.rotations[exchange.query_frames] = self.stream.rotation(
                exchange.query_frames, self.height, self.width, h
            )
        q, k, v = layer.project(h, h, self.rotations[exchange.query_frames])
        kv = KeyValue(*exchange.collect(k, v))
        windows = attention.Windows(spec, self.history, self.frames, exchange.query_frames, exchange.key_frames)
        out = attention.window_attention(q, kv.k, kv.v, windows=windows, backend=self.stream.attention_backend)
        return exchange.restore(layer.finish(out, h)), kv

    def recur(self, layer: GatedDeltaNet, h: Tensor, state: None) -> tuple[Tensor, None]:
        return layer(h, self.frames), None


class ActionPass:
    """The actions of a batch on their way through the action stream, layer by layer.

    Args:
        stream: None raises the error.
        action, timestep, context, context_mask, action_mask: as for `WorldActionModel.forward_action`.
    """

    def __init__(
        self,
        stream: ActionStream | None,
        action: Tensor,
        timestep: Tensor | None,
        context: Tensor | ActionContext,
        context_mask: Tensor | None,
        action_mask: Tensor | None,
    ) -> None:
        if stream is None or timestep is None:
            raise UserError(
                "actions need a model with an action stream (model.action) and an action timestep per sample"
            )
        self.stream, encoder = stream, stream.action_encoder
        self.x = encoder(action.to(dtype_of(encoder)))[:, None]  # (B, 1, A, D)
        self.modulation = stream.embed_time(timestep)
        if isinstance(context, Tensor):
            self.contexts = [stream.embed_context(context)] * len(stream.blocks)
            self.context_mask = context_mask
        else:
            self.contexts, self.context_mask = context.layers, context.mask
        self.rotation = stream.rotation(action.shape[1], self.x)
        self.mask = None
        if action_mask is not None:
            # A sample without any valid action still needs a key: its outputs have no loss, but must be finite.
            self.mask = action_mask | ~action_mask.any(1, keepdim=True)

    def layer(self, index: int, history: tuple[KeyValue, Tensor | None] | None) -> None:
        """Run layer `index`.

        Args:
            history: video keys and values (B, M, H, E), and a mask (B, M) of those that a sample sees (None: all).
        """
        block = self.stream.blocks[index]
        kv, seen = (None, None) if history is None else history

        def run(x: Tensor, time: Tensor, context: Tensor | KeyValue, kv: KeyValue | None) -> Tensor:
            def attend(h: Tensor) -> tuple[Tensor, None]:
                return self._attend(block.self_attn, h, kv, seen), None

            return block(x, time, attend, context, self.context_mask)[0]

        self.x = self.stream.activations.run(run, self.x, self.modulation, self.contexts[index], kv, weights=block)

    def finish(self) -> Tensor:
        """Velocity (B, A, action_dim)."""
        return self.stream.head(self.x[:, 0])

    def _attend(self, layer: attention.Attention, h: Tensor, kv: KeyValue | None, seen: Tensor | None) -> Tensor:
        """Attention of h (B, 1, A, D) on the actions and the video keys (B, M, H, E) that `seen` (B, M) shows."""
        h = layer.hooks.enter_heads(h)
        q, k, v = (x.flatten(1, 2) for x in layer.project(h, h, self.rotation))
        mask = self.mask
        if kv is not None and kv.k.shape[1]:
            if mask is not None or seen is not None:
                own = k.new_ones(k.shape[:2], dtype=torch.bool) if mask is None else mask
                seen = kv.k.new_ones(kv.k.shape[:2], dtype=torch.bool) if seen is None else seen
                mask = torch.cat([seen, own], dim=1)
            k, v = torch.cat([kv.k, k], dim=1), torch.cat([kv.v, v], dim=1)
        out = attention.scaled_dot_product(q, k, v, None if mask is None else mask[:, None, None, :])
        return layer.finish(out, h)


def history_keys(kv: KeyValue, history: tuple[int, ...]) -> tuple[KeyValue, Tensor | None]:
    """Keys and values (B, M, H, E) of the first max(K) frames, and which are a sample's own history (None: all).

    Args:
        kv: (B, Fk, L, H, E) in the order of their frames, all history frames among them.
        history: K of each sample.
    """
    most, tokens = max(history), kv.k.shape[2]
    # Copies: a view would keep the keys of all frames alive from here to its layer's backward pass.
    kept = kv.map(lambda x: x[:, :most].flatten(1, 2).clone())
    if min(history) == most:
        return kept, None
    own = torch.tensor(history, device=kept.k.device)[:, None] * tokens
    return kept, torch.arange(most * tokens, device=kept.k.device) < own
