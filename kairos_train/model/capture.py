"""Hearing what the GATED layers of a model are given, without changing what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kairos_train.model.gated_delta_net import GatedDeltaNet
from kairos_train.model.hooks import ParallelHooks, Recurrence

Tell = Callable[[str, Tensor, Tensor, Tensor], None]
"""Called with a layer's module name, its keys (B, S, H, K), log decays (B, S, H) and write strengths (B, S, H)."""


def gated_layers(model: nn.Module) -> dict[str, GatedDeltaNet]:
    """GATED layers by module name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GatedDeltaNet)}


@contextmanager
def listening(model: nn.Module, tell: Tell) -> Iterator[None]:
    """Within it, every GATED layer tells what its recurrence is given. Outside, the model is as it was."""
    layers = gated_layers(model)
    before = {name: layer.hooks for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.hooks = _Listener(name, layer.hooks, tell)
        yield
    finally:
        for name, layer in layers.items():
            layer.hooks = before[name]


class _Listener:
    """A layer's hooks, with an ear on its recurrence: there decays, strengths and keys pass as they are used."""

    def __init__(self, name: str, hooks: ParallelHooks, tell: Tell) -> None:
        self._name, self._hooks, self._tell = name, hooks, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hooks, name)

    def start_recurrence(
        self, recurrence_fn: Recurrence, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        self._tell(self._name, k, g, beta)
        return self._hooks.start_recurrence(recurrence_fn, q, k, v, g, beta, state)
