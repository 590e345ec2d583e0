"""One episode of a closed loop: what is asked, and what came of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Episode:
    """One episode to be played. The layout is a function of `seed`, whichever policy plays."""

    policy: str
    env: str
    task: str
    seed: int


@dataclass(frozen=True)
class EpisodeOutcome:
    """What came of an episode: `steps` that were executed, and why it crashed where it did. A crash is a failure."""

    success: bool
    steps: int
    error: str | None = None


def noise_seed(episode: Episode, replan: int) -> int:
    """Seed of the sampling noise of an episode's `replan`-th plan.

    The policy's name is left out: the right and the wrong instruction are compared under the same noise.
    """
    text = f"{episode.env}:{episode.task}:{episode.seed}:{replan}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
