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

    def run(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        """`layer(*inputs)`, which must depend on `inputs` and constants alone."""
        if not torch.is_grad_enabled():
            return layer(*inputs)
        pin = torch.cuda.is_available()
        with torch.autograd.graph.save_on_cpu(pin_memory=pin) if self.offload else contextlib.nullcontext():
            if self.recompute == "none":
                return layer(*inputs)
            # No layer draws random numbers, so there is no generator to restore.
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            if self.recompute == "selective":
                options["context_fn"] = partial(checkpoint.create_selective_checkpoint_contexts, _keep)
            return checkpoint.checkpoint(layer, *inputs, **options)


def _keep(context: Any, operator: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
    kept = operator.name().partition(".")[0] in KEPT
    return checkpoint.CheckpointPolicy.MUST_SAVE if kept else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
