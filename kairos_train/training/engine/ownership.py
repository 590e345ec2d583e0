"""Which part of every tensor this process holds, and which of several replicas a checkpoint takes.

    split over tensor ranks           each tensor rank writes its shard
    replicated over tensor ranks      one of them writes it
    partitioned (ZeRO 1 to 3)         each rank of the gradient group writes its partition
    replicated over that group        one of them writes it (ZeRO 0, frozen parameters)

Replicas are dealt by size, so that all processes write about as much at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from parallel.sharding import Shape, ShardingTable
from parallel.topology import Topology


def deal(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Name → rank: the largest first, each to the rank with the least so far. The same on every rank."""
    loads = [0] * ranks
    dealt = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        dealt[name] = loads.index(min(loads))
        loads[dealt[name]] += sizes[name]
    return dealt


class Ownership:
    """The shards of a model's parameters on one process of a topology.

    Args:
        table: how tensor ranks hold them.
        topology: of all processes.
        local_shapes: of the shards on this tensor rank, of all parameters; the same on all ranks.

    Attributes:
        copy: rank in the gradient group, whose processes hold the same shards.
        partitions: the parameters that this tensor rank writes, each rank of the gradient group its partition.
        copies: the parameters that this process writes alone, where each rank of the gradient group has a replica.
    """

    def __init__(self, table: ShardingTable, topology: Topology, local_shapes: Mapping[str, Shape]) -> None:
        self._table, self._tensor_rank = table, topology.tensor_rank
        ranks = topology.ranks("gradient")
        self.copy = ranks.index(topology.rank)
        sizes = {name: prod(shape) for name, shape in local_shapes.items()}
        whole = {name: size for name, size in sizes.items() if table[name].dim is None}
        writer = deal(whole, table.tensor)
        self.partitions = frozenset(n for n in sizes if writer.get(n, topology.tensor_rank) == topology.tensor_rank)
        writer = deal({name: sizes[name] for name in self.partitions}, len(ranks))
        self.copies = frozenset(name for name in self.partitions if writer[name] == self.copy)

    def full_shape(self, name: str, local: Shape) -> Shape:
        """Shape of the full tensor of which a tensor rank holds `local`."""
        return self._table.full_shape(name, local)

    def slices(self, name: str, full: Shape) -> tuple[slice, ...]:
        """What this tensor rank holds of a tensor of shape `full`."""
        return self._table.slices(name, full, self._tensor_rank)

    def offset(self, name: str, full: Shape) -> tuple[int, ...]:
        """First index of those slices in each dimension."""
        return tuple(part.start for part in self.slices(name, full))
