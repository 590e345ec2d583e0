"""Ranges into boxes and tilings, against indexing; tensor files against the safetensors library."""

import hashlib
from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from kairos_train.checkpoint import boxes
from kairos_train.checkpoint.tensor_file import Stored, write_tensors

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def cut_tensors(draw) -> tuple[tuple[int, ...], list[int]]:
    """A shape, and places that cut its flattened elements into ranges."""
    shape = draw(SHAPES)
    inner = draw(st.lists(st.integers(0, prod(shape)), max_size=5))
    return shape, sorted([0, *inner, prod(shape)])


@settings(deadline=None)
@given(cut_tensors())
def test_the_boxes_of_a_range_hold_its_elements_in_order_and_are_few(cut):
    shape, places = cut
    x = torch.arange(prod(shape)).reshape(shape)
    for start, stop in pairwise(places):
        found = list(boxes.boxes_of_range(shape, start, stop - start))
        parts = [x[boxes.slices_of(box, [0] * len(shape))].reshape(-1) for box in found]
        assert torch.equal(torch.cat([x.new_empty(0), *parts]), torch.arange(start, stop))
        assert len(found) <= max(1, 2 * len(shape) - 1)


@settings(deadline=None)
@given(cut_tensors(), st.data())
def test_ranges_tile_and_a_lost_doubled_or_moved_box_does_not(cut, data):
    shape, places = cut
    found = [box for a, b in pairwise(places) for box in boxes.boxes_of_range(shape, a, b - a)]
    assert boxes.tiles(shape, data.draw(st.permutations(found)))
    box = data.draw(st.sampled_from(found))
    rest = [other for other in found if other != box]
    assert not boxes.tiles(shape, rest)
    assert not boxes.tiles(shape, [*found, box])
    if shape:
        dim = data.draw(st.integers(0, len(shape) - 1))
        by = [1 if d == dim else 0 for d in range(len(shape))]
        assert not boxes.tiles(shape, [*rest, boxes.shift(box, by)])


def test_boxes_that_lie_over_each_other_do_not_tile_though_the_sizes_add_up():
    assert not boxes.tiles((2, 4), [((0, 1), (0, 4)), ((0, 1), (0, 4))])
    assert not boxes.tiles((2, 2), [((0, 2), (0, 1)), ((0, 1), (0, 2))])
    assert boxes.tiles((2, 2), [((0, 2), (0, 1)), ((0, 2), (1, 2))])


def test_a_range_outside_of_the_tensor_is_refused():
    with pytest.raises(ValueError, match="of shape"):
        list(boxes.boxes_of_range((2, 3), 4, 3))


@pytest.mark.parametrize(
    ("slices", "box"),
    [
        ((), ((0, 4), (0, 5))),
        ((slice(1, 3),), ((1, 3), (0, 5))),
        ((slice(None, -1), slice(2, 99)), ((0, 3), (2, 5))),
        ((slice(3, 1), slice(5, 5)), ((3, 3), (5, 5))),  # empty, as indexing has it
    ],
)
def test_slices_mean_the_box_that_indexing_gives(slices, box):
    found = boxes.resolve((4, 5), slices)
    assert found == box
    assert boxes.shape_of(found) == torch.empty(4, 5)[slices].shape


@pytest.mark.parametrize("slices", [(slice(0, 4, 2),), (slice(None, None, -1),), (slice(None),) * 3])
def test_steps_and_dimensions_that_are_not_there_are_refused(slices):
    with pytest.raises(ValueError, match=r"step of 1|3 slices for a tensor of 2"):
        boxes.resolve((4, 5), slices)


def test_a_box_is_found_in_a_tensor_that_begins_elsewhere():
    whole, box, origin = torch.arange(42).view(6, 7), ((3, 5), (2, 6)), (2, 1)
    inside = whole[2:, 1:][boxes.slices_of(box, origin)]
    assert torch.equal(inside, whole[3:5, 2:6])
    assert boxes.shift(box, (-2, -1)) == ((1, 3), (1, 5))
    assert boxes.intersection(box, ((0, 4), (5, 9))) == ((3, 4), (5, 6))
    assert boxes.intersection(box, ((0, 3), (0, 9))) is None, "they touch"
    assert boxes.volume(box) == 8


def test_a_tensor_file_is_one_that_the_library_reads(tmp_path):
    rng = torch.Generator().manual_seed(0)
    tensors = {
        "a.bool": torch.tensor([True, False, True]),
        "b.double": torch.randn(3, 2, generator=rng, dtype=torch.float64),
        "half": torch.randn(7, 3, generator=rng).bfloat16(),
        "view": torch.randn(5, 4, 3, generator=rng)[:, 1],
        "transposed": torch.randn(3, 4, generator=rng).T,
        "scalar": torch.tensor(-0.0),
        "empty": torch.empty(0, 3),
        "ganz groß[0:3,1:2]": torch.arange(4),
    }
    path = tmp_path / "x.safetensors"
    info = write_tensors(path, {name: Stored.of(t) for name, t in tensors.items()}, {"format": "pt"})
    assert info == {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            read = file.get_tensor(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(read, tensor), name


def test_a_tensor_that_is_not_what_was_announced_is_refused(tmp_path):
    lying = Stored(torch.float32, (3,), lambda: torch.ones(4))
    with pytest.raises(ValueError, match=r"\(4,\) came where .*\(3,\) was announced"):
        write_tensors(tmp_path / "x.safetensors", {"a": lying})
