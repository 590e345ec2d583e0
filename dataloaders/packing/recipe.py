"""What decides the bytes of a packing, and whether a finished folder has them."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dataloaders.config import LimitsConfig
from dataloaders.shards import INDEX, read_index
from dataloaders.sources.base import Source, SourceSettings
from kairos_train.basics.errors import UserError

VERSION = 3
"""Of what packing makes of a source: another one does not go on with an older one's work."""


def recipe_of(
    source: Source, settings: SourceSettings, encoders: dict[str, Any] | None, options: dict[str, Any]
) -> str:
    """Hash of everything that decides the bytes, but for those of the files that hold rows and pictures."""
    parts = {
        "version": VERSION,
        "source": source.identity,
        "name": source.name,
        "window": None if source.sizes_differ else asdict(settings.window),
        "clips": asdict(settings.clips) if source.sizes_differ else None,
        "prompt_template": settings.prompt_template,
        "encoders": encoders,
        "options": options | _widened(settings.limits),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _widened(limits: LimitsConfig) -> dict[str, Any]:
    """The limits that are not the defaults: they decide what is left out."""
    usual = asdict(LimitsConfig())
    changed = {name: value for name, value in asdict(limits).items() if value != usual[name]}
    return {"limits": changed} if changed else {}


def files_digest(source: Source) -> str:
    """Hash of the sizes of the files that hold rows and pictures."""
    sizes = [file.stat().st_size if os.path.isfile(file) else None for file in source.files]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


def done_before(out: Path, recipe: str, source: Source) -> dict[str, Any]:
    """The index of a folder when it was packed from the same source in the same way.

    Rows and pictures are not read again: they count as the same while their files have the sizes that they had, and
    none was written after the folder.

    Raises:
        UserError: it was not.
    """
    found, other = read_index(out) if (out / INDEX).is_file() else None, "remove it or choose another output folder"
    if found is None:
        raise UserError(f"{out}: exists and holds something else; {other}")
    if found.recipe != recipe:
        raise UserError(f"{out}: exists and was packed from another source or with other settings; {other}")
    packed = (out / INDEX).stat().st_mtime_ns
    if late := next((file for file in source.files if os.path.isfile(file) and file.stat().st_mtime_ns > packed), None):
        raise UserError(
            f"{out}: was packed before {late} was written; {other}, or, if that file has the same content, `touch` "
            f"{out / INDEX}"
        )
    if found.files_sha256 != files_digest(source):
        raise UserError(f"{out}: was packed from files of other sizes; {other}")
    return found.to_dict()
