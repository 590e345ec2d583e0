"""The tensors of an export: cast or quantised, one in memory at a time, and read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.adapters import MergedWeights
from kairos_train.checkpoint.tensor_file import Stored, TensorFile
from kairos_train.inference.quantized import dequantize, is_large, layout
from kairos_train.weights.quantize import encode, find_scales


class ExportTensors:
    """One section of a checkpoint as an export stores it.

    Args:
        reader: of the checkpoint, its adapters merged.
        section: of it.
        dtype: of all tensors; None: each keeps its own.
        method: how large weights are quantised; None: not at all.
    """

    def __init__(self, reader: MergedWeights, section: str, *, dtype: torch.dtype | None, method: str | None) -> None:
        self.reader, self.section, self.dtype, self.method = reader, section, dtype, method
        self._scales = {} if method is None else self._room()  # found once: they are written apart from the codes
        self._found: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Of the model's parameters."""
        return self.reader.names(self.section)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.reader.shape(self.section, name)

    def dtype_of(self, name: str) -> torch.dtype:
        """What a parameter is cast to."""
        return self.dtype or self.reader.dtype(self.section, name)

    def read(self, name: str) -> Tensor:
        """A parameter, cast.

        Raises:
            UserError: it has values that are not finite.
        """
        tensor = self.reader.read(self.section, name).to(self.dtype_of(name))
        if not tensor.isfinite().all():
            raise UserError(
                f"checkpoint {self.reader.path}: {self.section}/{name} has values that are not finite; use another one"
            )
        return tensor

    def stored(self) -> dict[str, Stored]:
        """What is written, by name, in the order of the parameters."""
        tensors: dict[str, Stored] = {}
        for name in self.names:
            shape = self.shape(name)
            if self.method is None or not is_large(name):
                tensors[name] = Stored(self.dtype_of(name), shape, partial(self.read, name))
                continue
            for suffix, (dtype, part) in layout(self.method, shape).items():
                tensors[name + suffix] = Stored(dtype, part, partial(self._part, name, suffix))
        return tensors

    def _room(self) -> dict[str, dict[str, Tensor]]:
        """Memory for all scales, in one piece: many small tensors between large temporary ones would leave holes that
        the process keeps."""
        layouts = {name: layout(self.method, self.shape(name)) for name in self.names if is_large(name)}
        places = [(name, suffix, *part) for name, parts in layouts.items() for suffix, part in parts.items() if suffix]
        places.sort(key=lambda place: -place[2].itemsize)  # so that each begins where its type may
        sizes = [prod(shape) * dtype.itemsize for _, _, dtype, shape in places]
        rooms: dict[str, dict[str, Tensor]] = {name: {} for name in layouts}
        for room, (name, suffix, dtype, shape) in zip(torch.empty(sum(sizes), dtype=torch.uint8).split(sizes), places):
            rooms[name][suffix] = room.view(dtype).view(shape)
        return rooms

    def _part(self, name: str, suffix: str) -> Tensor:
        if suffix == "":
            return encode(self.method, self.read(name), self._find(name))
        return self._find(name)[suffix]

    def _find(self, name: str) -> dict[str, Tensor]:
        """The scales of a large weight."""
        if name not in self._found:
            for suffix, part in find_scales(self.method, self.read(name)).items():
                self._scales[name][suffix].copy_(part)
            self._found.add(name)
        return self._scales[name]


def computed_bytes(shapes: Mapping[str, tuple[int, ...]], itemsize: Callable[[str], int], method: str | None) -> int:
    """Size of an export's tensors from the model's shapes alone, headers not counted.

    Args:
        shapes: of the parameters.
        itemsize: parameter name → bytes per element where it is not quantised.
        method: as for `ExportTensors`.
    """
    total = 0
    for name, shape in shapes.items():
        if method is None or not is_large(name):
            total += prod(shape) * itemsize(name)
        else:
            total += sum(prod(part) * dtype.itemsize for dtype, part in layout(method, shape).values())
    return total


class WrittenTensors:
    """An export's weights, read back from its files."""

    def __init__(self, files: list[Path], method: str | None) -> None:
        opened = [TensorFile(path) for path in files]
        self._files = {key: file for file in opened for key in file.shapes}
        self._method = method

    def compare(self, expected: Mapping[str, Stored]) -> None:
        """Raise OSError unless the files hold exactly these tensors, bit for bit."""
        for key, source in expected.items():
            if key not in self._files or not _same(self._files[key].read(key), source.load()):
                raise OSError(f"tensor {key!r} reads back unlike it was written; is the disk sound?")
        if surplus := sorted(self._files.keys() - expected.keys()):
            raise OSError(f"{surplus[0]!r} is in the files and was not written")

    def weight(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter as a loaded export has it, quantized ones dequantized to float32."""
        if self._method is None or not is_large(name):
            return self._files[name].read(name)
        parts = {suffix: self._files[name + suffix].read(name + suffix) for suffix in layout(self._method, shape)}
        return dequantize(self._method, parts, shape[1])


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bits; NaN codes would differ from themselves."""
    a, b = a.contiguous(), b.contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
