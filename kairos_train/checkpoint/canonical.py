"""Canonical checkpoints: what a run is, independent of how it was split over processes.

A checkpoint is the folder `step-00000040/` with

- `manifest.json`: every tensor's dtype, full shape and pieces, every file's size and SHA-256, the run's plain state;
- `SECTION-00001.safetensors`, ...: the tensors, sections being "model", "ema", "exp_avg", "exp_avg_sq", "rng", ...;
- text files of the caller (`config.yaml`).

A tensor is stored as one or more pieces, boxes with an offset into the full tensor, so that a reader never needs to
know how many processes wrote it. The folder appears under its name only when everything in it is on disk. No pickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import kairos_train
from kairos_train.errors import UserError

FORMAT = "kairos-checkpoint-1"
MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
FILE_BYTES = 2 * 1024**3


def checkpoint_path(parent: Path, step: int) -> Path:
    """The folder of step `step` in `parent`."""
    return Path(parent) / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step a folder name stands for, None when it is no checkpoint name."""
    digits = path.name.removeprefix("step-")
    return int(digits) if digits != path.name and digits.isdecimal() else None


# Writing


def write_checkpoint(
    folder_parent: Path,
    step: int,
    *,
    sections: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    files: Mapping[str, str],
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write one checkpoint, completely or not at all. Called by one process.

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
    for stale in parent.glob(f"{TEMPORARY}*"):
        shutil.rmtree(stale)
    target = checkpoint_path(parent, step)
    folder = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{target.name}-", dir=parent))
    try:
        folder.chmod(0o755)  # mkdtemp makes it private to its owner
        described = {name: _write_section(folder, name, tensors, file_bytes) for name, tensors in sections.items()}
        for name, text in files.items():
            _write_text(folder / name, text)
        manifest = {
            "format": FORMAT,
            "step": step,
            "sections": described,
            "state": dict(state),
            "files": {path.name: _describe_file(path) for path in sorted(folder.iterdir())},
            "versions": {part.__name__: part.__version__ for part in (kairos_train, torch, safetensors)},
        }
        manifest["sha256"] = _manifest_digest(manifest)
        _write_text(folder / MANIFEST, _to_json(manifest))
        _sync_folder(folder)
        _publish(folder, target, manifest)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already when it was published
    return target


def _publish(folder: Path, target: Path, manifest: dict[str, Any]) -> None:
    """Give the finished temporary folder its name."""
    if target.exists():
        if not find_problem(target, deep=True):
            there = CheckpointReader(target).manifest
            if all(there[key] == manifest[key] for key in ("sections", "state", "files")):
                return
            raise UserError(
                f"checkpoint {target}: exists with other content, and checkpoints are never overwritten;"
                " resume from it, or remove it"
            )
        damaged = target.with_name(f"{TEMPORARY}damaged-{target.name}")
        target.rename(damaged)
        folder.rename(target)
        shutil.rmtree(damaged)
    else:
        folder.rename(target)
    _sync_folder(target.parent)


def _write_section(folder: Path, section: str, tensors: Mapping[str, Tensor], file_bytes: int) -> dict[str, Any]:
    """Write one section's files; returns its part of the manifest."""
    described = {}
    for number, group in enumerate(_split(tensors, file_bytes), 1):
        name = f"{section}-{number:05d}.safetensors"
        save_file(group, folder / name)
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
        for key, tensor in group.items():
            shape = list(tensor.shape)
            piece = {"file": name, "key": key, "offset": [0] * len(shape), "shape": shape}
            described[key] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape, "pieces": [piece]}
    return described


