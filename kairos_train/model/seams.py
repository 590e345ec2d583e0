"""The seams of the model: what a parallel layout replaces, and nothing else.

The math is written once as if everything were on one device. Wherever a layout would have to act, the model calls one
of these methods; `SingleDevice` is the default and imports plain torch only.
"""

from typing import Protocol

from torch import Tensor, nn

from kairos_train.model.delta_rule import gated_delta_rule
from kairos_train.model.precision import upcast


class Seams(Protocol):
    """What the model asks of a layout."""

    def column_linear(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """A linear layer whose output features may be split over ranks (q, k, v, FFN in, GATED projections)."""

    def row_linear(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """A linear layer whose input features may be split over ranks and whose output is whole (o, FFN out)."""

    def local_heads(self, heads: int) -> int:
        """How many of `heads` this rank computes."""

    def mean_square(self, x: Tensor) -> Tensor:
        """Mean of x² over the last dimension at its full width, keepdim."""

    def previous_tokens(self, x: Tensor, count: int) -> Tensor | None:
        """The `count` tokens before this rank's first, (B, count, D); None at the start of the sequence."""

    def gated_delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        """The recurrence over the whole sequence; see `kairos_train.model.delta_rule.gated_delta_rule`."""


class SingleDevice:
    """Everything is here: plain linear layers, local means, no exchange."""

    def column_linear(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        return nn.Linear(in_features, out_features, bias=bias)

    def row_linear(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        return nn.Linear(in_features, out_features, bias=bias)

    def local_heads(self, heads: int) -> int:
        return heads

    def mean_square(self, x: Tensor) -> Tensor:
        return upcast(x).pow(2).mean(-1, keepdim=True)

    def previous_tokens(self, x: Tensor, count: int) -> Tensor | None:
        return None

    def gated_delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        return gated_delta_rule(q, k, v, g, beta, initial_state=initial_state, backend=backend)
