"""Boxes in a tensor: where a piece of it lies, and how a range of its flattened elements falls into boxes.

A box is one (start, stop) per dimension. A range of a row-major tensor is in general no box; cut at the ends of rows it
is a few of them, e.g. elements 3 to 13 of a (4, 5) tensor:

    . . . a a        a  the rest of the first row
    b b b b b        b  the full rows
    c c c . .        c  the beginning of the last row
    . . . . .
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod

Box = tuple[tuple[int, int], ...]


def whole(shape: Sequence[int]) -> Box:
    """The box of everything."""
    return tuple((0, size) for size in shape)


def at(offset: Sequence[int], shape: Sequence[int]) -> Box:
    """The box of `shape` that begins at `offset`."""
    return tuple((start, start + size) for start, size in zip(offset, shape, strict=True))


def resolve(shape: Sequence[int], slices: Sequence[slice]) -> Box:
    """The box that `slices` mean in a tensor; dimensions without one are whole.

    Raises:
        ValueError: more slices than dimensions, or a step other than 1.
    """
    if len(slices) > len(shape):
        raise ValueError(f"{len(slices)} slices for a tensor of {len(shape)} dimensions")
    if any(part.step not in (None, 1) for part in slices):
        raise ValueError("only slices with a step of 1 can be read")
    missing = [slice(None)] * (len(shape) - len(slices))
    bounds = [part.indices(size)[:2] for part, size in zip([*slices, *missing], shape)]
    return tuple((start, max(start, stop)) for start, stop in bounds)


def offset_of(box: Box) -> tuple[int, ...]:
    """Where it begins."""
    return tuple(start for start, _ in box)


def shape_of(box: Box) -> tuple[int, ...]:
    """Its size per dimension."""
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """Number of its elements; 1 for the box of a scalar."""
    return prod(stop - start for start, stop in box)


def shift(box: Box, offset: Sequence[int]) -> Box:
    """The box moved by `offset`."""
    return tuple((start + by, stop + by) for (start, stop), by in zip(box, offset, strict=True))


def slices_of(box: Box, origin: Sequence[int]) -> tuple[slice, ...]:
    """Indices of the box in a tensor whose first element lies at `origin`."""
    return tuple(slice(start - by, stop - by) for (start, stop), by in zip(box, origin, strict=True))


def intersection(one: Box, other: Box) -> Box | None:
    """What two boxes share; None when that is nothing."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return None if any(start >= stop for start, stop in common) else common


def boxes_of_range(shape: Sequence[int], start: int, numel: int) -> Iterator[Box]:
    """Elements start … start + numel − 1 of a flattened row-major tensor, as at most 2·(dimensions − 1) + 1 boxes.

    In the order of the elements: the boxes' contents, one after the other, are the range.
    """
    if not 0 <= start <= start + numel <= prod(shape):
        raise ValueError(f"{numel} elements from {start} on of a tensor of shape {tuple(shape)}")
    if numel == 0:
        return
    if len(shape) <= 1:
        yield ((start, start + numel),) if shape else ()
        return
    row = prod(shape[1:])
    end = start + numel
    first, before = divmod(start, row)
    last, after = divmod(end, row)
    if before:
        stop = min(row, before + numel)
        yield from (((first, first + 1), *box) for box in boxes_of_range(shape[1:], before, stop - before))
        first += 1
    if first < last:
        yield ((first, last), *whole(shape[1:]))
    if after and first <= last:
        yield from (((last, last + 1), *box) for box in boxes_of_range(shape[1:], 0, after))


def tiles(shape: Sequence[int], boxes: Iterable[Box]) -> bool:
    """Whether the boxes cover a tensor exactly: all inside, none over another, no hole.

    Sweeps along the first dimension, so that thousands of boxes are no matter.
    """
    full = whole(shape)
    boxes = sorted(boxes)
    if not all(a <= start <= stop <= b for box in boxes for (start, stop), (a, b) in zip(box, full, strict=True)):
        return False
    if sum(map(volume, boxes)) != volume(full):
        return False
    if not shape:
        return True
    reached: list[Box] = []
    for box in boxes:
        reached = [other for other in reached if other[0][1] > box[0][0]]
        if any(intersection(box, other) for other in reached):
            return False
        reached.append(box)
    return True