def _split(tensors: Mapping[str, Tensor], file_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Groups of tensors on the CPU, each at most `file_bytes` large or of one tensor."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if group and size + tensor.nbytes > file_bytes:
            yield group
            group, size = {}, 0
        whole = tensor.detach().cpu().contiguous()
        if whole.untyped_storage().nbytes() != whole.nbytes:
            whole = whole.clone()  # safetensors takes no views into shared storage
        group[name] = whole
        size += tensor.nbytes
    if group:
        yield group


def _describe_file(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _file_digest(path)}


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest without its own digest: the manifest carries state, so it is protected as well."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(_to_json(rest).encode()).hexdigest()


def _to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Reading


class CheckpointReader:
    """Reads a checkpoint folder, whole tensors or slices of them, however they were cut into pieces.

    Raises:
        UserError: no manifest, a damaged one, or one of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.manifest = _load_manifest(self.path)
        self._open: dict[str, Any] = {}

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
        box = _resolve_box(info["shape"], slices or ())
        out = torch.empty([stop - start for start, stop in box], dtype=getattr(torch, info["dtype"]))
        filled = 0
        for piece in info["pieces"]:
            common = [
                (max(start, at), min(stop, at + size))
                for (start, stop), at, size in zip(box, piece["offset"], piece["shape"])
            ]
            if any(start >= stop for start, stop in common):
                continue
            part = self._read_part(piece, common)
            out[tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, box))] = part
            filled += part.numel()
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

    def _read_part(self, piece: dict[str, Any], box: list[tuple[int, int]]) -> Tensor:
        name = piece["file"]
        if name not in self._open:
            self._open[name] = safe_open(self.path / name, framework="pt")
        if not box:  # a scalar has no slices
            return self._open[name].get_tensor(piece["key"])
        inside = tuple(slice(a - at, b - at) for (a, b), at in zip(box, piece["offset"]))
        return self._open[name].get_slice(piece["key"])[inside]

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
        The folder (None when there is none), and one warning for each newer folder that was passed over.
    """
    warnings = []
    for path in reversed(list_checkpoints(parent)):
        problem = find_problem(path, deep=deep)
        if problem is None:
            return path, warnings
        warnings.append(f"checkpoint {path} is passed over: {problem}")
    return None, warnings


def list_checkpoints(parent: Path) -> list[Path]:
    """Folders named like checkpoints, valid or not, oldest step first."""
    parent = Path(parent)
    if not parent.is_dir():
        return []
    return sorted((path for path in parent.iterdir() if step_of(path) is not None), key=step_of)


def find_problem(path: Path, *, deep: bool = False) -> str | None:
    """What is wrong with a checkpoint folder, None when nothing is.

    Args:
        path: the folder.
        deep: compare SHA-256 and pieces as well, which reads every byte.
    """
    try:
        manifest = _load_manifest(path)
    except UserError as error:
        return str(error)
    if step_of(path) not in (None, manifest["step"]):
        return f"{MANIFEST} is of step {manifest['step']}"
    for name, recorded in sorted(manifest["files"].items()):
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != recorded["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {recorded['bytes']}"
        if deep and _file_digest(file) != recorded["sha256"]:
            return f"{name} is damaged (its SHA-256 is not the recorded one)"
    return _find_untiled(manifest) if deep else None


def _find_untiled(manifest: Mapping[str, Any]) -> str | None:
    """A tensor whose pieces overlap, leave a hole or lie outside it."""
    for section, tensors in manifest["sections"].items():
        for name, info in tensors.items():
            pieces = [[(at, at + size) for at, size in zip(p["offset"], p["shape"])] for p in info["pieces"]]
            inside = all(stop <= size for box in pieces for (_, stop), size in zip(box, info["shape"]))
            overlap = any(
                all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(one, other))
                for one, other in combinations(pieces, 2)
            )
            if not inside or overlap or sum(map(_volume, pieces)) != _volume([(0, size) for size in info["shape"]]):
                return f"the pieces of {section}/{name} do not tile it"
    return None


def _volume(box: list[tuple[int, int]]) -> int:
    volume = 1
    for start, stop in box:
        volume *= stop - start
    return volume


def _load_manifest(path: Path) -> dict[str, Any]:
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found = manifest.get("format"), manifest.get("sha256")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"checkpoint {path}: has no {MANIFEST}; give a checkpoint folder") from None
    except (ValueError, AttributeError):
        raise UserError(f"checkpoint {path}: {MANIFEST} is not readable; it is damaged") from None
    if found[0] != FORMAT:
        raise UserError(f"checkpoint {path}: format {found[0]!r} is not {FORMAT!r}")
    if found[1] != _manifest_digest(manifest):
        raise UserError(f"checkpoint {path}: {MANIFEST} is damaged (its SHA-256 is not the recorded one)")
    return manifest


def _resolve_box(shape: Sequence[int], slices: Sequence[slice]) -> list[tuple[int, int]]:
    """(start, stop) per dimension."""
    if len(slices) > len(shape):
        raise ValueError(f"{len(slices)} slices for a tensor of {len(shape)} dimensions")
    if any(part.step not in (None, 1) for part in slices):
        raise ValueError("only slices with a step of 1 can be read")
    whole = [slice(None)] * (len(shape) - len(slices))
    bounds = [part.indices(size)[:2] for part, size in zip([*slices, *whole], shape)]
    return [(start, max(start, stop)) for start, stop in bounds]
