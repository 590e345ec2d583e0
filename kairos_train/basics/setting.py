"""One line per setting in a schema dataclass: its default, the rule of its values, whether a resumed run may change it.

    lr: float = setting(1e-4, POSITIVE)  # learning rate after the warm-up
    precision: str = setting("bf16", one_of("bf16", "fp32"), on_resume="fixed")  # of activations and gradients
    train: TrainConfig = setting(factory=TrainConfig, on_resume="free")

A setting of whatever value of its type is a plain dataclass field. The comment documents the setting.
`kairos_train.config` holds values to their rules; `kairos_train.training.run_state` asks for `on_resume`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any

ON_RESUME = ("fixed", "free", "silent")
PATHS = ("any", "exists")


@dataclass(frozen=True)
class ValueRule:
    """Which values a setting may have.

    Attributes:
        holds: value → whether it is legal.
        fault: what is wrong with any other one, and the remedy; messages put "KEY=VALUE " before it.
        words: the legal ones, in words, behind "a number" and the like.
    """

    holds: Callable[[Any], bool]
    fault: str
    words: str


LARGEST = 2**53
"""Above it floating point numbers skip integers; no count and no size of a run is larger."""


def _is_meant(value: int | float) -> bool:
    return abs(value) <= LARGEST if isinstance(value, int) else math.isfinite(value)


POSITIVE = ValueRule(
    lambda value: value > 0 and _is_meant(value),
    "is not a positive number (integers: 2^53 at most); give one above 0",
    "above 0",
)
NOT_NEGATIVE = ValueRule(
    lambda value: value >= 0 and _is_meant(value),
    "is negative or not finite (integers: 2^53 at most); give 0 or more",
    "from 0 on",
)
SECONDS = ValueRule(
    lambda value: 0 < value <= 10**9, "is no time above 0 and of 10^9 seconds at most; give one", "of seconds, above 0"
)
FRACTION = ValueRule(lambda value: 0 <= value <= 1, "is outside [0, 1]; give a fraction", "from 0 to 1")


def up_to(largest: int, *, least: int = 1) -> ValueRule:
    """The rule of a count by which memory or processes grow before anything else could refuse it."""
    fault = f"is outside [{least}, {largest}]; give a number in it"
    return ValueRule(lambda value: least <= value <= largest, fault, f"from {least} to {largest:,}")


def one_of(*choices: Any) -> ValueRule:
    """The rule of a setting that has one of a few values."""
    names = ", ".join(map(str, choices))
    return ValueRule(lambda value: value in choices, f"is unknown; use one of {names}", f"one of {names}")


def setting(
    default: Any = MISSING,
    rule: ValueRule | None = None,
    *,
    factory: Callable[[], Any] | Any = MISSING,
    on_resume: str | None = None,
    path: str | None = None,
    names: Sequence[str] = (),
) -> Any:
    """A dataclass field with what its setting needs to be composed, checked and resumed.

    Args:
        default: of the setting; for lists, mappings and sections give `factory`, which makes it.
        rule: of its values; null passes always.
        on_resume: what becomes of another value when a run is resumed: "fixed", refused; "free", allowed and reported;
            "silent", allowed. Said of a section, it holds for the settings in it that say nothing themselves; of
            nothing at all, "fixed" holds.
        path: of a setting that is a path, or a list of them, in which `~` means the home folder: "exists" if there must
            be something where it is composed, else "any".
        names: what a mapping may have keys for; none: any.
    """
    assert on_resume in (None, *ON_RESUME), on_resume
    assert path in (None, *PATHS), path
    metadata = {"rule": rule, "on_resume": on_resume, "path": path, "names": tuple(names)}
    return field(default=default, default_factory=factory, metadata=metadata)
