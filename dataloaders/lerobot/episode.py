"""An episode of a LeRobot dataset: its numbers, and its pictures when asked for.

Shapes: T frames of the episode, n frames asked for, H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataloaders.config import LimitsConfig
from dataloaders.consistency.pictures import Pairing
from dataloaders.consistency.report import Contradiction, refuse
from dataloaders.files.images import read_image
from dataloaders.files.places import place_of
from dataloaders.files.video import decode_mp4
from dataloaders.files.video_file import Fit
from dataloaders.lerobot.layout import VideoPlace
from kairos_train.basics.errors import UserError
from kairos_train.basics.foreign_files import shown


@dataclass
class DatasetEpisode:
    """One episode, its rows in the order of their frames.

    Attributes:
        index: its number in the dataset.
        length: T, in frames.
        tasks: its task strings; the one that its first frame carries comes first.
        columns: every numeric column, (T, dim) with dim 1 for scalars, in its own precision: float16 to float64, int64
            or bool. Numeric entries of `extra` stand here too, the same in every row.
        timestamps: the `timestamp` column as stored, float64 (T,), seconds.
        extra: values that the table of episodes holds beside LeRobot's own (for instance the seed).
        runs: (first, end) rows of its parts inside which no frame is missing.
        contradictions: of its rows.
        data_files: what its numbers are read from.
    """

    index: int
    length: int
    tasks: list[str]
    columns: dict[str, np.ndarray]
    timestamps: np.ndarray
    extra: dict[str, Any] = field(default_factory=dict)
    runs: list[tuple[int, int]] = field(default_factory=list)
    contradictions: list[Contradiction] = field(default_factory=list)
    data_files: tuple[Path, ...] = ()
    _videos: dict[str, VideoPlace] = field(default_factory=dict, repr=False)
    _images: dict[str, pa.ChunkedArray] = field(default_factory=dict, repr=False)
    _root: Path = field(default_factory=Path, repr=False)
    _limits: LimitsConfig = field(default_factory=LimitsConfig, repr=False)
    _row_tasks: list[str] | None = field(default=None, repr=False)
    _pair: Callable[[str, VideoPlace], Pairing] | None = field(default=None, repr=False)
    _pairings: dict[str, Pairing] = field(default_factory=dict, repr=False)

    @property
    def video_files(self) -> dict[str, Path]:
        """What the pictures are read from, by camera; inline images are in the data file."""
        return {key: place.path for key, place in self._videos.items()}

    @property
    def cameras(self) -> list[str]:
        """Those that have pictures of this episode."""
        return sorted([*self._videos, *self._images])

    def tasks_at(self, row: int) -> list[str]:
        """The task strings, that of the frame `row` first: in some sets the frames of an episode carry several."""
        if self._row_tasks is None:
            return list(self.tasks)
        mine = self._row_tasks[row]
        return [mine, *(task for task in self.tasks if task != mine)]

    def check_pictures(self, camera: str) -> list[Contradiction]:
        """What the rows and the video of a camera say differently; nothing of inline images.

        Raises:
            UserError: no such camera, or a missing or damaged file.
        """
        return [] if camera in self._images else self._pairing(camera).contradictions

    def frames(self, camera: str, indices: Sequence[int] | np.ndarray, *, fit: Fit | None = None) -> np.ndarray:
        """Pictures of one camera at the rows `indices` (in any order, repeats allowed), uint8 (n, H, W, 3).

        Args:
            fit: what is kept of a picture, as soon as it is decoded.

        Raises:
            UserError: no such camera, a missing or damaged file, or a contradiction between rows and video.
            IndexError: a row outside of the episode.
        """
        wanted = np.asarray(indices, np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.length):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} asked of an episode of {self.length}")
        if camera in self._images:
            column = self._images[camera]
            pictures = (self._picture(column[int(row)].as_py(), camera) for row in wanted)
            return np.stack([picture if fit is None else fit(picture) for picture in pictures])
        pairing = self._pairing(camera)
        refuse(pairing.contradictions, self._root)
        return decode_mp4(self._videos[camera].path, timestamps=pairing.times[wanted], fit=fit, limits=self._limits)

    def _pairing(self, camera: str) -> Pairing:
        if camera not in self._videos:
            known = ", ".join(self.cameras) or "none"
            raise UserError(f"episode {self.index}: camera {camera!r} has no pictures; cameras with pictures: {known}")
        if camera not in self._pairings:
            self._pairings[camera] = self._pair(camera, self._videos[camera])
        return self._pairings[camera]

    def _picture(self, value: Any, camera: str) -> np.ndarray:
        """uint8 (H, W, 3) of an inline image: its encoded bytes, or else the path of its file."""
        name = f"{self._root}: a picture of {camera!r}"
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, None)
        source = data if data is not None or not path else place_of(self._root, str(path), self._limits)
        if source is None or (isinstance(source, Path) and not os.path.isfile(source)):
            raise UserError(f"{name} has neither bytes nor a file (path {shown(path)}); restore it")
        return read_image(source, name=name, scale_16_bits=False, limits=self._limits)
