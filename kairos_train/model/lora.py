"""Low-rank adapters on the linear layers of a stream (LoRA, arXiv 2106.09685): y = Wx + b + (α/r)·B(Ax), W frozen.

A: (r, in), B: (out, r). B starts at zero, so that the model starts as it is. The adapted layer keeps the names of its
weight and bias, and has `lora_a` and `lora_b` beside them. Exports for inference are merged: W + (α/r)·B·A.

Where tensor ranks split a layer they split its adapter too, and communicate nothing more: on rank i,

    column layer    y_i = W_i x + (α/r)·B_i (A x)            B by rows, A on every rank
    row layer       y   = Σ_i [W_i x_i + (α/r)·B (A_i x_i)]  A by columns, B on every rank

The factor that is on every rank gets its gradient from this rank's features: it is `replicated_partial` in the
sharding table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kairos_train.basics.errors import UserError
from kairos_train.config.schema import LoraConfig

A, B = "lora_a", "lora_b"

Shape = tuple[int, ...]


class _Adapter:
    """An adapter, mixed in before a linear layer class that has `product(x, bias)`: x Wᵀ + b of the local shards."""

    def add(self, rank: int, scale: float) -> None:
        """Allocate the factors, without values, on the device of the weight."""
        rows, columns = self.weight.shape
        self.scale = scale
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, columns))
        self.lora_b = nn.Parameter(self.weight.new_empty(rows, rank))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return super().product(x, bias) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


class _WholeLinear(nn.Linear):
    """torch's layer with the interface of `parallel.megatron_linear`'s."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)


def add_adapters(model: nn.Module, lora: LoraConfig) -> None:
    """Adapt the targets in the blocks of the streams, on the model's device, without values.

    Raises:
        UserError: a target that no stream has, a stream without a target, or one that computes in FP8.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in adapter_shapes(shapes, lora):
        if name.endswith(f".{A}"):
            _adapt(model, name.removesuffix(f".{A}"), lora)


def adapter_shapes(shapes: Mapping[str, Shape], lora: LoraConfig) -> dict[str, Shape]:
    """Names and shapes of a model's adapters.

    Args:
        shapes: of its own parameters by name, full or local to a tensor rank.

    Raises:
        UserError: a target that no stream has, or a stream without a target.
    """
    linear = {stream: _linear_layers(shapes, stream) for stream in lora.streams}
    for target in lora.targets:
        if not any(target in layers.values() for layers in linear.values()):
            there = ", ".join(sorted(set().union(*(layers.values() for layers in linear.values()))))
            raise UserError(f"stage.lora.targets holds {target!r}; a layer of {_streams(lora.streams)} has {there}")
    found: dict[str, Shape] = {}
    for stream, layers in linear.items():
        adapted = [module for module, layer in layers.items() if layer in lora.targets]
        if not adapted:
            there = ", ".join(sorted(set(layers.values())))
            raise UserError(
                f"stage.lora.targets={lora.targets} leaves {_streams([stream])} nothing; add one of {there}"
            )
        for module in adapted:
            rows, columns = shapes[f"{module}.weight"]
            found |= {f"{module}.{A}": (lora.rank, columns), f"{module}.{B}": (rows, lora.rank)}
    return found


def is_adapter(name: str) -> bool:
    """Whether a parameter is a part of an adapter."""
    return name.endswith((f".{A}", f".{B}"))


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + (α/r)·B·A, float32."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)


def scale_of(lora: LoraConfig) -> float:
    """α/r."""
    return lora.alpha / lora.rank


def _linear_layers(shapes: Mapping[str, Shape], stream: str) -> dict[str, str]:
    """Linear layers of a stream's blocks: name in the model → name in the block."""
    module = re.compile(rf"({stream}_dit\.blocks\.\d+\.(.+))\.weight")
    fits = [module.fullmatch(name) for name, shape in shapes.items() if len(shape) == 2]
    return {fit[1]: fit[2] for fit in fits if fit is not None}


def _streams(names: Sequence[str]) -> str:
    return f"the {' and '.join(names)} stream{'s' if len(names) > 1 else ''}"


def _adapt(model: nn.Module, name: str, lora: LoraConfig) -> None:
    linear = model.get_submodule(name)
    if type(linear) is not nn.Linear and not hasattr(linear, "product"):
        raise UserError(f"stage.lora: {name} is a {type(linear).__name__}; use precision.fp8.recipe=null")
    linear.__class__ = _adapted(type(linear))  # parameters, process group and hooks stay
    linear.add(lora.rank, scale_of(lora))


@cache
def _adapted(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of linear layers, with an adapter."""
    whole = _WholeLinear if kind is nn.Linear else kind
    return type(f"Lora{kind.__name__}", (_Adapter, whole), {})
