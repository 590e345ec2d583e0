"""Weights of others as one table of tensors: a safetensors file, or several with an index.

An index is JSON, `{"weight_map": {key: file beside the index}}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kairos_train.basics.errors import UserError
from kairos_train.basics.files import read_json
from kairos_train.checkpoint.tensor_file import TensorFile

INDEX_SUFFIX = ".index.json"


class WeightsSource:
    """Tensors by the keys of the file or files; one is read when it is asked for.

    Attributes:
        path: the file or the index.
        metadata: text in the header, of the first file where there are several.

    Raises:
        UserError: not safetensors, damaged, or an index that is not that of its files.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if self.path.name.endswith(INDEX_SUFFIX):
            self._files = _open_indexed(self.path)
        elif self.path.suffix == ".safetensors":
            file = TensorFile(self.path)
            self._files = dict.fromkeys(file.shapes, file)
        else:
            raise UserError(
                f"{path}: is neither .safetensors nor {INDEX_SUFFIX}; pickled weights run code when they are read and"
                " are not taken: convert them to safetensors"
            )
        if not self._files:
            raise UserError(f"{path}: holds no tensor; give a file of model weights")
        self.metadata: Mapping[str, str] = next(iter(self._files.values())).metadata

    def keys(self) -> list[str]:
        return sorted(self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._files[key].shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        return self._files[key].dtypes[key]

    def read(self, key: str) -> Tensor:
        """A copy in memory, as it is stored."""
        return self._files[key].read(key)


def _open_indexed(index: Path) -> dict[str, TensorFile]:
    """{key: the file that holds it}."""
    names = read_json(index, remedy="get the files again").get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{index}: is no index of safetensors; it lacks a weight_map from key to file")
    if odd := next((name for name in names.values() if not isinstance(name, str) or Path(name).name != name), None):
        raise UserError(f"{index}: weight_map names {odd!r}; the files must lie beside the index, without folders")
    files = {name: TensorFile(index.parent / name) for name in sorted(set(names.values()))}
    for key, name in sorted(names.items()):
        if key not in files[name].shapes:
            raise UserError(f"{index}: {key!r} should be in {name} and is not; get the files again")
    for name, file in files.items():
        if surplus := sorted(key for key in file.shapes if names.get(key) != name):
            raise UserError(f"{index}: {name} holds {surplus[0]!r}, which the index does not place there")
    return {key: files[name] for key, name in names.items()}
