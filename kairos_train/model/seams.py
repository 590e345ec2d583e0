"""The seams of the model: what a parallel layout replaces, and nothing else.

The math is written once as if everything were on one device. Wherever a layout would have to act, the model calls one
of these methods; `SingleDevice` is the default and imports plain torch only. `parallel.seams` has the others.

What a layout may split: the heads and FFN channels of every layer (tensor), the tokens of each frame between layers
(sequence), the frames of a sample (context). Shapes here: B batch, F frames held by this rank, L tokens per frame,
l of them held between layers, D width, W attention width, M key frames.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from kairos_train.model.precision import upcast

Recurrence = Callable[..., tuple[Tensor, Tensor]]
"""(q, k, v, g, beta, initial_state) → (outputs, final state); `kernels.delta_rule.gated_delta_rule`."""


class FrameExchange(Protocol):
    """Who computes which frames' windows in one layer, and the way there and back.

    Attributes:
        query_frames: numbers of the frames whose queries this rank computes.
        key_frames: numbers of the frames whose keys and values `collect` gives.
    """

    query_frames: tuple[int, ...]
    key_frames: tuple[int, ...]

    def move(self, x: Tensor) -> Tensor:
        """Tokens (B, F, …) of the frames held here → of `query_frames`."""

    def collect(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `query_frames` (B, ·, L, H, E) → of `key_frames`."""

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `move`."""


class Seams(Protocol):
    """What one stream of the model asks of a layout."""

    def for_layer(self, layer: int) -> "Seams":
        """The seams of one layer: linear layers may be made differently there."""

    def column_linear(
        self, in_features: int, out_features: int, *, bias: bool = True, exact: bool = False
    ) -> nn.Module:
        """A linear layer whose output features may be split over ranks (q, k, v, FFN in, GATED projections).

        `exact` asks for one that no low-precision recipe may replace (decays and write strengths).
        """

    def row_linear(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """A linear layer whose input features may be split: (B, F, L, ·) → (B, F, l, out_features), complete sums."""

    def local_heads(self, heads: int) -> int:
        """How many of `heads` this rank computes."""

    def mean_square(self, x: Tensor) -> Tensor:
        """Mean of x² over the last dimension at its full width, keepdim."""

    def enter_heads(self, x: Tensor) -> Tensor:
        """Into a part that is split by heads or channels: (B, F, l, D) → (B, F, L, D)."""

    def enter_context(self, context: Tensor) -> Tensor:
        """Context (B, N, D), whole on every rank, into such a part."""

    def split_tokens(self, x: Tensor) -> Tensor:
        """(B, F, L, D) → (B, F, l, D), after the patch embedding."""

    def join_tokens(self, x: Tensor) -> Tensor:
        """(B, F, l, ·) → (B, F, L, ·), after the head."""

    def local_frames(self, frames: int) -> range:
        """The frames of a sample that this rank holds."""

    def exchange_frames(
        self,
        frames: int,
        reads: tuple[tuple[int, ...], ...],
        everywhere: tuple[int, ...],
        *,
        period: int,
        hidden: int,
        keys: int,
    ) -> FrameExchange:
        """The exchange of one windowed layer.

        Args:
            frames: F of the whole sample.
            reads: for each of them, the frames whose keys its queries read.
            everywhere: frames whose keys every rank needs (history, for the action stream).
            period: dilation of the windows in frames.
            hidden: numbers per frame of the tokens that `move` takes, for choosing the cheaper way.
            keys: numbers per frame of K and V together.
        """

    def previous_tokens(self, x: Tensor, count: int, tokens_per_frame: int, frames: int) -> Tensor | None:
        """The `count` tokens before this rank's first, (B, count, D), of x (B, F·L, D); None at the sequence's start.

        `frames` counts those of the whole sample.
        """

    def start_recurrence(
        self,
        rule: Recurrence,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None,
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Begin `rule` over the whole sequence; calling the result waits for (outputs here, state after them)."""


@dataclass(frozen=True)
class ModelSeams:
    """The seams of both streams.

    Attributes:
        region: what a forward pass runs within.
    """

    video: Seams
    action: Seams
    region: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class LocalFrameExchange:
    """The frame exchange of one device."""

    query_frames: tuple[int, ...]

    @property
    def key_frames(self) -> tuple[int, ...]:
        return self.query_frames

    def move(self, x: Tensor) -> Tensor:
        return x

    def collect(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v

    def restore(self, x: Tensor) -> Tensor:
        return x


class SingleDevice:
    """Everything is here: plain linear layers, local means, no exchange."""

    def for_layer(self, layer: int) -> "SingleDevice":
        return self

    def column_linear(
        self, in_features: int, out_features: int, *, bias: bool = True, exact: bool = False
    ) -> nn.Module:
        return nn.Linear(in_features, out_features, bias=bias)

    def row_linear(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        return nn.Linear(in_features, out_features, bias=bias)

    def local_heads(self, heads: int) -> int:
        return heads

    def mean_square(self, x: Tensor) -> Tensor:
        return upcast(x).pow(2).mean(-1, keepdim=True)

    def enter_heads(self, x: Tensor) -> Tensor:
        return x

    def enter_context(self, context: Tensor) -> Tensor:
        return context

    def split_tokens(self, x: Tensor) -> Tensor:
        return x

    def join_tokens(self, x: Tensor) -> Tensor:
        return x

    def local_frames(self, frames: int) -> range:
        return range(frames)

    def exchange_frames(
        self,
        frames: int,
        reads: tuple[tuple[int, ...], ...],
        everywhere: tuple[int, ...],
        *,
        period: int,
        hidden: int,
        keys: int,
    ) -> FrameExchange:
        return LocalFrameExchange(tuple(range(frames)))

    def previous_tokens(self, x: Tensor, count: int, tokens_per_frame: int, frames: int) -> Tensor | None:
        return None

    def start_recurrence(
        self,
        rule: Recurrence,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None,
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        result = rule(q, k, v, g, beta, initial_state)
        return lambda: result


def single_device() -> ModelSeams:
    """The default of the model."""
    seams = SingleDevice()
    return ModelSeams(video=seams, action=seams)
