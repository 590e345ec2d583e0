"""What packing asks of a source, and which source a location is.

A source is cut into units: what is packed at once and, after an interruption, again (an episode, some rows of a
manifest, a tar). A unit gives its samples one after the other and names those that cannot be used.

Shapes: T frames shown, H W height and width, L raw frames of an episode, A actions, da ds action and state dimensions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dataloaders.config import BelieveConfig, ClipConfig, LimitsConfig, WindowConfig
from dataloaders.consistency.report import Contradiction
from kairos_train.basics.foreign_files import one_plain_line
from kairos_train.basics.secrets import redacted

_LONGEST_NAME, _LONGEST_REASON = 240, 400  # characters


@dataclass(frozen=True)
class Clip:
    """One sample before it is encoded.

    Attributes:
        key: unique in its source, of letters, digits, `_` and `-`.
        frames: uint8 (T, H, W, 3) RGB.
        fps: of these frames.
        captions: text by variant, the primary first.
        meta: what else goes into the sample's JSON.
        actions, state: float32 (A, da) and (1, ds); None without a robot.
        scores: quality scores by name.
    """

    key: str
    frames: np.ndarray
    fps: float
    captions: dict[str, str]
    meta: dict[str, Any]
    actions: np.ndarray | None = None
    state: np.ndarray | None = None
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bad:
    """A sample, or a part of a unit, that cannot be used, as lists and errors show it: each one line, without the
    secrets of URLs, whatever the source calls itself."""

    name: str
    reason: str

    def __post_init__(self) -> None:
        for attribute, most in (("name", _LONGEST_NAME), ("reason", _LONGEST_REASON)):
            text = one_plain_line(redacted(getattr(self, attribute)), most)
            object.__setattr__(self, attribute, text)


@dataclass
class Unit:
    """Samples of one unit, decoded while they are iterated over.

    Attributes:
        name: what it is called when it cannot be used.
        samples: those that can be used and those that cannot; a UserError on the way condemns the unit as a whole.
        numbers: (states (L, ds), actions (L, da)) of its episode, for the statistics; None without a robot.
        runs: (first, end) raw frames of the parts of that episode, over whose ends no window reaches; empty: it is one.
        files: what it is read from, as far as these are local files.
        left_out: what of it no sample shows, counted by name while the samples are iterated over.
        contradictions: what two sources say of it differently, complete when the samples have been iterated over.
    """

    name: str
    samples: Iterator[Clip | Bad]
    numbers: tuple[np.ndarray, np.ndarray] | None = None
    runs: list[tuple[int, int]] = field(default_factory=list)
    files: tuple[Path, ...] = ()
    left_out: Counter[str] = field(default_factory=Counter)
    contradictions: list[Contradiction] = field(default_factory=list)


class Source(Protocol):
    """Samples to be packed. Made again in every process.

    Attributes:
        name: of its samples' keys: letters, digits, `_` and `-`.
        units: how many there are.
        identity: of all that decides what is packed but the bytes of `files`: JSON values.
        files: local files that hold what is packed.
        contradictions: what two sources say differently of the whole.
        sizes_differ: whether samples have frames and sizes of their own (clips) instead of the window's.
        fps: of raw frames; for clips, the one they are brought to.
    """

    name: str
    units: int
    identity: dict[str, Any]
    files: list[Path]
    contradictions: list[Contradiction]
    sizes_differ: bool
    fps: float

    def unit(self, number: int) -> Unit:
        """Raises UserError when the whole unit cannot be used."""

    def describe(self) -> dict[str, Any]:
        """What the index says about the source: JSON values."""

    def notes(self, statistics: Mapping[str, Any]) -> list[str]:
        """What the user who packs it should know: sentences. `statistics`: the content of dataset_stats.json."""


@dataclass(frozen=True)
class SourceSettings:
    """How a source is to be read."""

    window: WindowConfig
    clips: ClipConfig
    prompt_template: str
    captions: Path | None = None  # LeRobot: JSON lines with further captions and scores of episodes
    only_episodes: tuple[tuple[int, int], ...] | None = None  # LeRobot: (first, end) by episode index; None: its splits
    believe: BelieveConfig = field(default_factory=BelieveConfig)
    timestamp_tolerance: float = 1e-4  # seconds
    limits: LimitsConfig = field(default_factory=LimitsConfig)
