"""A checkpoint's weights with its adapters merged in, so that readers need not know of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from kairos_train.basics.plain import from_dict
from kairos_train.basics.yaml_text import check_yaml
from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.config.schema import LoraConfig
from kairos_train.model.lora import A, B, is_adapter, merge, scale_of


class MergedWeights:
    """Sections of weights as `CheckpointReader` gives them, of the model that the adapters make of it.

    A checkpoint without adapters is given as it is.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        self.reader = reader
        self._scale: float | None = None
        self._adapted = {
            (section, name.removesuffix(f".{A}"))
            for section in reader.sections()
            for name in reader.names(section)
            if name.endswith(f".{A}")
        }

    @property
    def path(self) -> Path:
        return self.reader.path

    @property
    def state(self) -> dict[str, Any]:
        return self.reader.state

    def sections(self) -> list[str]:
        return self.reader.sections()

    def names(self, section: str) -> list[str]:
        """Of the model's own parameters."""
        return [name for name in self.reader.names(section) if not is_adapter(name)]

    def shape(self, section: str, name: str) -> tuple[int, ...]:
        return self.reader.shape(section, name)

    def dtype(self, section: str, name: str) -> torch.dtype:
        return self.reader.dtype(section, name)

    def read(self, section: str, name: str, slices: Sequence[slice] | None = None) -> Tensor:
        """A weight, or a part of it."""
        module = name.removesuffix(".weight")
        if module == name or (section, module) not in self._adapted:
            return self.reader.read(section, name, slices)
        rows, columns = [*(slices or ()), slice(None), slice(None)][:2]
        b = self.reader.read(section, f"{module}.{B}")[rows]
        a = self.reader.read(section, f"{module}.{A}")[:, columns]
        weight = self.reader.read(section, name, slices)
        return merge(weight, a, b, self._lora_scale()).to(weight.dtype)

    def _lora_scale(self) -> float:
        """As the checkpoint's own configuration says."""
        if self._scale is None:
            text = self.reader.text("config.yaml")
            check_yaml(text, self.reader.path / "config.yaml")
            saved = yaml.safe_load(text)
            self._scale = scale_of(from_dict(LoraConfig, saved["stage"]["lora"]))
        return self._scale
