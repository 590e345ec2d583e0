"""Degrees → coordinates → process groups: which ranks communicate what. The only module that makes groups.

    world = tensor · context · data
    rank  = (data_rank · context + context_rank) · tensor + tensor_rank

Neighbours communicate most: tensor ranks exchange activations in every layer and sit next to each other (one node),
context ranks exchange states and frames in every layer, data ranks gradients once a step.

    group      ranks that differ in   what travels on it
    tensor     tensor_rank            activations of every layer, gradients of partly computed replicated parameters
    context    context_rank           states and frames of one sample
    data       data_rank              nothing but counts and reports
    gradient   context and data       gradients and ZeRO partitions: all its ranks hold the same parameters
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from kairos_train.basics.errors import UserError
from parallel.config import ParallelConfig

TIMEOUT = timedelta(hours=3)
"""After which a collective gives up by itself. Longer than hang detection (`watch.stuck`, four times that while
validating or saving) takes to find out which rank is stuck: a backend's own limit names no rank (ours)."""

AXES = {"tensor": ("tensor",), "context": ("context",), "data": ("data",), "gradient": ("context", "data")}
"""Kind of group → the coordinates in which its ranks differ."""


class Coordinates(NamedTuple):
    """The position of a rank on each axis."""

    tensor: int
    context: int
    data: int


