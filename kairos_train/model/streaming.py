"""Streaming: what history frames leave behind, so that later frames need not compute them again.

With `model.video.history_causal` a history frame's tokens depend on its own frame and earlier ones. Later frames then
need only a streaming state: the keys and values of the frames that a window still reaches (a KV cache), and the
recurrent state of the Gated DeltaNet layers. What is computed here equals a pass over all frames from the first one on
(under the context that each frame was given).

    SWA, DSWA   the last (window − 1)·step frames, and the last `visible` ones where there is an action stream
    FA          every frame: its reach is the whole history, and so grows with it
    GATED       the recurrent state after the last frame, and the last inputs of the convolutions

Frames are numbered as in training: the first of the last `visible` history frames is 0, older ones count below it.
Video windows do not notice (rotary embeddings compare distances), but actions do: their queries are rotated by their
own positions. The cache therefore holds keys before their rotary embedding (pre-RoPE).

Shapes: B batch, C latent channels, n new frames, M cached frames, L tokens per frame, H heads, E head width, D width,
N context tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kairos_train.basics.errors import UserError
from kairos_train.model.block import LayerState
from kairos_train.model.gated_delta_net import GatedDeltaNet, RecurrentState
from kairos_train.model.hooks import SingleDevice
from kairos_train.model.kernels import attention, rotary
from kairos_train.model.kernels.attention import KeyValue
from kairos_train.model.kernels.windows import WindowSpec
from kairos_train.model.passes import VideoPass
from kairos_train.model.precision import upcast
from kairos_train.model.streams import VideoStream
from kairos_train.model.world_action import HistoryCache, WorldActionModel


@dataclass(frozen=True)
class StreamingState:
    """What T history frames leave to later ones.

    Attributes:
        layers: pre-RoPE keys and values of the cached frames (B, M, L, H, E), or the state of a Gated DeltaNet layer.
        frames: T.
        visible: K, of which the last history frames actions see; frames are numbered from the first of them.
        size: latent height and width.
    """

    layers: tuple[KeyValue | RecurrentState, ...]
    frames: int
    visible: int
    size: tuple[int, int]

    @property
    def next_frame(self) -> int:
        """Number of the frame that comes next: as many visible history frames are before it."""
        return min(self.frames, self.visible)


def extend_history(
    model: WorldActionModel,
    history: StreamingState | None,
    latents: Tensor,
    context: Tensor,
    context_mask: Tensor | None,
    *,
    state: Tensor | None = None,
    visible: int,
) -> StreamingState:
    """Run clean frames (B, C, n, H, W) once as history, behind those of `history` (None: they are the first).

    Args:
        context, context_mask, state: as for `WorldActionModel.forward`; the frames keep what this context made of them.
        visible: K, the same at every call.

    Raises:
        UserError: a model whose history frames depend on later ones, or one that is spread over ranks.
    """
    check_causal(model)
    context, mask = model.with_state(context, context_mask, state)
    start = 0 if history is None else history.next_frame
    clean = latents.new_zeros(latents.shape[0]).float()
    new = StreamPass(model.video_dit, latents, clean, mask, start, is_history=True)
    embedded = model.video_dit.embed_context(context)
    before = _rotated(model, history, start)
    left = [new.layer(index, embedded, layer) for index, layer in enumerate(before)]
    old = [None] * len(left) if history is None else history.layers
    keep = visible if model.action_dit is not None else 0
    layers = tuple(
        layer if spec is None else _trim(cached, layer, spec, keep)
        for spec, cached, layer in zip(model.video_dit.window_specs, old, left, strict=True)
    )
    frames = latents.shape[2] + (0 if history is None else history.frames)
    return StreamingState(layers, frames, visible, tuple(latents.shape[-2:]))


def check_causal(model: WorldActionModel) -> None:
    """Raise UserError unless the model can stream: its history is causal, and all of it is on this device."""
    if not model.config.video.history_causal:
        raise UserError(
            "model.video.history_causal=false: this model's history frames depend on later ones, so that it cannot "
            "stream; recompute a sliding history, or train with model.video.history_causal=true"
        )
    if not isinstance(model.hooks.video, SingleDevice):
        raise UserError("a model streams on one device; use parallel.tensor=1 and parallel.context=1")


class StreamingModel:
    """The frames behind a history, under one context: velocities of any noise there.

    Args:
        history: of `extend_history`.
        context, context_mask, state: as for `WorldActionModel.forward`, the same at every noise level.
    """

    def __init__(
        self,
        model: WorldActionModel,
        history: StreamingState,
        context: Tensor,
        context_mask: Tensor | None,
        *,
        state: Tensor | None = None,
    ) -> None:
        self.model, self.history = model, history
        context, self.mask = model.with_state(context, context_mask, state)
        embedded, blocks = model.video_dit.embed_context(context), model.video_dit.blocks
        self.contexts = [block.cross_attn.context_keys(embedded) for block in blocks]
        self.layers = _rotated(model, history, history.next_frame)

    def video(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Velocity of noisy new frames (B, C, n, H, W) at σ·1000 per sample, float32 (B,)."""
        start = self.history.next_frame
        new = StreamPass(self.model.video_dit, latents, timestep, self.mask, start, is_history=False)
        for index, (context, layer) in enumerate(zip(self.contexts, self.layers, strict=True)):
            new.layer(index, context, layer)
        return new.finish()


