"""Which source gives the next sample: weights, temperature, repeat limits.

Sample n of a run comes from source s with probability p_s ∝ w_s^(1/T) over the sources that are not used up, w_s being
the given weight or, without one, the number of its samples. The choice for n is drawn from (seed, n) alone, so it is
the same for every number of readers; how many samples each source has given so far is all the state there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dataloaders.loading.streams import uniform

_BLOCK = 4096  # draws made at once


class Exhausted(Exception):
    """Every source has been repeated as often as it may be."""


class Mixture:
    """The endless sequence of (source, place) of a run.

    Args:
        samples: of each source.
        weights: of each source; None: as many as it has samples.
        max_epochs: how often each source may be repeated; None: without limit.
        temperature: T; above 1 evens the shares out.
        seed: of the choices.
    """

    def __init__(
        self,
        samples: Sequence[int],
        weights: Sequence[float | None],
        max_epochs: Sequence[int | None],
        *,
        temperature: float,
        seed: int,
    ) -> None:
        given = np.array([n if w is None else w for n, w in zip(samples, weights)], dtype=np.float64)
        self._weights = np.where(given > 0, given, 0.0) ** (1 / temperature) * (given > 0)
        self._limits = [None if most is None else most * n for n, most in zip(samples, max_epochs)]
        self._seed = seed
        self._count = 0
        self._taken = [0] * len(samples)
        self._draws: tuple[int, np.ndarray] = (-1, np.empty(0))
        self._choose_among()

    def take(self, count: int, *, first: int = 0, stride: int = 1) -> list[tuple[int, int]]:
        """Advance by `count` samples and return the (source, place) of those at first, first + stride, ….

        Raises:
            Exhausted: fewer are left; the position is then undefined.
        """
        if len(self._open) == 1 and self._left(self._open[0]) >= count:
            source = self._open[0]
            start = self._taken[source]
            self._taken[source] += count
            self._count += count
            self._close_used_up(source)
            return [(source, start + i) for i in range(first, count, stride)]
        return [self.next() for _ in range(count)][first::stride]

    def next(self) -> tuple[int, int]:
        """The next sample's source and its place in that source's order.

        Raises:
            Exhausted: no source is left.
        """
        if not self._open:
            raise Exhausted
        source = self._open[0] if len(self._open) == 1 else self._draw()
        place = self._taken[source]
        self._taken[source] += 1
        self._count += 1
        self._close_used_up(source)
        return source, place

    def state_dict(self) -> dict[str, Any]:
        """Samples given so far: in all, and by each source."""
        return {"samples": self._count, "taken": list(self._taken)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the samples counted in `state`. Weights and limits may be others than before."""
        self._count, self._taken = int(state["samples"]), [int(n) for n in state["taken"]]
        self._choose_among()

    def _draw(self) -> int:
        block, i = divmod(self._count, _BLOCK)
        if self._draws[0] != block:
            self._draws = block, uniform(_BLOCK, self._seed, "mixture", block)
        return self._open[int(np.searchsorted(self._bounds, self._draws[1][i], side="right"))]

    def _left(self, source: int) -> float:
        limit = self._limits[source]
        return float("inf") if limit is None else limit - self._taken[source]

    def _close_used_up(self, source: int) -> None:
        if self._left(source) <= 0:
            self._choose_among()

    def _choose_among(self) -> None:
        """The sources that still give something, and the upper bounds of their shares (the last one open)."""
        self._open = [s for s in range(len(self._taken)) if self._left(s) > 0 and self._weights[s] > 0]
        weights = self._weights[self._open]
        self._bounds = np.cumsum(weights)[:-1] / weights.sum() if self._open else np.empty(0)
