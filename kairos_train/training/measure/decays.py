"""What the Gated DeltaNet layers forget while they train: decays of the tokens of a step, layer by layer.

A Gated DeltaNet layer's state is multiplied by α = e^g at every token (`kairos_train.model.gated_delta_net`). Near 1 it
remembers; a layer whose decays all go to 0 or all to 1 has stopped to choose.

The numbers are of what this rank computes: its samples, under tensor parallelism its heads, under context parallelism
its frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kairos_train.model.capture import capture_recurrences

QUANTILES = {"q10": 0.1, "median": 0.5, "q90": 0.9}
MOST = 1 << 18
"""Values kept of one pass of one layer (1 MB): of more, evenly spaced tokens stand for all."""


class DecayProbe:
    """Listens to the recurrences of a model's Gated DeltaNet layers.

        probe = DecayProbe(model)
        with probe.listening():
            ...one step...
        probe.values()        # {"decay/layer_01_median": 0.93, …}; empty for a model without Gated DeltaNet layers

    Outside of `listening` the model is as it was. Within it, forward passes of the model are heard and nothing else: a
    layer that is computed once more in the backward pass counts once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._heard: dict[str, list[Tensor]] = {}
        self._forward = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear the forward passes that are made within; forget those of before."""
        self._heard = {}
        hooks = [
            self._model.register_forward_pre_hook(lambda *_: self._inside(True)),
            self._model.register_forward_hook(lambda *_: self._inside(False), always_call=True),
        ]
        try:
            with capture_recurrences(self._model, lambda name, k, g, beta: self._hear(name, g)):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self._forward = False

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        """Quantiles of α over tokens and heads, "decay/layer_03_q10", "_median" and "_q90", and "_half_life_tokens".

        The half life is the number of tokens like the median one after which half of the state is left.
        """
        heard = {name: torch.cat(parts) for name, parts in self._heard.items() if sum(p.numel() for p in parts)}
        if not heard:
            return {}
        # torch.quantile takes 2^24 values: of very many micro-batches, again evenly spaced ones.
        thinned = [g[:: -(-g.numel() // (16 * MOST))] for g in heard.values()]
        found = [torch.quantile(g, g.new_tensor(list(QUANTILES.values()))) for g in thinned]
        values: dict[str, float] = {}
        for name, quantiles in zip(heard, torch.stack(found).double().cpu().tolist(), strict=True):
            layer = f"decay/layer_{int(name.split('.')[2]):02d}"  # video_dit.blocks.3.gated_delta
            values |= {f"{layer}_{q}": math.exp(g) for q, g in zip(QUANTILES, quantiles, strict=True)}
            median = quantiles[list(QUANTILES).index("median")]
            if median < 0:  # a layer that forgets nothing has none
                values[f"{layer}_half_life_tokens"] = math.log(2) / -median
        return values

    def _inside(self, forward: bool) -> None:
        self._forward = forward

    @torch.no_grad()
    def _hear(self, name: str, g: Tensor) -> None:
        """g (B, S, H)."""
        if self._forward:
            self._heard.setdefault(name, []).append(g.detach()[:, :: _stride(g)].float().flatten())


def _stride(g: Tensor) -> int:
    """Of g (B, S, H), every STRIDE-th token is kept."""
    return max(1, -(-g.numel() // MOST))
