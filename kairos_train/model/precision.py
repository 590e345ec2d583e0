"""Where arithmetic leaves bfloat16, it runs in float32 or wider."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def upcast(x: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; float32 and float64 as they are."""
    return x.to(wide(x.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that `upcast` returns for one."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's parameters, for code outside of it. Reading `module.weight` would make ZeRO 3 gather the
    weight, on this rank alone if the others take another path."""
    return next(module.parameters()).dtype


class UpcastLinear(nn.Linear):
    """A linear layer computed in float32 or wider whatever its parameters' dtype (timestep MLPs)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(upcast(x), upcast(self.weight), upcast(self.bias) if self.bias is not None else None)


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension, computed in float32 or wider, returned in that precision.

    Args:
        width: size of the last dimension.
        affine: with weight and bias, or neither.
    """

    def __init__(self, width: int, eps: float, *, affine: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width)) if affine else None
        self.bias = nn.Parameter(torch.empty(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        weight = upcast(self.weight) if self.weight is not None else None
        bias = upcast(self.bias) if self.bias is not None else None
        return F.layer_norm(upcast(x), x.shape[-1:], weight, bias, self.eps)
