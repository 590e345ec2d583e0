"""What an inspection found, before it is drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Vector:
    """Numbers of the actions or states: a sample of them (N, D), their ranges, and what they are of."""

    name: str
    values: np.ndarray
    low: list[float]
    high: list[float]
    of: str


@dataclass
class Strip:
    """One row of the contact sheet: pictures uint8 (n, H, W, 3) of a sample, and its text."""

    label: str
    text: str
    pictures: np.ndarray


@dataclass
class Findings:
    """All that is shown. `facts`: (name, text); `tables`: title -> rows, the first of which is the head."""

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    vectors: list[Vector] = field(default_factory=list)
    strips: list[Strip] = field(default_factory=list)
