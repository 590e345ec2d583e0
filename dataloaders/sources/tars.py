"""Existing WebDataset shards as a source: tars of KEY.mp4 or KEY.jpg with KEY.json or KEY.txt. A unit is a tar.

Nothing is unpacked to the disk; a member's name is a name only. A sample is told by its key, `dir/000123` in
`dir/000123.mp4`, and its members lie side by side, as WebDataset has it.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dataloaders.consistency.report import Contradiction
from dataloaders.files.urls import base_name, is_url, open_url, parent, reason_of, size_of
from dataloaders.sources.base import Bad, Clip, SourceSettings, Unit
from dataloaders.sources.clips import IMAGES, VIDEOS, cut_video, read_image
from dataloaders.sources.rows import FIELD, Row, plain_name, row_of, unknown_fields
from kairos_train.basics.errors import UserError, one_line
from kairos_train.basics.foreign_files import is_lfs_pointer

_MEMBER = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]+)")
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

        self._clips = settings.clips
        if not is_url(location) and Path(location).is_dir():
            self._paths: list[Path | str] = sorted(Path(location).glob("*.tar"))
            name = Path(location).resolve().name
        elif not is_url(location) and Path(location).is_file():
            self._paths = [location]  # whatever braces its name has
            name = base_name(parent(location)) or base_name(location)
        else:
            try:
                self._paths = list(braceexpand(str(location)))
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
        for number, (key, members) in enumerate(tar_samples(path)):
            name = f"{path}: {key}"
            if isinstance(members, str):
                yield Bad(name, members)
                continue
            try:
                yield from self._clips_of(f"{self.name}-{unit:06d}-{number:06d}", key, name, members, left_out)
            except UserError as error:
                yield Bad(name, str(error).removeprefix(f"{name}: "))

    def _clips_of(
        self, new_key: str, key: str, name: str, members: dict[str, bytes], left_out: Counter[str]
    ) -> Iterator[Clip]:
        media = [extension for extension in members if extension.lower() in _MEDIA]
        if len(media) != 1 or not {"json", "txt"} & set(members):
            raise UserError(
                f"{name}: has the members {', '.join(sorted(members))}; a sample is one of {', '.join(_MEDIA)} with a "
                "json or txt"
            )
        row, unused = _row(members, name)
        left_out.update(f"{FIELD}{field}" for field in unused)
        left_out["members of other kinds"] += len(set(members) - {*media, "json", "txt"})
        meta = {"dataset": self.name, "source_key": key}
        data, given = members[media[0]], {"key": new_key, "name": name, "meta": meta}
        if f".{media[0].lower()}" in IMAGES:
            yield read_image(data, row, self._clips, **given)
        else:
            yield from cut_video(data, row, self._clips, **given, left_out=left_out)

    @staticmethod
    def _size(path: Path | str) -> int:
        try:
            return size_of(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({reason_of(error)}); give existing tars") from error


def _row(members: dict[str, bytes], name: str) -> tuple[Row, list[str]]:
    """(captions, scores and times of a sample: its JSON, with the text member as the caption where there is one; the
    fields of the JSON that mean nothing here)."""
    values: dict[str, Any] = {}
    try:
        if "json" in members:
            values = json.loads(members["json"])
            if not isinstance(values, dict):
                raise ValueError("is not an object")
        unused = unknown_fields(values)
        if "txt" in members:
            values = values | {"caption": members["txt"].decode("utf-8-sig")}
        return row_of({k: v for k, v in values.items() if k != "path"}), unused
    except ValueError as error:
        raise UserError(f"{name}: its json or txt cannot be used ({error})") from error


def tar_samples(path: Path | str) -> Iterator[tuple[str, dict[str, bytes] | str]]:
    """(key, members by extension, or why they cannot be used) of one tar; a damaged rest is the last of them."""
    key, members, seen = None, {}, set()
    try:
        with open_url(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.size < 0:  # tarfile would go back to what it has read, for ever
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                if member.isdir():
                    continue
                match = _MEMBER.fullmatch(member.name)
                if not member.isfile() or match is None or ".." in member.name.split("/") or member.name[0] == "/":
                    yield member.name, "is no plain file with a plain relative name"
                    continue
                if match[1] != key:
                    if key is not None:
                        yield key, members
                    key, members = match[1], {}
                    if key in seen:
                        members = "is in its tar a second time"
                    seen.add(key)
                if isinstance(members, dict) and match[2] in members:
                    members = f"has its member {match[2]} twice"
                if isinstance(members, dict):
                    members[match[2]] = tar.extractfile(member).read()
                tar.members.clear()  # else the headers of a large tar pile up
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0") or file.tell() != tar.offset + tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it ends without a tar's end mark")  # tarfile itself stops there in silence
        if key is not None:
            yield key, members
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        if key is None and _is_pointer(path):
            yield "its start", "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
        else:
            yield key or "its start", f"this and what follows cannot be read ({one_line(error)}): restore the tar"


def _is_pointer(path: Path | str) -> bool:
    try:
        with open_url(path) as file:
            return is_lfs_pointer(file.read(128))
    except OSError:
        return False
