"""Canonical checkpoints: what a run is, independent of how it was split over processes. Format and reading.

A checkpoint is the folder `step-00000040/` with

- `manifest.json`: every tensor's dtype, full shape and pieces, every file's size and SHA-256, the run's plain state;
- `SECTION-RANK-00001.safetensors`, …: the tensors of the sections "model", "ema", "exp_avg", "exp_avg_sq", "rng", …;
- text files of the caller (`config.yaml`).

A tensor is stored as one or more pieces, boxes with an offset into the full tensor, so that a reader never needs to
know how many processes wrote it. The folder appears under its name only when everything in it is on disk. No pickles.
Written by `kairos_train.checkpoint.writing`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kairos_train.basics.errors import UserError
from kairos_train.basics.files import sha256_of
from kairos_train.basics.foreign_files import refuse_lfs_pointer
from kairos_train.checkpoint import boxes
from kairos_train.checkpoint.boxes import Box
from kairos_train.checkpoint.tensor_file import TensorFile

FORMAT = "kairos-checkpoint-1"
MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"


def checkpoint_path(parent: Path, step: int) -> Path:
    """The folder of step `step` in `parent`."""
    return Path(parent) / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step a folder name stands for, None when it is no checkpoint name."""
    digits = path.name.removeprefix("step-")
    return int(digits) if digits != path.name and digits.isdecimal() else None


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest without its own digest: the manifest carries state, so it is protected as well."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(to_json(rest).encode()).hexdigest()


def to_json(value: Any) -> str:
    """The same text for the same content, without line breaks: manifests of many ranks have many pieces.

    Raises:
        TypeError, ValueError: something that JSON can not keep, NaN among it.
    """
    return json.dumps(value, sort_keys=True, allow_nan=False) + "\n"


def box_of(piece: Mapping[str, Any]) -> Box:
    """Where a piece lies in the full tensor."""
    return boxes.at(piece["offset"], piece["shape"])


class CheckpointReader:
    """Reads a checkpoint folder, whole tensors or slices of them, however they were cut into pieces.

    Raises:
        UserError: no manifest, a damaged one, or one of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.manifest = _load_manifest(self.path)
        self._open: dict[str, TensorFile] = {}

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.manifest["step"]

    @property
    def state(self) -> dict[str, Any]:
        """The plain state given to `write_checkpoint`, as JSON keeps it."""
        return self.manifest["state"]

    def sections(self) -> list[str]:
        """Names of the sections."""
        return sorted(self.manifest["sections"])

    def names(self, section: str) -> list[str]:
        """Names of the tensors of one section."""
        return sorted(self._section(section))

    def shape(self, section: str, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return tuple(self._tensor(section, name)["shape"])

    def dtype(self, section: str, name: str) -> torch.dtype:
        """Of a tensor, as it is stored."""
        return getattr(torch, self._tensor(section, name)["dtype"])

    def text(self, name: str) -> str:
        """Content of a text file kept beside the tensors, e.g. "config.yaml"."""
        if name not in self.manifest["files"]:
            raise UserError(f"checkpoint {self.path}: holds no file {name!r}")
        return (self.path / name).read_text(encoding="utf-8")

    def read(self, section: str, name: str, slices: Sequence[slice] | None = None) -> Tensor:
        """Assemble a tensor, or the box `slices` of it (steps of 1, missing dimensions whole), on the CPU.

        Only the needed parts of the files are read.

        Raises:
            UserError: no such section or tensor, or pieces that do not cover the box.
        """
        info = self._tensor(section, name)
        box = boxes.resolve(info["shape"], slices or ())
        out = torch.empty(boxes.shape_of(box), dtype=getattr(torch, info["dtype"]))
        filled = 0
        for piece in info["pieces"]:
            common = boxes.intersection(box, box_of(piece))
            if common is not None:
                out[boxes.slices_of(common, boxes.offset_of(box))] = self._read_part(piece, common)
                filled += boxes.volume(common)
        if filled != out.numel():
            raise UserError(f"checkpoint {self.path}: the pieces of {section}/{name} do not cover it; it is damaged")
        return out

    def read_section(self, section: str) -> dict[str, Tensor]:
        """All tensors of one section, whole."""
        return {name: self.read(section, name) for name in self.names(section)}

    def verify(self) -> None:
        """Compare every file with its recorded size and SHA-256, and every tensor's pieces with its shape.

        Raises:
            UserError: names the first bad file or tensor.
        """
        if problem := find_problem(self.path, deep=True):
            raise UserError(f"checkpoint {self.path}: {problem}; use another checkpoint")

    def _read_part(self, piece: Mapping[str, Any], box: Box) -> Tensor:
        name = piece["file"]
        if name not in self._open:
            self._open[name] = TensorFile(self.path / name)
        return self._open[name].read(piece["key"], boxes.slices_of(box, piece["offset"]))

    def _section(self, section: str) -> dict[str, Any]:
        if section not in self.manifest["sections"]:
            raise UserError(
                f"checkpoint {self.path}: has no section {section!r}; it has {', '.join(self.sections()) or 'none'}"
            )
        return self.manifest["sections"][section]

    def _tensor(self, section: str, name: str) -> dict[str, Any]:
        tensors = self._section(section)
        if name not in tensors:
            raise UserError(f"checkpoint {self.path}: section {section!r} has no tensor {name!r}")
        return tensors[name]


def find_latest(parent: Path, *, deep: bool = False) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint below `parent`.

    Valid means: an undamaged manifest and every file present with its recorded size; with `deep` also with its SHA-256.

    Returns:
        The folder (None when there is none), and one warning for each newer folder that was skipped.
    """
    warnings = []
    for path in reversed(list_checkpoints(parent)):
        problem = find_problem(path, deep=deep)
        if problem is None:
            return path, warnings
        warnings.append(f"checkpoint {path} is skipped: {problem}")
    return None, warnings


