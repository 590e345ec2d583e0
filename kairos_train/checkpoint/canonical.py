"""Canonical checkpoints: what a run is, independent of how it was split over processes. Format and reading.

A checkpoint is the folder `step-00000040/` with

- `manifest.json`: every tensor's dtype, full shape and pieces, every file's size and SHA-256, the run's plain state;
- `SECTION-RANK-00001.safetensors`, …: the tensors of the sections "model", "ema", "exp_avg", "exp_avg_sq", "rng", …;
- text files of the caller (`config.yaml`).

A tensor is stored as one or more pieces, boxes with an offset into the full tensor, so that a reader never needs to
know how many processes wrote it. The folder appears under its name only when everything in it is on disk. No pickles.
Written by `kairos_train.checkpoint.writing`.

Damage is whatever keeps a checkpoint from being read: wrong bytes, and also a file system that gives none of them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kairos_train.basics.errors import MachineFault, UserError
from kairos_train.basics.files import is_plain_name, sha256_of
from kairos_train.basics.foreign_files import check_regular, parse_json, read_bytes, read_text, refuse_lfs_pointer
from kairos_train.checkpoint import boxes
from kairos_train.checkpoint.boxes import Box
from kairos_train.checkpoint.tensor_file import CODES, TensorFile

FORMAT = "kairos-checkpoint-1"
MANIFEST = "manifest.json"
MANIFEST_BYTES = 2**30  # at most; of the largest models on thousands of ranks a tenth
TEMPORARY = ".tmp-"
TENSORS = ".safetensors"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODES}


def checkpoint_path(parent: Path, step: int) -> Path:
    """The folder of step `step` in `parent`."""
    return Path(parent) / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step a folder name stands for, None when it is no name that `checkpoint_path` gives."""
    digits = path.name.removeprefix("step-")
    step = int(digits) if digits.isascii() and digits.isdecimal() else 0
    return step if path.name == checkpoint_path(path.parent, step).name else None


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
        self._sections: dict[str, dict[str, Any]] = {}  # those that have been looked at
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
        return DTYPES[self._tensor(section, name)["dtype"]]

    def text(self, name: str) -> str:
        """Content of a text file kept beside the tensors, e.g. "config.yaml"."""
        if name not in self.manifest["files"]:
            raise UserError(f"checkpoint {self.path}: holds no file {name!r}")
        return read_text(self.path / name, most_bytes=self.manifest["files"][name]["bytes"])

    def read(self, section: str, name: str, slices: Sequence[slice] | None = None) -> Tensor:
        """Assemble a tensor, or the box `slices` of it (steps of 1, missing dimensions whole), on the CPU.

        Only the needed parts of the files are read.

        Raises:
            UserError: no such section or tensor, or pieces that do not cover the box.
        """
        info = self._tensor(section, name)
        box = boxes.resolve(info["shape"], slices or ())
        out = torch.empty(boxes.shape_of(box), dtype=DTYPES[info["dtype"]])
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

    def verify(self, *sections: str) -> None:
        """Compare texts and the files of some sections (none given: of all) with their recorded size and SHA-256, and
        of all sections every tensor's pieces with its shape.

        Raises:
            UserError: names the first bad file or tensor.
        """
        needed = {
            piece["file"] for name in sections for info in self._section(name).values() for piece in info["pieces"]
        }
        for name, recorded in sorted(self.manifest["files"].items()):
            counts = not sections or name in needed or not name.endswith(TENSORS)
            if counts and (problem := _find_damage(self.path / name, recorded, read=True)):
                raise UserError(f"checkpoint {self.path}: {name} {problem}; use another checkpoint")
        if problem := find_untiled(self.manifest):
            raise UserError(f"checkpoint {self.path}: {problem}; use another checkpoint")

    def _read_part(self, piece: Mapping[str, Any], box: Box) -> Tensor:
        name = piece["file"]
        if name not in self._open:
            self._open[name] = TensorFile(self.path / name)
        return self._open[name].read(piece["key"], boxes.slices_of(box, piece["offset"]))

    def _section(self, section: str) -> dict[str, Any]:
        if section not in self._sections:
            if section not in self.manifest["sections"]:
                raise UserError(
                    f"checkpoint {self.path}: has no section {section!r}; it has {', '.join(self.sections()) or 'none'}"
                )
            if problem := _find_misdescribed(self.manifest, section):
                raise UserError(f"checkpoint {self.path}: {problem}; use another checkpoint")
            self._sections[section] = self.manifest["sections"][section]
        return self._sections[section]

    def _tensor(self, section: str, name: str) -> dict[str, Any]:
        tensors = self._section(section)
        if name not in tensors:
            raise UserError(f"checkpoint {self.path}: section {section!r} has no tensor {name!r}")
        return tensors[name]


