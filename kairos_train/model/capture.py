"""A capture hook for the recurrences of a model: it sees their inputs and changes nothing that they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kairos_train.model.gated_delta_net import GatedDeltaNet
from kairos_train.model.hooks import ParallelHooks, Recurrence

CaptureHook = Callable[[str, Tensor, Tensor, Tensor], None]
"""Called with a layer's module name, its keys (B, S, H, K), log decays (B, S, H) and write strengths (B, S, H)."""


def gdn_layers(model: nn.Module) -> dict[str, GatedDeltaNet]:
    """Gated DeltaNet layers by module name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GatedDeltaNet)}


@contextmanager
def capture_recurrences(model: nn.Module, hook: CaptureHook) -> Iterator[None]:
    """Call `hook` in every Gated DeltaNet layer, as often as it runs within this context."""
    layers = gdn_layers(model)
    before = {name: layer.hooks for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.hooks = _Capturing(name, layer.hooks, hook)
        yield
    finally:
        for name, layer in layers.items():
            layer.hooks = before[name]


class _Capturing:
    """A layer's parallel hooks, which call a capture hook before its recurrence starts."""

    def __init__(self, name: str, hooks: ParallelHooks, capture: CaptureHook) -> None:
        self._name, self._hooks, self._capture = name, hooks, capture

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hooks, name)

    def start_recurrence(
        self, recurrence_fn: Recurrence, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        self._capture(self._name, k, g, beta)
        return self._hooks.start_recurrence(recurrence_fn, q, k, v, g, beta, state)
