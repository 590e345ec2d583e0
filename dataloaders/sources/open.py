"""A source by what lies at its location."""

from __future__ import annotations

from pathlib import Path

from dataloaders.files.urls import base_name, is_url, on_this_machine, refuse_malformed
from dataloaders.sources.base import Source, SourceSettings
from kairos_train.basics.errors import UserError


def open_source(location: Path | str, settings: SourceSettings) -> Source:
    """The source at a path or URL: a LeRobot dataset, a manifest (or its folder), WebDataset tars.

    Raises:
        UserError: it is none of these, or cannot be read.
    """
    location = on_this_machine(location)
    if is_url(location):
        refuse_malformed(str(location))
    kind = kind_of(location)
    if settings.captions is not None and kind != "lerobot":
        raise UserError(
            f"--captions {settings.captions}: is for LeRobot datasets; {location} holds captions of its own"
        )
    if settings.only_episodes is not None and kind != "lerobot":
        raise UserError(f"--only-episodes: is for LeRobot datasets; {location} has no episodes")
    if kind == "lerobot":
        from dataloaders.sources.lerobot import LeRobotSource

        return LeRobotSource(Path(location), settings)
    if kind == "manifest":
        from dataloaders.sources.videos import VideoSource

        return VideoSource(location, settings)
    from dataloaders.sources.tars import TarSource

    return TarSource(location, settings)


def is_source(location: Path | str) -> bool:
    """Whether a location holds something to be packed, not a folder of shards that was."""
    location = on_this_machine(location)
    if is_url(location) or is_source_file(location):
        return is_source_file(location)
    folder = Path(location)
    return not (folder / "index.json").is_file() and (
        (folder / "meta").is_dir()
        or any((folder / name).is_file() for name in ("manifest.jsonl", "manifest.csv"))
        or next(folder.glob("*.tar"), None) is not None
    )


def is_source_file(location: Path | str) -> bool:
    """Whether a location is by its name a manifest or a tar; the query of a signed URL is no part of that."""
    return base_name(location).endswith((".jsonl", ".csv", ".tar"))


def kind_of(location: Path | str) -> str:
    """lerobot, manifest or tars. Raises UserError when it is none of them."""
    location = on_this_machine(location)
    if is_source_file(location):
        return "tars" if base_name(location).endswith(".tar") else "manifest"
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
