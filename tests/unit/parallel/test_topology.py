"""Degrees, coordinates, groups and shares of frames: arithmetic, without processes."""

import itertools

import pytest
import torch

from kairos_train.basics.errors import UserError
from parallel.config import ParallelConfig
from parallel.mpu import DeepSpeedMpu
from parallel.topology import AXES, Coordinates, Degrees, Topology, split_frames

LAYOUTS = [Degrees(*degrees) for degrees in itertools.product((1, 2, 3), (1, 2, 4), (1, 2))]


def test_the_rest_of_the_world_is_data_parallel():
    assert Degrees.of(ParallelConfig(tensor=2, context=4), 24) == Degrees(tensor=2, context=4, data=3)
    assert Degrees.of(ParallelConfig(), 5) == Degrees(data=5)


@pytest.mark.parametrize(("world", "fitting"), [(6, r"\(4, 8\)"), (3, r"\(4\)")])
def test_a_world_that_does_not_divide_is_refused_with_sizes_that_do(world, fitting):
    message = rf"{world} processes .*parallel\.tensor=2 × parallel\.context=2 = 4; start a multiple of 4 {fitting}"
    with pytest.raises(UserError, match=message):
        Degrees.of(ParallelConfig(tensor=2, context=2), world)


def test_tensor_ranks_are_neighbours_then_context_then_data():
    degrees = Degrees(tensor=2, context=3, data=2)
    assert [degrees.coordinates(rank) for rank in (0, 1, 2, 5, 6)] == [
        Coordinates(tensor=0, context=0, data=0),
        Coordinates(tensor=1, context=0, data=0),
        Coordinates(tensor=0, context=1, data=0),
        Coordinates(tensor=1, context=2, data=0),
        Coordinates(tensor=0, context=0, data=1),
    ]


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_coordinates_and_ranks_are_inverses(degrees):
    at = [degrees.coordinates(rank) for rank in range(degrees.size)]
    assert [degrees.rank(coordinates) for coordinates in at] == list(range(degrees.size))
    assert len(set(at)) == degrees.size
    with pytest.raises(ValueError, match="of"):
        degrees.coordinates(degrees.size)


def test_groups_of_eight_ranks():
    degrees = Degrees(tensor=2, context=2, data=2)
    assert degrees.groups("tensor") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert degrees.groups("context") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert degrees.groups("data") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert degrees.groups("gradient") == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert degrees.group_of("gradient", 5) == (1, 3, 5, 7)


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", AXES)
def test_each_rank_is_in_one_group_whose_members_differ_in_its_axes_only(degrees, kind):
    groups = degrees.groups(kind)
    assert sorted(itertools.chain(*groups)) == list(range(degrees.size))
    for ranks in groups:
        assert list(ranks) == sorted(ranks)
        shared = {degrees.coordinates(rank)._replace(**dict.fromkeys(AXES[kind], 0)) for rank in ranks}
        assert len(shared) == 1
    sizes = {len(ranks) for ranks in groups}
    assert sizes == {torch.Size([getattr(degrees, axis) for axis in AXES[kind]]).numel()}


@pytest.mark.parametrize(
    ("frames", "parts", "sizes"),
    [(21, 8, [3, 3, 3, 3, 3, 2, 2, 2]), (5, 3, [2, 2, 1]), (4, 4, [1, 1, 1, 1]), (1, 4, [1, 0, 0, 0]), (0, 2, [0, 0])],
)
def test_frames_are_shared_out_in_order_larger_shares_first(frames, parts, sizes):
    shares = split_frames(frames, parts)
    assert [len(share) for share in shares] == sizes
    assert list(itertools.chain(*shares)) == list(range(frames))


def test_one_process_needs_no_groups():
    topology = Topology.single(torch.device("cpu"))
    assert (topology.rank, topology.size, topology.degrees) == (0, 1, Degrees())
    assert topology.tensor_group is topology.context_group is topology.gradient_group is topology.data_group is None
    assert topology.ranks("gradient") == (0,)
    assert topology.describe() == (
        "1 processes: tensor 1 × context 1 × data 1; rank 0 is tensor 0, context 0, data 0, on cpu"
    )


def test_deepspeed_is_not_told_of_a_topology_without_groups():
    # None would be taken for the whole world.
    with pytest.raises(ValueError, match=r"Topology\.build"):
        DeepSpeedMpu(Topology.single(torch.device("cpu")))


def test_deepspeed_does_not_learn_of_sequence_parallelism():
    assert not [name for name in dir(DeepSpeedMpu) if "sequence" in name]
