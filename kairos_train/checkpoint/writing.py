"""Writing canonical checkpoints: every rank its own part into one temporary folder, rank 0 puts them together.

    .tmp-…/model-00003-00001.safetensors   pieces that rank 3 holds
    .tmp-…/part-00003.json                 what it wrote: pieces, sizes, digests; its own plain state
    .tmp-…/manifest.json                   rank 0, from all parts, when all are there
    step-00000040/                         the folder under its name

Nothing is gathered: a part costs its rank what it holds. A checkpoint of one process has one part.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

import kairos_train
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import beside, describe_file, sync, write_whole
from kairos_train.checkpoint.canonical import (
    FORMAT,
    MANIFEST,
    TEMPORARY,
    CheckpointReader,
    checkpoint_path,
    find_problem,
    find_untiled,
    manifest_digest,
    to_json,
)
from kairos_train.checkpoint.tensor_file import Stored, write_tensors

FILE_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: `tensor` is what lies at `offset` in the tensor `name` of full shape `shape`."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor

    @property
    def key(self) -> str:
        """Its name in a file: the tensor's, with the box where it is not all of it."""
        if tuple(self.tensor.shape) == self.shape:
            return self.name
        return f"{self.name}[{','.join(f'{at}:{at + n}' for at, n in zip(self.offset, self.tensor.shape))}]"


Sections = Mapping[str, Sequence[Piece]]
"""{section: pieces}."""


def whole_pieces(tensors: Mapping[str, Tensor]) -> list[Piece]:
    """Whole tensors as one piece each."""
    return [Piece(name, tuple(t.shape), (0,) * t.ndim, t) for name, t in tensors.items()]