def list_checkpoints(parent: Path) -> list[Path]:
    """Folders named like checkpoints, valid or not, oldest step first."""
    parent = Path(parent)
    if not parent.is_dir():
        return []
    return sorted((path for path in parent.iterdir() if step_of(path) is not None), key=step_of)


def find_problem(path: Path, *, deep: bool = False, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint folder, None when nothing is.

    Args:
        path: the folder.
        deep: compare SHA-256 and pieces as well, which reads every byte.
        share: (i, n): of the SHA-256, compare every n-th file's from the i-th on; others compare the rest.
    """
    try:
        manifest = _load_manifest(path)
    except UserError as error:
        return str(error)
    if step_of(path) not in (None, manifest["step"]):
        return f"{MANIFEST} is of step {manifest['step']}"
    for number, (name, recorded) in enumerate(sorted(manifest["files"].items())):
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != recorded["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {recorded['bytes']}"
        if deep and number % share[1] == share[0] and sha256_of(file) != recorded["sha256"]:
            return f"{name} is damaged (its SHA-256 is not the recorded one)"
    return find_untiled(manifest) if deep else None


def find_untiled(manifest: Mapping[str, Any]) -> str | None:
    """A tensor whose pieces overlap, leave a hole or lie outside it."""
    for section, tensors in manifest["sections"].items():
        for name, info in tensors.items():
            if not boxes.tiles(info["shape"], map(box_of, info["pieces"])):
                return f"the pieces of {section}/{name} do not tile it"
    return None


def _load_manifest(path: Path) -> dict[str, Any]:
    file = Path(path) / MANIFEST
    refuse_lfs_pointer(file)
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found = manifest.get("format"), manifest.get("sha256")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"checkpoint {path}: has no {MANIFEST}; give a checkpoint folder") from None
    except (ValueError, AttributeError):
        raise UserError(f"checkpoint {path}: {MANIFEST} is not readable; it is damaged") from None
    if found[0] != FORMAT:
        raise UserError(f"checkpoint {path}: format {found[0]!r} is not {FORMAT!r}")
    if found[1] != manifest_digest(manifest):
        raise UserError(f"checkpoint {path}: {MANIFEST} is damaged (its SHA-256 is not the recorded one)")
    return manifest
