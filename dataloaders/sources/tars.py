"""Existing WebDataset shards as a source: tars of KEY.mp4 or KEY.jpg with KEY.json or KEY.txt. A unit is a tar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dataloaders.config import LimitsConfig
from dataloaders.consistency.report import Contradiction
from dataloaders.files.images import IMAGES
from dataloaders.files.tar_samples import tar_samples
from dataloaders.files.urls import base_name, is_url, parent, reason_of, size_of
from dataloaders.files.video_file import VIDEOS
from dataloaders.sources.base import Bad, Clip, SourceSettings, Unit
from dataloaders.sources.clips import cut_video, read_image
from dataloaders.sources.rows import FIELD, MOST_FIELDS, Row, plain_name, row_of, unknown_fields
from kairos_train.basics.errors import UserError
from kairos_train.basics.foreign_files import parse_json
from kairos_train.basics.secrets import redacted

_MEDIA = tuple(suffix[1:] for suffix in (*VIDEOS, *IMAGES))


class TarSource:
    """Clips of WebDataset tars; see `Source`.

    Args:
        location: a folder of tars, a tar, or a pattern with braces like `DIR/part-{000..012}.tar`, by path or URL.

    Raises:
        UserError: a tar does not exist or cannot be reached.
    """

    def __init__(self, location: Path | str, settings: SourceSettings) -> None:
        from braceexpand import braceexpand

        self._settings = settings
        if not is_url(location) and Path(location).is_dir():
            self._paths: list[Path | str] = sorted(Path(location).glob("*.tar"))
            name = Path(location).resolve().name
        elif not is_url(location) and Path(location).is_file():
            self._paths = [location]  # whatever braces its name has
            name = base_name(parent(location)) or base_name(location)
        else:
            pattern, mark, query = str(location).partition("?") if is_url(location) else (str(location), "", "")
            try:
                self._paths = [path + mark + query for path in braceexpand(pattern)]
            except ValueError as error:
                raise UserError(f"{location}: is neither a tar nor a pattern of tars ({error}); fix it") from error
            name = base_name(parent(self._paths[0])) or base_name(self._paths[0])
        self.name = plain_name(name)
        self.units, self.sizes_differ, self.fps = len(self._paths), True, settings.clips.fps
        self.files = [Path(path) for path in self._paths if not is_url(path)]
        self.contradictions: list[Contradiction] = []
        self._sizes = [self._size(path) for path in self._paths]

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "tars", "tars": [[base_name(p), size] for p, size in zip(self._paths, self._sizes)]}

    def describe(self) -> dict[str, Any]:
        return {"dataset": self.name, "tars": len(self._paths)}

    def notes(self, statistics: Mapping[str, Any]) -> list[str]:
        return []

    def unit(self, number: int) -> Unit:
        path, left_out = self._paths[number], Counter()
        files = () if is_url(path) else (Path(path),)
        return Unit(str(path), self._samples(number, path, left_out), files=files, left_out=left_out)

    def _samples(self, unit: int, path: Path | str, left_out: Counter[str]) -> Iterator[Clip | Bad]:
        for number, (key, members) in enumerate(tar_samples(path, self._settings.limits)):
            name = f"{path}: {key}"
            if isinstance(members, str):
                yield Bad(name, members)
                continue
            try:
                yield from self._clips_of(f"{self.name}-{unit:06d}-{number:06d}", key, name, members, left_out)
            except UserError as error:
                yield Bad(name, str(error).removeprefix(f"{redacted(name)}: "))

    def _clips_of(
        self, new_key: str, key: str, name: str, members: dict[str, bytes], left_out: Counter[str]
    ) -> Iterator[Clip]:
        media = [extension for extension in members if extension.lower() in _MEDIA]
        if len(media) != 1 or not {"json", "txt"} & set(members):
            raise UserError(
                f"{name}: has the members {', '.join(sorted(members))}; a sample is one of {', '.join(_MEDIA)} with a "
                "json or txt"
            )
        row, unused = _row(members, name, self._settings.limits)
        if len(left_out) < MOST_FIELDS:
            left_out.update(f"{FIELD}{field}" for field in unused)
        left_out["members of other kinds"] += len(set(members) - {*media, "json", "txt"})
        data, meta = members[media[0]], {"dataset": self.name, "source_key": key}
        given = {"suffix": f".{media[0].lower()}", "key": new_key, "name": name, "meta": meta}
        if given["suffix"] in IMAGES:
            yield read_image(data, row, self._settings, **given)
        else:
            yield from cut_video(data, row, self._settings, **given, left_out=left_out)

    @staticmethod
    def _size(path: Path | str) -> int:
        try:
            return size_of(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({reason_of(error)}); give existing tars") from error


def _row(members: dict[str, bytes], name: str, limits: LimitsConfig) -> tuple[Row, list[str]]:
    """(captions, scores and times of a sample: its JSON, with the text member as the caption where there is one; the
    fields of the JSON that mean nothing here)."""
    values: dict[str, Any] = {}
    try:
        if "json" in members:
            values = parse_json(members["json"], **limits.json)
            if not isinstance(values, dict):
                raise ValueError("is not an object")
        unused = unknown_fields(values)
        if "txt" in members:
            if len(members["txt"]) > limits.json["most_bytes"]:
                raise ValueError(f"its txt has {len(members['txt']):,} bytes")
            values = values | {"caption": members["txt"].decode("utf-8-sig")}
        return row_of({k: v for k, v in values.items() if k != "path"}, limits), unused
    except ValueError as error:
        raise UserError(f"{name}: its json or txt cannot be used ({error})") from error
