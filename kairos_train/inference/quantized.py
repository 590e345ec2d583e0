"""Linear layers whose weights are stored quantized and dequantized when they are used: weight-only quantization
(*ours*).

A quantised layer is plain tensors under its name, `out` rows of `in` columns:

    method   NAME.weight              NAME.weight_scale   NAME.weight_groups               a weight is
    int8     int8 (out, in)           float32 (out,)                                       code · scale
    fp8      float8 e4m3 (out, in)    float32 (out,)                                       code · scale
    int4     uint8 (out, ⌈in / 2⌉)    float32 (out, 2)    float8 e4m3 (out, ⌈in / 16⌉, 2)  (code − 8) · step + centre

A group is 16 consecutive columns of a row; the last group of a row has what is left. Its step and its centre are its
two values in `weight_groups` times the two of its row in `weight_scale`. Two int4 codes share a byte: even columns in
the lower four bits, odd ones in the upper. `NAME.bias` stays as it is. Only weights are quantized: activations and
sums have the precision of the layer's input.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

METHODS = ("int8", "fp8", "int4")
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
GROUP_DTYPE = torch.float8_e4m3fn
GROUP = 16
"""Columns of an int4 group. With step and centre in 8 bits each that makes 5 bits a weight."""

SCALE, GROUPS = "_scale", "_groups"
"""What is added to a weight's name for what its codes are read by."""

LARGE = re.compile(
    r"(video|action)_dit\.blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02]|gated_delta\.[qkvo]_proj)\.weight"
)
"""The weights that are quantised: projections and FFNs of the blocks. Embeddings, heads, modulations, norms, gates (the
output gate, decays and write strengths of Gated DeltaNet layers, too) and convolutions are kept."""


def is_large(name: str) -> bool:
    """Whether a parameter is one that quantisation touches."""
    return LARGE.fullmatch(name) is not None


def layout(method: str, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What stands for a weight (out, in): by addition to its name ("" for the codes) type and shape."""
    rows, columns = shape
    if method != "int4":
        return {"": (CODES[method], (rows, columns)), SCALE: (torch.float32, (rows,))}
    return {
        "": (CODES[method], (rows, -(-columns // 2))),
        SCALE: (torch.float32, (rows, 2)),
        GROUPS: (GROUP_DTYPE, (rows, -(-columns // GROUP), 2)),
    }


def steps_and_centres(scale: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Both of every int4 group, float32 (out, groups), from `weight_scale` and `weight_groups`."""
    steps, centres = (groups.float() * scale[:, None]).unbind(-1)
    return steps, centres


def dequantize(method: str, parts: Mapping[str, Tensor], columns: int) -> Tensor:
    """The weight (out, columns) that its parts, named as in `layout`, stand for; float32."""
    codes = parts[""]
    if method != "int4":
        return codes.float() * parts[SCALE][:, None]
    codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)[:, :columns].float() - 8
    steps, centres = (
        part.repeat_interleave(GROUP, dim=1)[:, :columns] for part in steps_and_centres(parts[SCALE], parts[GROUPS])
    )
    return codes.mul_(steps).add_(centres)


class QuantizedLinear(nn.Module):
    """A linear layer with a quantised weight; its state has the names that a file has.

    Args:
        method: one of `METHODS`.
        in_features, out_features: of the layer.
        bias: whether it has one.
    """

    def __init__(self, method: str, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.method, self.in_features, self.out_features = method, in_features, out_features
        parts = layout(method, (out_features, in_features))
        for suffix, (dtype, shape) in parts.items():
            self.register_buffer(f"weight{suffix}", torch.empty(shape, dtype=dtype))
        self._suffixes = tuple(parts)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        parts = {suffix: getattr(self, f"weight{suffix}") for suffix in self._suffixes}
        weight = dequantize(self.method, parts, self.in_features)
        return F.linear(x, weight.to(x.dtype), self.bias)


def replace_large(model: nn.Module, method: str) -> nn.Module:
    """Put quantised layers in place of a model's large linear layers; returns it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_large(f"{name}.weight"):
            parent, _, child = name.rpartition(".")
            quantized = QuantizedLinear(method, module.in_features, module.out_features, bias=module.bias is not None)
            model.get_submodule(parent).register_module(child, quantized)
    return model
