"""Video that goes on: what history frames leave behind, so that later frames need not compute them again.

With `model.video.history_causal` a history frame's tokens depend on its own frame and earlier ones. Keys and values of
the frames that a window still reaches, and the memories of the GATED layers, are then all that later frames need of it:
what is computed here equals a pass over all frames from the first one on (under the context that each frame was given).

    SWA, DSWA   the last (window − 1)·step frames, and the last `visible` ones where there is an action stream
    FA          every frame: its reach is the whole history, and so grows with it
    GATED       the state after the last frame, and the last inputs of the convolutions

Frames are numbered as in training: the first of the last `visible` history frames is 0, older ones count below it.
Video windows do not notice (rotary embeddings compare distances), but actions do: their queries turn by their own
places. Keys are kept before they are turned, for that reason.

Shapes: B batch, C latent channels, n new frames, M frames kept, L tokens per frame, H heads, E head width, D width,
N context tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kairos_train.basics.errors import UserError
from kairos_train.model.gated_delta_net import RecurrentState
from kairos_train.model.hooks import SingleDevice
from kairos_train.model.kernels import attention, rotary
from kairos_train.model.kernels.attention import KeyValue
from kairos_train.model.kernels.windows import WindowSpec
from kairos_train.model.precision import upcast
from kairos_train.model.world_action import HistoryCache, WorldActionModel


@dataclass(frozen=True)
class StreamingState:
    """What T history frames leave to later ones.

    Attributes:
        layers: keys before the rotary embedding and values of the frames kept, (B, M, L, H, E), or the memory of a
            GATED layer.
        frames: T.
        visible: K, of which the last history frames actions see; frames are numbered from the first of them.
        size: latent height and width.
    """

    layers: tuple[KeyValue | RecurrentState, ...]
    frames: int
    visible: int
    size: tuple[int, int]

    @property
    def next_number(self) -> int:
        """Number of the frame that comes next: as many visible history frames are before it."""
        return min(self.frames, self.visible)


def carry(
    model: WorldActionModel,
    past: StreamingState | None,
    latents: Tensor,
    context: Tensor,
    context_mask: Tensor | None,
    *,
    state: Tensor | None = None,
    visible: int,
) -> StreamingState:
    """Run clean frames (B, C, n, H, W) once as history, behind those of `past` (None: they are the first).

    Args:
        context, context_mask, state: as for `WorldActionModel.forward`; the frames keep what this context made of them.
        visible: K, the same at every call.

    Raises:
        UserError: a model whose history frames depend on later ones, or one that is spread over ranks.
    """
    check_causal(model)
    context, mask = model.with_state(context, context_mask, state)
    start = 0 if past is None else past.next_number
    clean = latents.new_zeros(latents.shape[0]).float()
    new = _Frames(model, latents, clean, start, history=True)
    embedded = model.video_dit.embed_context(context)
    for memory in _turned(model, past, start):
        new.layer(memory, embedded, mask)
    before = [None] * len(new.left) if past is None else past.layers
    keep = visible if model.action_dit is not None else 0
    layers = tuple(
        left if rule is None else _last(old, left, rule, keep)
        for rule, old, left in zip(model.rules, before, new.left, strict=True)
    )
    frames = latents.shape[2] + (0 if past is None else past.frames)
    return StreamingState(layers, frames, visible, tuple(latents.shape[-2:]))


def check_causal(model: WorldActionModel) -> None:
    """Raise UserError unless a history can be carried over: it is causal, and all of it is on this device."""
    if not model.config.video.history_causal:
        raise UserError(
            "model.video.history_causal=false: this model's history frames depend on later ones and cannot be carried "
            "over; recompute a sliding history, or train with model.video.history_causal=true"
        )
    if not isinstance(model.hooks.video, SingleDevice):
        raise UserError("history is carried over on one device; use parallel.tensor=1 and parallel.context=1")


class StreamingModel:
    """The frames behind a carried history, under one context: velocities of any noise there.

    Args:
        past: of `carry`.
        context, context_mask, state: as for `WorldActionModel.forward`, the same at every noise level.
    """

    def __init__(
        self,
        model: WorldActionModel,
        past: StreamingState,
        context: Tensor,
        context_mask: Tensor | None,
        *,
        state: Tensor | None = None,
    ) -> None:
        self.model, self.past = model, past
        context, self.mask = model.with_state(context, context_mask, state)
        embedded, blocks = model.video_dit.embed_context(context), model.video_dit.blocks
        self.texts = [block.cross_attn.context_keys(embedded) for block in blocks]
        self.memories = _turned(model, past, past.next_number)

    def video(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Velocity of noisy new frames (B, C, n, H, W) at σ·1000 per sample, float32 (B,)."""
        new = _Frames(self.model, latents, timestep, self.past.next_number, history=False)
        for memory, text in zip(self.memories, self.texts, strict=True):
            new.layer(memory, text, self.mask)
        return new.finish()


