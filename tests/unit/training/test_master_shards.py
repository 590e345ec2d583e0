"""A checkpoint of any layout and ZeRO stage read in any other, in one process.

Every rank's part of DeepSpeed is laid out by hand here, by its own rules: float32 weights of a group one after the
other, cut into equal partitions (stages 1, 2), or an equal part of each weight (stage 3), the last one padded.
"""

import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import pad

from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.checkpoint.writing import publish, write_part
from kairos_train.training.engine.master_shards import MasterShards
from kairos_train.training.engine.ownership import Ownership, deal
from parallel.sharding import KINDS, SPLIT, Shard, ShardingTable
from parallel.topology import Degrees, Topology

PADDING = -7.0
RANKS = 8


@dataclass(frozen=True)
class Layout:
    degrees: Degrees
    stage: int


LAYOUTS = [
    Layout(Degrees(*degrees), stage)
    for *degrees, stage in product((1, 2, 4), (1, 2, 3), (1, 2, 4), range(4))
    if degrees[0] * degrees[1] * degrees[2] <= RANKS
]


@st.composite
def models(draw) -> tuple[dict[str, str], dict[str, Tensor], list[list[str]]]:
    """Kinds and whole values of some weights, and their two optimiser groups."""
    kinds = {f"w{i}": kind for i, kind in enumerate(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6)))}
    values, begin = {}, 0
    for name, kind in kinds.items():
        dims = draw(st.integers(2 if kind == "row" else 1, 3))
        shape = [draw(st.sampled_from((4, 8)) if d == SPLIT.get(kind) else st.integers(1, 5)) for d in range(dims)]
        size = torch.Size(shape).numel()
        values[name] = torch.arange(begin, begin + size, dtype=torch.float32).reshape(shape)  # no two are equal
        begin += size
    first = draw(st.sets(st.sampled_from(sorted(kinds))))
    groups = [sorted(first), sorted(kinds.keys() - first)]
    return kinds, values, [names for names in groups if names]


def topology_of(degrees: Degrees, rank: int) -> Topology:
    groups = dict.fromkeys(("tensor_group", "context_group", "gradient_group", "data_group", "self_group"))
    at = degrees.coordinates(rank)
    names = ("tensor_rank", "context_rank", "data_rank")
    return Topology(rank, degrees.size, torch.device("cpu"), degrees, **dict(zip(names, at)), **groups)


def lay_out(layout: Layout, rank: int, kinds: dict, values: dict[str, Tensor], groups: list[list[str]]) -> MasterShards:
    """What this rank has of `values`."""
    topology, tensor = topology_of(layout.degrees, rank), layout.degrees.tensor
    entries = {name: Shard(kind, SPLIT.get(kind) if tensor > 1 else None) for name, kind in kinds.items()}
    table = ShardingTable(entries, tensor)
    ranks = topology.ranks("gradient")
    copies, copy = len(ranks), ranks.index(rank)
    module = nn.Module()
    for name, value in values.items():
        part = value[table.slices(name, tuple(value.shape), topology.tensor_rank)]
        module.register_parameter(name, nn.Parameter(part.clone()))
    weights = dict(module.named_parameters())
    wrapper = SimpleNamespace(grad_position={}, get_param_id=id)
    if layout.stage == 0:
        flats = [[weights[name] for name in names] for names in groups]
    elif layout.stage < 3:
        flats = [[link(number, [weights[n] for n in names], copies, copy)] for number, names in enumerate(groups)]
    else:
        flats = [
            [partition(wrapper, number, [weights[n] for n in names], copies, copy)]
            for number, names in enumerate(groups)
        ]
        wrapper.fp32_partitioned_groups_flat = [flat for (flat,) in flats]
    optimizer = torch.optim.AdamW([{"params": params} for params in flats])
    ownership = Ownership(table, topology, {name: tuple(weight.shape) for name, weight in weights.items()})
    engine = SimpleNamespace(module=module, optimizer=wrapper)
    return MasterShards(engine, optimizer, stage=layout.stage, ownership=ownership)


def link(number: int, weights: list[nn.Parameter], copies: int, copy: int) -> nn.Parameter:
    """Stages 1 and 2: this rank's partition of a group, and what every weight says of its fragment."""
    whole = torch.cat([weight.detach().reshape(-1) for weight in weights])
    size = -(-whole.numel() // copies)
    begin, at = copy * size, 0
    for weight in weights:
        first, last = max(at, begin), min(at + weight.numel(), begin + size)
        weight._hp_mapping = (
            None
            if first >= last
            else SimpleNamespace(
                param_group_index=number,
                hp_fragment_address=SimpleNamespace(start=first - begin),
                lp_fragment_address=SimpleNamespace(start=first - at, numel=last - first),
            )
        )
        at += weight.numel()
    return nn.Parameter(pad(whole, (0, size * copies - whole.numel()), value=PADDING)[begin : begin + size].clone())


def partition(wrapper: SimpleNamespace, number: int, weights: list[nn.Parameter], copies: int, copy: int):
    """Stage 3: this rank's part of every weight of a group, one after the other."""
    parts, at = [], 0
    for weight in weights:
        size = -(-weight.numel() // copies)
        padded = pad(weight.detach().reshape(-1), (0, size * copies - weight.numel()), value=PADDING)
        parts.append(padded[copy * size : (copy + 1) * size])
        wrapper.grad_position[id(weight)] = (number, at, size)
        at += size
    return nn.Parameter(torch.cat(parts))


@settings(deadline=None, max_examples=60)
@given(models(), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))
def test_a_checkpoint_of_any_layout_is_read_whole_and_in_any_other(model, writer, reader):
    kinds, values, groups = model
    with tempfile.TemporaryDirectory() as parent:
        folder, target = Path(parent, "writing"), Path(parent, "step-00000001")
        folder.mkdir()
        ranks = [lay_out(writer, rank, kinds, values, groups) for rank in range(writer.degrees.size)]
        parts = [write_part(folder, i, {"model": shards.pieces(shards.masters)}) for i, shards in enumerate(ranks)]
        publish(folder, target, parts, state={}, files={})
        checkpoint = CheckpointReader(target)
        read = checkpoint.read_section("model")
        assert read.keys() == values.keys()
        assert all(torch.equal(read[name], value) for name, value in values.items())

        blank = {name: torch.zeros_like(value) for name, value in values.items()}
        for rank in range(reader.degrees.size):
            expected, found = (lay_out(reader, rank, kinds, content, groups) for content in (values, blank))
            found.fill(lambda name, box: checkpoint.read("model", name, box), found.masters)
            assert all(torch.equal(a, b) for a, b in zip(found.masters, expected.masters, strict=True))


def test_copies_are_dealt_so_that_ranks_write_about_as_much():
    sizes = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 9}
    dealt = deal(sizes, 2)
    assert [sum(sizes[name] for name, rank in dealt.items() if rank == r) for r in range(2)] == [12, 12]
    assert deal(dict(reversed(sizes.items())), 2) == dealt, "whatever the order in which ranks know them"
    assert deal({}, 3) == {}
