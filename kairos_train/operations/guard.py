"""Which steps are bad, and what becomes of the run then: skip, go back, stop.

A step is bad when its loss or gradient norm is not finite, or its loss is a spike: more than `guard.spike_factor` times
the median of the good steps within the last `guard.window`. Its update is dropped. The bad steps of the window are
counted; beyond `guard.skips` the weights themselves are suspected, and the run goes back.

All decisions are functions of numbers that are equal on all ranks, and the memory is part of the checkpoint: a resumed
run decides as one that was not interrupted.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from kairos_train.config.operation_schema import GuardConfig

LEAST = 20
"""Good steps without which no loss is a spike (ours): the first losses of a fresh model fall fast."""


class Guard:
    """The memory of the last steps.

    Args:
        config: window, budget, factor.
        tolerant: whether bad steps are survived at all (`train.on_nonfinite=skip`).
        rollbacks: how often the run has gone back already, in all its lives.
    """

    def __init__(self, config: GuardConfig, *, tolerant: bool, rollbacks: int = 0) -> None:
        self.config, self.tolerant, self.rollbacks = config, tolerant, rollbacks
        self._good: deque[tuple[int, float]] = deque()  # step, loss
        self._bad: deque[int] = deque()

    def refuses(self, loss: float) -> bool:
        """Whether the update of a step with this loss must be dropped; asked before its last backward pass."""
        return not math.isfinite(loss) or self.is_spike(loss)

    def is_spike(self, loss: float) -> bool:
        """A finite loss far above the others."""
        factor = self.config.spike_factor
        if factor is None or len(self._good) < LEAST or not math.isfinite(loss):
            return False
        return loss > factor * median(value for _, value in self._good)

    def note(self, step: int, loss: float, *, good: bool) -> None:
        """Remember a finished step."""
        if good:
            self._good.append((step, loss))
        else:
            self._bad.append(step)
        first = step - self.config.window + 1
        while self._good and self._good[0][0] < first:
            self._good.popleft()
        while self._bad and self._bad[0] < first:
            self._bad.popleft()

    @property
    def exceeded(self) -> bool:
        """Whether there were more bad steps than the budget allows."""
        return len(self._bad) > (self.config.skips if self.tolerant else 0)

    @property
    def may_go_back(self) -> bool:
        return self.tolerant and self.rollbacks < self.config.rollbacks

    @property
    def first_bad(self) -> int:
        """The first bad step of the window. A checkpoint of an earlier step is good.

        Raises:
            ValueError: there is none.
        """
        if not self._bad:
            raise ValueError("no bad step is remembered")
        return self._bad[0]

    def describe(self) -> str:
        """The bad steps of the window, in words."""
        steps = ", ".join(map(str, self._bad))
        return f"bad steps {steps} within guard.window={self.config.window} (guard.skips={self.config.skips})"

    def state_dict(self) -> dict[str, Any]:
        """Plain state for a checkpoint. Infinite losses are never good, so JSON keeps it."""
        return {"good": [list(entry) for entry in self._good], "bad": list(self._bad)}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Remember what a checkpoint does; nothing where an older version wrote it."""
        state = state or {"good": [], "bad": []}
        self._good = deque((int(step), float(loss)) for step, loss in state["good"])
        self._bad = deque(map(int, state["bad"]))