def find_latest(parent: Path, *, deep: bool = False) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint below `parent`.

    Valid means: an undamaged manifest, every file present with its recorded size, texts with their SHA-256; with `deep`
    all files with their SHA-256.

    Returns:
        The folder (None when there is none), and one warning for each newer folder that was skipped.

    Raises:
        MachineFault: as `list_checkpoints`.
    """
    warnings = []
    for path in reversed(list_checkpoints(parent)):
        problem = find_problem(path, deep=deep)
        if problem is None:
            return path, warnings
        warnings.append(f"checkpoint {path} is skipped: {problem}")
    return None, warnings


def list_checkpoints(parent: Path) -> list[Path]:
    """Folders named like checkpoints, valid or not, oldest step first; none where nothing is.

    Raises:
        MachineFault: there is something, and it cannot be looked into.
    """
    try:
        return sorted((path for path in Path(parent).iterdir() if step_of(path) is not None), key=step_of)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise MachineFault(f"{parent}: cannot be listed ({error.strerror}); see to the disk, start it again") from error


def find_problem(path: Path, *, deep: bool = False, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint folder, None when nothing is. Whatever the file system says is an answer.

    Args:
        path: the folder.
        deep: compare the SHA-256 of tensors and their pieces as well, which reads every byte.
        share: (i, n): of the SHA-256 of tensors, compare every n-th file's from the i-th on; others compare the rest.
    """
    try:
        manifest = _load_manifest(path)
    except UserError as error:
        return str(error)
    if step_of(path) not in (None, manifest["step"]):
        return f"{MANIFEST} is of step {manifest['step']}"
    for number, (name, recorded) in enumerate(sorted(manifest["files"].items())):
        read = not name.endswith(TENSORS) or (deep and number % share[1] == share[0])
        if problem := _find_damage(Path(path) / name, recorded, read=read):
            return f"{name} {problem}"
    return find_untiled(manifest) if deep else None


def _find_damage(file: Path, recorded: Mapping[str, Any], *, read: bool) -> str | None:
    """What is wrong with a file; its size alone tells unless it is read."""
    try:
        check_regular(file)
        if (size := file.stat().st_size) != recorded["bytes"]:
            return f"has {size} bytes, not {recorded['bytes']}"
        if read and sha256_of(file) != recorded["sha256"]:
            return "is damaged (its SHA-256 is not the recorded one)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def find_untiled(manifest: Mapping[str, Any]) -> str | None:
    """A tensor that is not described, or whose pieces overlap, leave a hole or lie outside it."""
    for section, tensors in manifest["sections"].items():
        if problem := _find_misdescribed(manifest, section):
            return problem
        for name, info in tensors.items():
            if not boxes.tiles(info["shape"], map(box_of, info["pieces"])):
                return f"the pieces of {section}/{name} do not tile it"
    return None


def _find_misdescribed(manifest: Mapping[str, Any], section: str) -> str | None:
    """A tensor of a section whose description is not that of one in the files of the checkpoint.

    None is larger than the files are, so that nothing is allocated for bytes that nobody has.
    """
    sizes = {name: recorded["bytes"] for name, recorded in manifest["files"].items()}
    total = sum(sizes.values())
    for name, info in manifest["sections"][section].items():
        try:
            itemsize, dims = DTYPES[info["dtype"]].itemsize, len(info["shape"])
            sound = _is_box(info["shape"], dims, total // itemsize) and all(
                isinstance(piece["key"], str)
                and _is_box(piece["shape"], dims, sizes[piece["file"]] // itemsize)
                and _is_box(piece["offset"], dims)
                for piece in info["pieces"]
            )
        except (KeyError, TypeError):
            sound = False
        if not sound:
            return f"{MANIFEST} does not describe {section}/{name} as a tensor of its files"
    return None


def _is_box(numbers: Any, dims: int, most: float = math.inf) -> bool:
    """Whether this is a size or an offset in `dims` dimensions, and no volume above `most`."""
    sound = isinstance(numbers, list) and len(numbers) == dims and all(type(n) is int and n >= 0 for n in numbers)
    return sound and (most == math.inf or math.prod(numbers) <= most)


def _load_manifest(path: Path) -> dict[str, Any]:
    file = Path(path) / MANIFEST
    refuse_lfs_pointer(file)
    try:
        check_regular(file)
        data = read_bytes(file, most_bytes=MANIFEST_BYTES)
        manifest = parse_json(data, most_bytes=MANIFEST_BYTES, unique=True)
        form, recorded, digest = manifest.get("format"), manifest.get("sha256"), manifest_digest(manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"checkpoint {path}: has no {MANIFEST}; give a checkpoint folder") from None
    except OSError as error:
        raise UserError(f"checkpoint {path}: {MANIFEST} cannot be read ({error.strerror}); see to the disk") from None
    except (ValueError, AttributeError):
        raise UserError(f"checkpoint {path}: {MANIFEST} is not readable; it is damaged") from None
    if form != FORMAT:
        raise UserError(f"checkpoint {path}: format {form!r} is not {FORMAT!r}")
    if recorded != digest:
        raise UserError(f"checkpoint {path}: {MANIFEST} is damaged (its SHA-256 is not the recorded one)")
    if key := next((key for key, holds in CONTENT.items() if not holds(manifest.get(key))), None):
        raise UserError(f"checkpoint {path}: {MANIFEST} has no {key!r} as checkpoints have it; use another checkpoint")
    return manifest


def _are_files(value: Any) -> bool:
    """Whether a manifest's files are in its folder, and described."""
    return isinstance(value, dict) and all(
        is_plain_name(name)
        and isinstance(recorded, dict)
        and type(recorded.get("bytes")) is int
        and isinstance(recorded.get("sha256"), str)
        for name, recorded in value.items()
    )


CONTENT: dict[str, Callable[[Any], bool]] = {
    "step": lambda value: type(value) is int and value >= 0,
    "state": lambda value: isinstance(value, dict),
    "files": _are_files,
    "sections": lambda value: isinstance(value, dict) and all(isinstance(v, dict) for v in value.values()),
}
"""What a manifest holds besides its format and digest. What its sections hold is looked at when one is read."""