def action_keys(model: WorldActionModel, past: StreamingState) -> HistoryCache:
    """What `WorldActionModel.forward_action` reads: the last visible history frames, numbered from 0."""
    count = past.next_number
    layers: list[KeyValue | None] = []
    for memory in past.layers:
        if isinstance(memory, RecurrentState):
            layers.append(None)
            continue
        keys, values = (x[:, x.shape[1] - count :] for x in memory)
        turned = _turn(model, keys, tuple(range(count)), past.size)
        layers.append((turned.flatten(1, 2), values.flatten(1, 2)))
    return HistoryCache(layers)


class _Frames:
    """New frames on their way through the video stream, layer by layer.

    Attributes:
        left: of each layer so far, what the frames leave behind: keys before the rotary embedding and values, or the
            GATED memory after them.
    """

    def __init__(
        self, model: WorldActionModel, latents: Tensor, timestep: Tensor, start: int, *, history: bool
    ) -> None:
        stream, count = model.video_dit, latents.shape[2]
        self.model, self.history, self.size = model, history, tuple(latents.shape[-2:])
        self.x = stream.patchify(latents)  # (B, n, L, D)
        self.time, self.modulation = stream.embed_time(timestep[:, None].expand(-1, count))
        self.rotation = stream.rotation(tuple(range(start, start + count)), *self.size, self.x)
        self.left: list[KeyValue | RecurrentState] = []

    def layer(self, memory: KeyValue | RecurrentState | None, context: Tensor | KeyValue, mask: Tensor | None) -> None:
        """Run the next layer on turned keys and values, or the GATED memory, of the frames before; the context is as
        `Block.forward` takes it."""
        index = len(self.left)
        block, rule = self.model.video_dit.blocks[index], self.model.rules[index]
        attend: Callable[[Tensor], Tensor]
        if rule is None:

            def attend(h: Tensor) -> Tensor:
                out, after = block.gated_delta.continued(h, memory)
                self.left.append(after)
                return out
        else:

            def attend(h: Tensor) -> Tensor:
                return self._windowed(block.self_attn, rule, memory, h)

        self.x = block(self.x, self.modulation, attend, context, mask)

    def finish(self) -> Tensor:
        """(B, C, n, H, W)."""
        stream = self.model.video_dit
        return stream.unpatchify(stream.head(self.x, self.time), *self.size)

    def _windowed(self, layer: attention.Attention, rule: WindowSpec, memory: KeyValue | None, h: Tensor) -> Tensor:
        q, plain, v = layer.normed(h, h)
        q, k = (rotary.rotate(x, self.rotation).to(h.dtype) for x in (q, plain))
        self.left.append((plain.to(h.dtype), v))
        if memory is not None:
            k, v = torch.cat([memory[0], k], dim=1), torch.cat([memory[1], v], dim=1)
        frames, before = k.shape[1], k.shape[1] - h.shape[1]
        known = (frames if self.history else before,) * len(h)
        # The rule compares distances and asks what is history, so that the first frame at hand may count as 0.
        windows = attention.Windows(rule, known, frames, tuple(range(before, frames)), tuple(range(frames)))
        return layer.finish(
            attention.window_attention(q, k, v, windows=windows, backend=self.model.attention_backend), h
        )


def _turned(
    model: WorldActionModel, past: StreamingState | None, start: int
) -> Sequence[KeyValue | RecurrentState | None]:
    """The memories behind frame number `start`, keys turned to the places of their frames."""
    if past is None:
        return [None] * len(model.kinds)
    turned: list[KeyValue | RecurrentState | None] = []
    for memory in past.layers:
        if not isinstance(memory, RecurrentState):
            keys, values = memory
            memory = (_turn(model, keys, tuple(range(start - keys.shape[1], start)), past.size), values)
        turned.append(memory)
    return turned


def _turn(model: WorldActionModel, keys: Tensor, numbers: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """Rotary embedding of kept keys (B, M, L, H, E) of the frames with these numbers."""
    return rotary.rotate(upcast(keys), model.video_dit.rotation(numbers, *size, keys)).to(keys.dtype)


def _last(old: KeyValue | None, new: KeyValue, rule: WindowSpec, visible: int) -> KeyValue:
    """Of old and new frames, those that later ones may still read."""
    if old is None:
        old = tuple(x[:, :0] for x in new)
    reach, frames = rule.reach(), old[0].shape[1] + new[0].shape[1]
    drop = 0 if reach is None else max(frames - max(reach, visible), 0)
    dropped_new = max(drop - old[0].shape[1], 0)
    return tuple(torch.cat([a[:, drop:], b[:, dropped_new:]], dim=1) for a, b in zip(old, new, strict=True))
