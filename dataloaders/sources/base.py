"""What packing asks of a source, and which source a location is.

A source is cut into units: what is packed at once and, after an interruption, again (an episode, some rows of a
manifest, a tar). A unit gives its samples one after the other and names those that cannot be used.

Shapes: T frames shown, H W height and width, L raw frames of an episode, A actions, da ds action and state dimensions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dataloaders.files.urls import is_url
from kairos_train.basics.errors import UserError
from kairos_train.config.schema import ClipConfig, WindowConfig


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


@dataclass(frozen=True)
class Bad:
    """A sample, or a part of a unit, that cannot be used."""

    name: str
    reason: str


@dataclass
class Unit:
    """Samples of one unit, decoded while they are iterated over.

    Attributes:
        name: what it is called when it cannot be used.
        samples: those that can be used and those that cannot; a UserError on the way condemns the unit as a whole.
        numbers: (states (L, ds), actions (L, da)) of its episode, for the statistics; None without a robot.
        files: what it is read from, as far as these are local files.
        left_out: what of it no sample shows, counted by name while the samples are iterated over.
    """

    name: str
    samples: Iterator[Clip | Bad]
    numbers: tuple[np.ndarray, np.ndarray] | None = None
    files: tuple[Path, ...] = ()
    left_out: Counter[str] = field(default_factory=Counter)


class Source(Protocol):
    """Samples to be packed. Made anew in every process.

    Attributes:
        name: of its samples' keys: letters, digits, `_` and `-`.
        units: how many there are.
        identity: of what is to be packed (not of every byte): JSON values.
        sizes_differ: whether samples have frames and sizes of their own (clips) instead of the window's.
        fps: of raw frames; for clips, the one they are brought to.
    """

    name: str
    units: int
    identity: dict[str, Any]
    sizes_differ: bool
    fps: float

    def unit(self, number: int) -> Unit:
        """Raises UserError when the whole unit cannot be used."""

    def describe(self) -> dict[str, Any]:
        """What the index says about the source: JSON values."""


@dataclass(frozen=True)
class SourceSettings:
    """How a source is to be read."""

    window: WindowConfig
    clips: ClipConfig
    prompt_template: str
    captions: Path | None = None  # LeRobot: JSON lines with further captions and scores of episodes


def open_source(location: Path | str, settings: SourceSettings) -> Source:
    """The source at a path or URL: a LeRobot dataset, a manifest (or its folder), WebDataset tars.

    Raises:
        UserError: it is none of these, or cannot be read.
    """
    kind = kind_of(location)
    if settings.captions is not None and kind != "lerobot":
        raise UserError(
            f"--captions {settings.captions}: is for LeRobot datasets; {location} holds captions of its own"
        )
    if kind == "lerobot":
        from dataloaders.sources.lerobot import LeRobotSource

        return LeRobotSource(Path(location), settings)
    if kind == "manifest":
        from dataloaders.sources.videos import VideoSource

        return VideoSource(location, settings)
    from dataloaders.sources.tars import TarSource

    return TarSource(location, settings)


def kind_of(location: Path | str) -> str:
    """lerobot, manifest or tars. Raises UserError when it is none of them."""
    text = str(location)
    if text.endswith((".jsonl", ".csv")):
        return "manifest"
    if text.endswith(".tar"):
        return "tars"
    if not is_url(location):
        folder = Path(location)
        if (folder / "meta").is_dir():
            return "lerobot"
        if (folder / "index.json").is_file() and (folder / "dataset_stats.json").is_file():
            raise UserError(f"{folder}: was packed already; give the dataset that it was packed from")
        if any((folder / name).is_file() for name in ("manifest.jsonl", "manifest.csv")):
            return "manifest"
        if next(folder.glob("*.tar"), None) is not None:
            return "tars"
        if not folder.exists():
            raise UserError(f"{folder}: does not exist; give a dataset")
    raise UserError(
        f"{location}: is no source; give a LeRobot dataset (with meta/), a manifest .jsonl or .csv or the folder of a "
        "manifest.jsonl, or WebDataset tars (a folder, FILE.tar or a pattern like DIR/part-{000..012}.tar)"
    )