@dataclass(frozen=True)
class Degrees:
    """Ranks along each axis."""

    tensor: int = 1
    context: int = 1
    data: int = 1

    def __post_init__(self) -> None:
        if min(self.tensor, self.context, self.data) < 1:
            raise ValueError(f"degrees are positive: {self}")

    @classmethod
    def of(cls, parallel: ParallelConfig, world_size: int) -> Degrees:
        """The configured degrees; what is left of the world is data-parallel.

        Raises:
            UserError: the world does not divide.
        """
        tensor, context = parallel.tensor, parallel.context
        model = tensor * context
        if world_size % model:
            fits = ", ".join(str(n) for n in (world_size // model * model, (world_size // model + 1) * model) if n)
            raise UserError(
                f"{world_size} processes do not divide into parallel.tensor={tensor} × parallel.context={context} = "
                f"{model}; start a multiple of {model} ({fits}) or lower one of the two"
            )
        return cls(tensor=tensor, context=context, data=world_size // model)

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.tensor * self.context * self.data

    def coordinates(self, rank: int) -> Coordinates:
        """The position of `rank`."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} of {self.size}")
        rest, tensor = divmod(rank, self.tensor)
        data, context = divmod(rest, self.context)
        return Coordinates(tensor=tensor, context=context, data=data)

    def rank(self, at: Coordinates) -> int:
        """The inverse of `coordinates`."""
        return (at.data * self.context + at.context) * self.tensor + at.tensor

    def groups(self, kind: str) -> tuple[tuple[int, ...], ...]:
        """Every group of a kind ("tensor", "context", "data", "gradient"): ascending ranks, ordered by the first one.

        Each rank is in exactly one of them. Within the gradient group the order is data-major, as ranks are.
        """
        members: dict[Coordinates, list[int]] = {}
        for rank in range(self.size):
            shared = self.coordinates(rank)._replace(**dict.fromkeys(AXES[kind], 0))
            members.setdefault(shared, []).append(rank)
        return tuple(tuple(ranks) for ranks in members.values())

    def group_of(self, kind: str, rank: int) -> tuple[int, ...]:
        """The group of a kind that `rank` is in."""
        return next(ranks for ranks in self.groups(kind) if rank in ranks)


def split_frames(frames: int, parts: int) -> tuple[range, ...]:
    """Frames 0 … frames−1 in `parts` contiguous shards, sizes differing by at most one, larger ones first.

    More parts than frames leave the last ones empty: 1 frame on 4 is 1, 0, 0, 0.
    """
    if frames < 0 or parts < 1:
        raise ValueError(f"{frames} frames in {parts} parts")
    size, larger = divmod(frames, parts)
    starts = [part * size + min(part, larger) for part in range(parts + 1)]
    return tuple(range(start, end) for start, end in itertools.pairwise(starts))


_BUILT: WeakKeyDictionary[dist.ProcessGroup, dict] = WeakKeyDictionary()
"""World → (degrees, device) → its topology. One per process, as `torch.distributed` itself; it ends with the world."""


@dataclass(frozen=True)
class Topology:
    """This process among the others.

    A group is None where its degree is 1: there is no other rank. (torch would take None for the whole world, so None
    never reaches a collective.)

    Attributes:
        rank, size: in the world.
        device: where this process computes.
        tensor_rank, context_rank, data_rank: coordinates.
        tensor_group, context_group, data_group: ranks that differ in that coordinate alone.
        gradient_group: ranks of all contexts and data: DeepSpeed averages gradients and partitions over it.
        self_group: this process alone, for libraries that want a group at degree 1; None without `torch.distributed`.
    """

    rank: int
    size: int
    device: torch.device
    degrees: Degrees
    tensor_rank: int
    context_rank: int
    data_rank: int
    tensor_group: dist.ProcessGroup | None
    context_group: dist.ProcessGroup | None
    gradient_group: dist.ProcessGroup | None
    data_group: dist.ProcessGroup | None
    self_group: dist.ProcessGroup | None

    @classmethod
    def build(cls, degrees: Degrees, device: torch.device) -> Topology:
        """This layout's groups, made at the first call. Collective over the whole world.

        The same call returns the same groups for as long as `torch.distributed` runs: each costs threads or GPU memory
        until the process ends, and a process may run several stages of a curriculum.

        Raises:
            ValueError: `torch.distributed` runs with another number of processes than the degrees have.
        """
        rank, size = dist.get_rank(), dist.get_world_size()
        if size != degrees.size:
            raise ValueError(f"{degrees} is for {degrees.size} processes, not {size}")
        built = _BUILT.setdefault(dist.group.WORLD, {})
        if (degrees, device) not in built:
            built[degrees, device] = cls._make(degrees, device, rank, size)
        return built[degrees, device]

    @classmethod
    def _make(cls, degrees: Degrees, device: torch.device, rank: int, size: int) -> Topology:
        at = degrees.coordinates(rank)
        # All ranks make all groups, in one order: torch.distributed.new_group is collective over the world. Context and
        # gradient groups are two even of the same ranks: gradients are reduced while states travel.
        tensor, context, gradient = (_own(degrees, kind, rank) for kind in ("tensor", "context", "gradient"))
        data = gradient if degrees.context == 1 else _own(degrees, "data", rank)
        alone = dist.new_group([rank], timeout=TIMEOUT, use_local_synchronization=True)
        return cls(rank, size, device, degrees, *at, tensor, context, gradient, data, alone)

    @classmethod
    def single(cls, device: torch.device) -> Topology:
        """One process, with or without `torch.distributed`."""
        return cls(0, 1, device, Degrees(), 0, 0, 0, None, None, None, None, None)

    def ranks(self, kind: str) -> tuple[int, ...]:
        """The world's ranks in this process's group of a kind, in the order of their rank within the group."""
        return self.degrees.group_of(kind, self.rank)

    def describe(self) -> str:
        """One line for the log."""
        d = self.degrees
        return (
            f"{self.size} processes: tensor {d.tensor} × context {d.context} × data {d.data}; rank {self.rank} is "
            f"tensor {self.tensor_rank}, context {self.context_rank}, data {self.data_rank}, on {self.device}"
        )


def _own(degrees: Degrees, kind: str, rank: int) -> dist.ProcessGroup | None:
    """Make every group of a kind; returns the one of this process, None when it would be alone in it."""
    own = None
    for ranks in degrees.groups(kind):
        if len(ranks) > 1:
            group = dist.new_group(list(ranks), timeout=TIMEOUT)
            own = group if rank in ranks else own
    return own