def write_checkpoint(
    folder_parent: Path,
    step: int,
    *,
    sections: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    files: Mapping[str, str],
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write one checkpoint of whole tensors, completely or not at all. Called by one process.

    Args:
        folder_parent: the run's `checkpoints` folder, made when missing. What killed writers left in it is removed.
        step: optimiser steps done.
        sections: {section: {tensor name: tensor of any device and dtype}}.
        state: plain data that JSON keeps as it is (tuples come back as lists, keys as strings), without NaN.
        files: {file name: text} to be kept beside the tensors.
        file_bytes: a tensor file is closed before it would grow beyond this; one larger tensor has a file of its own.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: the step is there already with other content. An identical one is left as it is, a damaged one is
            replaced.
    """
    parent = Path(folder_parent)
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent)
    target = checkpoint_path(parent, step)
    folder = beside(target, f"{TEMPORARY}{target.name}-")
    try:
        pieces = {section: whole_pieces(tensors) for section, tensors in sections.items()}
        part = write_part(folder, 0, pieces, file_bytes=file_bytes)
        publish(folder, target, [part], state=state, files=files)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already when it was published
    return target


def remove_leftovers(parent: Path) -> None:
    """Remove what killed writers left. Only while nobody writes there."""
    for stale in Path(parent).glob(f"{TEMPORARY}*"):
        _remove(stale)


def discard(path: Path, label: str) -> None:
    """Remove a checkpoint, whatever lies there under its name.

    It is renamed first, so that a kill half-way leaves no half checkpoint. What the disk does not let go of then is
    among the leftovers.

    Raises:
        OSError: it cannot be renamed.
    """
    doomed = path.with_name(f"{TEMPORARY}{label}-{path.name}")
    path.rename(doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def write_part(
    folder: Path, rank: int, sections: Sections, *, file_bytes: int = FILE_BYTES, two_threads: bool = True
) -> dict[str, Any]:
    """Write the pieces that one rank holds.

    Args:
        folder: the temporary folder, there already.
        rank: who writes; part of the files' names.
        sections: its pieces; every rank names the same sections, also those it holds nothing of.
        file_bytes: as in `write_checkpoint`.
        two_threads: as in `write_tensors`.

    Returns:
        What `publish` needs to know of this part, as JSON keeps it: {"sections", "files"}.
    """
    described: dict[str, dict[str, Any]] = {}
    files: dict[str, Any] = {}
    for section, pieces in sections.items():
        tensors = described.setdefault(section, {})
        for number, group in enumerate(_split(pieces, file_bytes), 1):
            file = f"{section}-{rank:05d}-{number:05d}.safetensors"
            tensors_of = {piece.key: Stored.of(piece.tensor) for piece in group}
            files[file] = write_tensors(folder / file, tensors_of, two_threads=two_threads, wait=False)
            for piece in group:
                dtype = str(piece.tensor.dtype).removeprefix("torch.")
                info = tensors.setdefault(piece.name, {"dtype": dtype, "shape": list(piece.shape), "pieces": []})
                box = {"offset": list(piece.offset), "shape": list(piece.tensor.shape)}
                info["pieces"].append({"file": file, "key": piece.key, **box})
    # Once all are written: waiting for one file after the other leaves the disk idle in between.
    for file in files:
        sync(folder / file)
    return {"sections": described, "files": files}


def publish(
    folder: Path,
    target: Path,
    parts: Sequence[Mapping[str, Any]],
    *,
    state: Mapping[str, Any],
    files: Mapping[str, str],
) -> None:
    """Put the parts of all ranks together and give the temporary folder its name.

    Args:
        folder: with the files of all parts.
        target: the checkpoint's folder.
        parts: of all ranks, in their order.
        state, files: as in `write_checkpoint`.

    Raises:
        UserError: the parts do not make whole tensors, or as in `write_checkpoint`.
    """
    sections = _merge(parts)
    described = {file: info for part in parts for file, info in part["files"].items()}
    if problem := find_untiled({"sections": sections, "files": described}):
        raise UserError(f"checkpoint {target}: {problem}; not written")
    for file, info in described.items():
        if (folder / file).stat().st_size != info["bytes"]:
            raise OSError(f"{folder / file}: has not the {info['bytes']} bytes that were written to it")
    for file, text in files.items():
        _write_text(folder / file, text)
        described[file] = describe_file(folder / file)
    manifest = {
        "format": FORMAT,
        "step": int(target.name.removeprefix("step-")),
        "sections": sections,
        "state": dict(state),
        "files": described,
        "versions": {part.__name__: part.__version__ for part in (kairos_train, torch, safetensors)},
    }
    manifest["sha256"] = manifest_digest(manifest)
    _write_text(folder / MANIFEST, to_json(manifest))
    for path in folder.iterdir():
        if path.name not in described and path.name != MANIFEST:
            path.unlink()
    sync(folder)
    _rename(folder, target, manifest)


def leave_part(folder: Path, rank: int, content: Mapping[str, Any]) -> None:
    """Put a rank's part, or its failure, where rank 0 looks for it; all of it at once."""
    write_whole(part_path(folder, rank), to_json(content), durable=True)


def read_part(folder: Path, rank: int) -> dict[str, Any] | None:
    """What `leave_part` put there; None while there is nothing."""
    try:
        return json.loads(part_path(folder, rank).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def part_path(folder: Path, rank: int) -> Path:
    return folder / f"part-{rank:05d}.json"


def _merge(parts: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sections of all parts, every tensor with its pieces in the order of their offsets."""
    merged: dict[str, dict[str, Any]] = {}
    for part in parts:
        for section, tensors in part["sections"].items():
            into = merged.setdefault(section, {})
            for name, info in tensors.items():
                there = into.setdefault(name, {**info, "pieces": []})
                if (there["dtype"], there["shape"]) != (info["dtype"], info["shape"]):
                    raise ValueError(f"{section}/{name}: ranks hold pieces of different tensors")
                there["pieces"] += info["pieces"]
    for tensors in merged.values():
        for info in tensors.values():
            info["pieces"].sort(key=lambda piece: piece["offset"])
    return merged


def _rename(folder: Path, target: Path, manifest: Mapping[str, Any]) -> None:
    if os.path.lexists(target):
        if not find_problem(target, deep=True):
            there = CheckpointReader(target).manifest
            if all(there[key] == json.loads(to_json(manifest[key])) for key in ("sections", "state", "files")):
                shutil.rmtree(folder)
                return
            raise UserError(
                f"checkpoint {target}: exists with other content, and checkpoints are never overwritten;"
                " resume from it, or remove it"
            )
        discard(target, "damaged")
    folder.rename(target)
    sync(target.parent)


def _split(pieces: Iterable[Piece], file_bytes: int) -> Iterator[list[Piece]]:
    """Groups of pieces, each at most `file_bytes` large or of one piece."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.tensor.nbytes > file_bytes:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.tensor.nbytes
    if group:
        yield group


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
    sync(path)