def history_cache(model: WorldActionModel, history: StreamingState) -> HistoryCache:
    """What `WorldActionModel.forward_action` reads: the last visible history frames, numbered from 0."""
    count = history.next_frame
    layers: list[KeyValue | None] = []
    for layer in history.layers:
        if isinstance(layer, RecurrentState):
            layers.append(None)
            continue
        visible = layer.map(lambda x: x[:, x.shape[1] - count :])
        layers.append(_rotate(model, visible, 0, history.size).map(lambda x: x.flatten(1, 2)))
    return HistoryCache(layers)


class StreamPass(VideoPass):
    """New frames behind a history, which comes in as the state of each layer: rotated keys and values, or the recurrent
    state. The frames leave pre-RoPE keys and values, or the recurrent state after them.

    Args:
        timestep: per sample (B,).
        start: number of the first new frame.
        is_history: whether the new frames count as history.
    """

    def __init__(
        self,
        stream: VideoStream,
        latents: Tensor,
        timestep: Tensor,
        context_mask: Tensor | None,
        start: int,
        *,
        is_history: bool,
    ) -> None:
        count = latents.shape[2]
        super().__init__(stream, latents, timestep[:, None].expand(-1, count), context_mask)
        self.is_history = is_history
        self.rotation = stream.rotation(tuple(range(start, start + count)), self.height, self.width, self.x)

    def attend(
        self, layer: attention.Attention, spec: WindowSpec, h: Tensor, state: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        q, pre_rope, v = layer.normed(h, h)
        q, k = (rotary.rotate(x, self.rotation).to(h.dtype) for x in (q, pre_rope))
        left = KeyValue(pre_rope.to(h.dtype), v)
        if state is not None:
            k, v = torch.cat([state.k, k], dim=1), torch.cat([state.v, v], dim=1)
        frames, before = k.shape[1], k.shape[1] - h.shape[1]
        num_history = (frames if self.is_history else before,) * len(h)
        # A window compares distances and asks what is history, so that the first cached frame may count as 0.
        windows = attention.Windows(spec, num_history, frames, tuple(range(before, frames)), tuple(range(frames)))
        out = attention.window_attention(q, k, v, windows=windows, backend=self.stream.attention_backend)
        return layer.finish(out, h), left

    def recur(
        self, layer: GatedDeltaNet, h: Tensor, state: RecurrentState | None
    ) -> tuple[Tensor, RecurrentState | None]:
        return layer.continue_from(state, h)


def _rotated(model: WorldActionModel, history: StreamingState | None, start: int) -> Sequence[LayerState]:
    """The state of each layer before frame number `start`, its keys rotated to the positions of their frames."""
    if history is None:
        return [None] * len(model.kinds)
    return [
        layer if isinstance(layer, RecurrentState) else _rotate(model, layer, start - layer.k.shape[1], history.size)
        for layer in history.layers
    ]


def _rotate(model: WorldActionModel, cached: KeyValue, start: int, size: tuple[int, int]) -> KeyValue:
    """Rotary embedding of pre-RoPE keys (B, M, L, H, E) of M frames from number `start` on."""
    frames = tuple(range(start, start + cached.k.shape[1]))
    rotation = model.video_dit.rotation(frames, *size, cached.k)
    return KeyValue(rotary.rotate(upcast(cached.k), rotation).to(cached.k.dtype), cached.v)


def _trim(old: KeyValue | None, new: KeyValue, spec: WindowSpec, visible: int) -> KeyValue:
    """Of old and new frames, those that later ones may still read."""
    if old is None:
        old = new.map(lambda x: x[:, :0])
    reach, cached = spec.reach(), old.k.shape[1]
    drop = 0 if reach is None else max(cached + new.k.shape[1] - max(reach, visible), 0)
    dropped_new = max(drop - cached, 0)
    return KeyValue(
        torch.cat([old.k[:, drop:], new.k[:, dropped_new:]], dim=1),
        torch.cat([old.v[:, drop:], new.v[:, dropped_new:]], dim=1),
    )
