"""Activation checkpointing and offloading: which activations a layer keeps for its backward pass, and where.

`none` keeps all; `block` keeps a layer's input and recomputes the rest in backward; `selective` also keeps the outputs
of attention and the states that came from other ranks, which are small and expensive to recompute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

KEPT = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "kairos_parallel::incoming_state",
    "kairos_parallel::outgoing_state",  # a second one would wait at the next rank to be taken for the next step's
)
"""Operators whose results `selective` keeps."""


@dataclass(frozen=True)
class ActivationPolicy:
    """How layers run while gradients are wanted.

    Attributes:
        recompute: none | block | selective.
        offload: kept activations lie in host memory until backward.
    """

    recompute: str = "none"
    offload: bool = False

    def run(self, layer: Callable[..., Any], *inputs: Any, weights: nn.Module) -> Any:
        """`layer(*inputs)`, which must depend on `inputs`, `weights` and constants alone."""
        if not torch.is_grad_enabled():
            return layer(*inputs)
        with _on_host(weights) if self.offload else contextlib.nullcontext():
            if self.recompute == "none":
                return layer(*inputs)
            # No layer draws random numbers, so there is no generator to restore.
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            if self.recompute == "selective":
                options["context_fn"] = partial(checkpoint.create_selective_checkpoint_contexts, _keep)
            return checkpoint.checkpoint(layer, *inputs, **options)


def _on_host(weights: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """What backward needs lies in host memory until then, but for weights and views of them, which are there anyway.

    Those are found again by their parameter: ZeRO 3 releases a weight after the forward pass and gathers another copy
    in backward, and a tensor kept from here would hold the first one all the time between.
    """
    host = torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())

    def pack(x: Tensor) -> Any:
        for weight in weights.parameters():
            offset = x.data_ptr() - weight.data_ptr()
            if 0 <= offset < weight.nbytes and x.dtype == weight.dtype:
                return _WeightView(weight, x.size(), x.stride(), offset // x.element_size())
        return host.pack_hook(x)

    def unpack(kept: Any) -> Tensor:
        return kept.tensor() if isinstance(kept, _WeightView) else host.unpack_hook(kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


@dataclass(frozen=True)
class _WeightView:
    """Elements of a parameter, wherever it lies by the time that they are asked for."""

    weight: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        start = self.weight.storage_offset() + self.offset
        return self.weight.detach().as_strided(self.size, self.stride, start)


def _keep(context: Any, operator: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
    kept = operator.name().partition(".")[0] in KEPT
    return checkpoint.CheckpointPolicy.MUST_SAVE if kept else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
