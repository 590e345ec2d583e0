"""Where a file lies that a stranger's manifest or table names: below its folder, or where a setting lets it.

Links to files are followed, as caches of hubs are made of them; links to folders lead wherever their author wanted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from dataloaders.config import LimitsConfig
from dataloaders.files.urls import LOCAL, REMOTE, is_url, join, on_this_machine, refuse_malformed, scheme_of
from kairos_train.basics.errors import UserError
from kairos_train.basics.foreign_files import shown


def place_of(folder: Path | str, name: str, limits: LimitsConfig) -> Path | str:
    """The path or URL of the file that is called `name` in a table that lies in `folder`.

    It may be the URL of a remote file. A file of this machine must be in `folder` itself or in one of
    `limits.allowed_roots`; an address of another kind must begin like one of these.

    Raises:
        UserError: it is somewhere else.
    """
    if not is_url(name):
        return join(folder, name) if is_url(folder) else _inside(Path(folder), name, limits)
    scheme = scheme_of(name)
    chained = "::" in name and not scheme.startswith("http")
    if scheme in REMOTE and not chained:
        refuse_malformed(name)
        return name
    if scheme in LOCAL and not chained:
        return _inside(None, str(on_this_machine(name)), limits)
    if not chained and any(_begins(name, root) for root in limits.allowed_roots):
        return name
    raise UserError(
        f"{folder}: names {shown(name)}; files may be named by {', '.join(f'{s}://' for s in REMOTE)}, or, where "
        "data.limits.allowed_roots has its beginning, by an address that is not made of several"
    )


def refuse_linked_folders(root: Path, files: Iterable[Path], limits: LimitsConfig) -> None:
    """Return unless a file that a dataset in `root` names lies behind a folder that is a link out of it.

    Raises:
        UserError: as `place_of` does.
    """
    for parent in sorted({file.parent for file in files}):
        _inside(root, str(parent / "."), limits)


def _inside(folder: Path | None, name: str, limits: LimitsConfig) -> Path:
    """`name` below `folder`, or wherever it is absolute, when its folder lies in `folder` or in an allowed root."""
    path = Path(name) if folder is None else folder / name
    roots = [folder] if folder is not None else []
    roots += [
        Path(on_this_machine(root)).expanduser()
        for root in limits.allowed_roots
        if not is_url(root) or scheme_of(root) in LOCAL
    ]
    if name and "\0" not in name:
        place = Path(os.path.realpath(path.parent))
        if any(place.is_relative_to(os.path.realpath(root)) for root in roots):
            return path
    raise UserError(
        f"{folder or 'a manifest'}: the file name {shown(name)} leads out of the folder; names must be relative, "
        "without '..' and linked folders, or lie where data.limits.allowed_roots says"
    )


def _begins(name: str, root: str) -> bool:
    return is_url(root) and name.startswith(f"{root.rstrip('/')}/") and ".." not in name.split("/")
