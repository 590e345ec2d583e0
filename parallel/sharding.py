"""The sharding table: for every parameter by name, whether and how its tensor is split over tensor ranks.

    kind                 on a rank                            its gradient
    column               rows of a weight, part of a bias     complete
    row                  columns of a weight                  complete
    head                 the part of the local heads          complete
    replicated_full      whole                                complete and equal on every rank
    replicated_partial   whole                                of the local heads or tokens: to be summed over ranks

Split parameters are split evenly in rank order: rank r of n holds [r·size/n, (r+1)·size/n) of their dimension. Slices
of checkpoints and initial values, norms, gradient sums and the audit at start all follow this table. It knows no names
itself; they come as `ShardingRule`s, of which exactly one fits each parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

SPLIT = {"column": 0, "row": 1, "head": 0}
"""Kind → the dimension that is split."""

KINDS = (*SPLIT, "replicated_full", "replicated_partial")

Shape = tuple[int, ...]


class ShardingError(ValueError):
    """The model and its sharding table do not agree."""


@dataclass(frozen=True)
class ShardingRule:
    """Parameters whose whole name matches the regular expression `pattern` are of this kind."""

    pattern: str
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is no kind of sharding; use one of {', '.join(KINDS)}")


@dataclass(frozen=True)
class Shard:
    """How tensor ranks hold one parameter.

    Attributes:
        kind: see the top of this file.
        dim: the dimension split over tensor ranks, None when every rank holds all of it.
    """

    kind: str
    dim: int | None


@dataclass(frozen=True)
class ShardingTable:
    """Name → `Shard` of every parameter, for `tensor` ranks. Lookups of unknown names raise `ShardingError`."""

    entries: Mapping[str, Shard]
    tensor: int

    @classmethod
    def of(cls, rules: Sequence[ShardingRule], names: Iterable[str], *, tensor: int) -> ShardingTable:
        """Find each parameter's sharding rule.

        Raises:
            ShardingError: a parameter that no rule fits, or more than one.
        """
        patterns = [(re.compile(rule.pattern), rule) for rule in rules]
        entries = {}
        for name in names:
            fitting = [rule for pattern, rule in patterns if pattern.fullmatch(name)]
            if len(fitting) != 1:
                which = " and ".join(rule.pattern for rule in fitting) or "none"
                raise ShardingError(
                    f"parameter {name} needs exactly one sharding rule, and {which} fits it; fix the rules"
                )
            kind = fitting[0].kind
            entries[name] = Shard(kind=kind, dim=SPLIT.get(kind) if tensor > 1 else None)
        return cls(entries=entries, tensor=tensor)

    def __getitem__(self, name: str) -> Shard:
        if name not in self.entries:
            raise ShardingError(f"parameter {name} has no entry in the sharding table; give it a sharding rule")
        return self.entries[name]

    def of_kind(self, kind: str) -> tuple[str, ...]:
        """Names of the parameters of a kind, in the table's order."""
        return tuple(name for name, shard in self.entries.items() if shard.kind == kind)

    def slices(self, name: str, full_shape: Shape, tensor_rank: int) -> tuple[slice, ...]:
        """What a tensor rank holds of a parameter: one slice per dimension of the full tensor.

        Raises:
            ShardingError: the split dimension does not divide.
        """
        local = self.local_shape(name, full_shape)
        starts = [tensor_rank * size if dim == self[name].dim else 0 for dim, size in enumerate(local)]
        return tuple(slice(start, start + size) for start, size in zip(starts, local))

    def local_shape(self, name: str, full_shape: Shape) -> Shape:
        """Shape of what one tensor rank holds.

        Raises:
            ShardingError: the split dimension is not there or does not divide.
        """
        dim = self[name].dim
        if dim is None:
            return tuple(full_shape)
        if dim >= len(full_shape) or full_shape[dim] % self.tensor:
            raise ShardingError(
                f"parameter {name} {tuple(full_shape)} does not divide into {self.tensor} along dimension {dim}"
            )
        return tuple(size // self.tensor if d == dim else size for d, size in enumerate(full_shape))

    def full_shape(self, name: str, local_shape: Shape) -> Shape:
        """The inverse of `local_shape`."""
        dim = self[name].dim
        return tuple(size * self.tensor if d == dim else size for d, size in enumerate(local_shape))


def set_attributes(model: nn.Module, table: ShardingTable) -> None:
    """Mark every parameter for the gradient norms of DeepSpeed and Megatron, before the engine takes the model.

    They count a parameter on every tensor rank when its `tensor_model_parallel` is true, else on the first one only.
    Megatron's layers set that attribute on some parameters and not on others, so this function sets it on all.

    Raises:
        ShardingError: a parameter without an entry.
    """
    for name, parameter in model.named_parameters():
        dim = table[name].dim
        parameter.tensor_model_parallel = dim is not None
        parameter.partition_dim = -1 if dim is None else dim
        parameter.partition_stride = 1
