"""Videos and images named by a manifest as a source. A unit is a few rows of the manifest."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dataloaders.files.images import IMAGES
from dataloaders.files.places import place_of
from dataloaders.files.urls import base_name, is_url, parent, read_url, reason_of
from dataloaders.files.video_file import VIDEOS
from dataloaders.sources.base import Bad, Clip, SourceSettings, Unit
from dataloaders.sources.clips import cut_video, read_image
from dataloaders.sources.rows import Row, plain_name, read_manifest
from kairos_train.basics.errors import UserError
from kairos_train.basics.secrets import redacted

ROWS_PER_UNIT = 8
MANIFESTS = ("manifest.jsonl", "manifest.csv")


class VideoSource:
    """Clips of a manifest; see `Source`. Paths are relative to the manifest and stay below its folder, or are URLs.

    Args:
        location: the manifest, or the folder that holds a `manifest.jsonl` or `manifest.csv`.

    Raises:
        UserError: no manifest, or one that cannot be read.
    """

    def __init__(self, location: Path | str, settings: SourceSettings) -> None:
        path = location
        if not is_url(location) and Path(location).is_dir():
            path = next(Path(location) / name for name in MANIFESTS if (Path(location) / name).is_file())
        self._path, self._folder, self._settings = path, parent(path), settings
        self._manifest = read_manifest(path, settings.limits)
        self.name = plain_name(redacted(str(self._folder)).rstrip("/").rpartition("/")[2])
        self.units = -(-len(self._manifest.rows) // ROWS_PER_UNIT)
        self.sizes_differ, self.fps, self.contradictions = True, settings.clips.fps, []

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "manifest", "sha256": self._manifest.sha256}

    @property
    def files(self) -> list[Path]:
        return self._local([row for _, row in self._manifest.rows])

    def describe(self) -> dict[str, Any]:
        return {
            "dataset": self.name,
            "rows": len(self._manifest.rows),
            "columns_left_out": self._manifest.left_out,
        }

    def notes(self, statistics: Mapping[str, Any]) -> list[str]:
        return []

    def unit(self, number: int) -> Unit:
        rows = self._manifest.rows[number * ROWS_PER_UNIT : (number + 1) * ROWS_PER_UNIT]
        left_out: Counter[str] = Counter()
        files = tuple(self._local([row for _, row in rows]))
        return Unit(str(self._path), self._samples(rows, left_out), files=files, left_out=left_out)

    def _local(self, rows: list[Row | Bad]) -> list[Path]:
        """The files on this machine that rows name."""
        if is_url(self._folder):
            return []
        return [Path(self._folder) / row.path for row in rows if isinstance(row, Row) and not is_url(row.path)]

    def _samples(self, rows: list[tuple[int, Row | Bad]], left_out: Counter[str]) -> Iterator[Clip | Bad]:
        for number, row in rows:
            if isinstance(row, Bad):
                yield row
                continue
            try:
                yield from self._clips_of(number, row, left_out)
            except UserError as error:
                yield Bad(f"{self._path}: line {number}", str(error))

    def _clips_of(self, number: int, row: Row, left_out: Counter[str]) -> Iterator[Clip]:
        limits = self._settings.limits
        place = place_of(self._folder, row.path, limits)
        name, suffix = str(place), Path(base_name(place)).suffix.lower()
        if suffix not in (*VIDEOS, *IMAGES):
            raise UserError(f"{name}: is no video or image by its name; use one of {', '.join((*VIDEOS, *IMAGES))}")
        if not is_url(place) and not os.path.isfile(place):
            raise UserError(f"{name}: no such file")
        meta = {"dataset": self.name, "line": number, "path": redacted(row.path) if is_url(row.path) else row.path}
        given = {"suffix": suffix, "key": f"{self.name}-{number:06d}", "name": name, "meta": meta}
        try:
            whole = is_url(place) or suffix in IMAGES
            file = read_url(place, most_bytes=limits.member_bytes) if whole else place
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({reason_of(error)})") from error
        if suffix in IMAGES:
            yield read_image(file, row, self._settings, **given)
        else:
            yield from cut_video(file, row, self._settings, **given, left_out=left_out)
