"""Parallel hooks: the places where a parallel layout changes what the model does, and nothing else.

The math is written once as if everything were on one device. Wherever a layout has to act, the model calls a method of
`ParallelHooks`. The bodies here are those of one device, in plain torch; `parallel.hooks` has those of a layout.

What a layout may split: the heads and FFN channels of every layer (tensor), the tokens of each frame between layers
(sequence), the frames of a sample (context). Shapes here: B batch, F local frames, L tokens per frame, l of them on
this rank between layers, D width, W attention width, M key frames.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from kairos_train.model.precision import upcast

Recurrence = Callable[..., tuple[Tensor, Tensor]]
"""(q, k, v, g, beta, initial_state) → (outputs, final state); `kernels.delta_rule.gated_delta_rule`."""

Frames = tuple[int, ...]
"""Numbers of frames, ascending."""


class FrameExchange(Protocol):
    """Which rank computes which frames' windows in one layer, and the way there and back.

    Attributes:
        query_frames: the frames whose queries this rank computes.
        key_frames: the frames whose keys and values `collect` returns.
    """

    query_frames: Frames
    key_frames: Frames

    def move(self, x: Tensor) -> Tensor:
        """Tokens (B, F, …) of the local frames → of `query_frames`."""
        return x

    def collect(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `query_frames` (B, ·, L, H, E) → of `key_frames`."""
        return k, v

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `move`."""
        return x


class ParallelHooks(Protocol):
    """What one stream of the model asks of a layout; the bodies answer for one device."""

    def for_layer(self, layer: int) -> "ParallelHooks":
        """The hooks of one layer: linear layers may be made differently there."""
        return self

    def column_linear(
        self, in_features: int, out_features: int, *, bias: bool = True, high_precision: bool = False
    ) -> nn.Module:
        """A linear layer whose output features may be split over ranks (q, k, v, FFN in, GDN projections).

        `high_precision` asks for one that no low-precision recipe may replace (decays and write strengths).
        """
        return nn.Linear(in_features, out_features, bias=bias)

    def row_linear(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """A linear layer whose input features may be split: (B, F, L, ·) → (B, F, l, out_features), complete sums."""
        return nn.Linear(in_features, out_features, bias=bias)

    def local_heads(self, heads: int) -> int:
        """How many of `heads` this rank computes."""
        return heads

    def mean_square(self, x: Tensor) -> Tensor:
        """Mean of x² over the last dimension at its full width, keepdim."""
        return upcast(x).pow(2).mean(-1, keepdim=True)

    def enter_heads(self, x: Tensor) -> Tensor:
        """Into a part that is split by heads or channels: (B, F, l, D) → (B, F, L, D)."""
        return x

    def enter_context(self, context: Tensor) -> Tensor:
        """Context (B, N, D), whole on every rank, into such a part."""
        return context

    def split_tokens(self, x: Tensor) -> Tensor:
        """(B, F, L, D) → (B, F, l, D), after the patch embedding."""
        return x

    def join_tokens(self, x: Tensor) -> Tensor:
        """(B, F, l, ·) → (B, F, L, ·), after the head."""
        return x

    def local_frames(self, frames: int) -> range:
        """The frames of a sample that this rank holds."""
        return range(frames)

    def exchange_frames(
        self, frames: int, reads: tuple[Frames, ...], on_all_ranks: Frames, *, period: int, hidden: int, kv: int
    ) -> FrameExchange:
        """The exchange of one windowed layer.

        Args:
            frames: F of the whole sample.
            reads: for each of them, the frames whose keys its queries read.
            on_all_ranks: frames whose keys every rank needs (history, for the action stream).
            period: dilation of the windows in frames.
            hidden: elements per frame of the tokens that `move` takes, for choosing the cheaper way.
            kv: elements per frame of K and V together.
        """
        return LocalFrameExchange(tuple(range(frames)))

    def previous_tokens(self, x: Tensor, count: int, tokens_per_frame: int, frames: int) -> Tensor | None:
        """The `count` tokens before this rank's first, (B, count, D), of x (B, F·L, D); None at the sequence's start.

        `frames` counts those of the whole sample.
        """
        return None

    def start_recurrence(
        self, recurrence_fn: Recurrence, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Begin `recurrence_fn` over the whole sequence from the initial `state`.

        Returns:
            A function that waits for (outputs of the local tokens, state after them).
        """
        result = recurrence_fn(q, k, v, g, beta, state)
        return lambda: result


class SingleDevice(ParallelHooks):
    """Everything is on this device: plain linear layers, local means, no exchange."""


@dataclass(frozen=True)
class LocalFrameExchange(FrameExchange):
    """The frame exchange of one device."""

    query_frames: Frames

    @property
    def key_frames(self) -> Frames:
        return self.query_frames


@dataclass(frozen=True)
class ModelHooks:
    """The parallel hooks of both streams.

    Attributes:
        autocast: the context in which a forward pass runs.
    """

    video: ParallelHooks
    action: ParallelHooks
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext


def single_device() -> ModelHooks:
    """The model's default."""
    hooks = SingleDevice()
    return ModelHooks(video=hooks, action=hooks)
