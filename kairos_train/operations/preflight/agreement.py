"""What all processes must have in common before a run starts: configuration, versions, room for its checkpoints.

Everything here is collective over the default process group and gives every rank the same verdict, so that all of them
leave by the same error, and none waits in a collective for one that has left.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import kairos_train
from kairos_train.basics.errors import MachineFault, UserError
from kairos_train.checkpoint.canonical import list_checkpoints
from kairos_train.config.schema import Config
from kairos_train.operations.preflight.disk import free_bytes
from parallel.consensus import from_all

PACKAGES = (
    *("deepspeed", "megatron-core", "triton", "flash-linear-attention", "fla-core", "tilelang", "flash-attn"),
    *("transformer-engine", "transformer-engine-torch"),
)
"""What computes, or compiles what computes: ranks with two versions of one of these round in two ways, or wrongly."""

SOURCES = ("kairos_train", "parallel", "dataloaders")
DRIVER = Path("/proc/driver/nvidia/version")
ABSENT = "absent"
GB = 1e9


def agree(config: Config, *, checkpoint_bytes: float, size: int) -> dict[str, str]:
    """Hold configuration and versions of all ranks to be equal, and `run_dir` to have room. Collective.

    Room is for `train.keep_last` checkpoints and the one that is being written, less those that are there already.
    Quotas of a file system do not show in its free space.

    Args:
        config: of this rank.
        checkpoint_bytes: size of one checkpoint.
        size: of the world.

    Returns:
        The versions that all have, as `versions` gives them.

    Raises:
        UserError: on every rank, the same line: the first setting that differs, with its values and ranks; versions
            that differ, with their hosts; too little free space.
        MachineFault: likewise, when a rank cannot tell.
    """
    settings = leaves(asdict(config))
    ranks = from_all(_facts(config, settings), size)
    hosts = [rank["host"] for rank in ranks]
    for number, rank in enumerate(ranks):
        if "problem" in rank:
            raise MachineFault(f"rank {number} on host {rank['host']}: {rank['problem']}")
    if len({rank["digest"] for rank in ranks}) > 1:  # seen by all, so that all take part in this
        raise UserError(_different_settings(from_all(settings, size), hosts))
    if problem := different_versions([rank["versions"] for rank in ranks], hosts):
        raise UserError(problem)
    kept = ranks[0]["kept"]
    needed = (config.train.keep_last + 1 - kept) * checkpoint_bytes
    for rank in ranks:
        if rank["free"] < needed:
            raise UserError(
                f"run_dir={config.run_dir}: {rank['free'] / GB:.2f} GB are free on host {rank['host']}, but its "
                f"checkpoints (train.keep_last={config.train.keep_last} and the one being written, {kept} there "
                f"already) need {needed / GB:.2f} GB more; make room, choose another run_dir or lower train.keep_last"
            )
    return ranks[0]["versions"]


def _facts(config: Config, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What this rank brings to `agree`, or its problem: a rank that left here would let the others wait."""
    facts: dict[str, Any] = {"host": socket.gethostname()}
    try:
        kept = min(len(list_checkpoints(Path(config.run_dir) / "checkpoints")), config.train.keep_last)
        facts |= {"versions": versions(), "free": free_bytes(Path(config.run_dir)), "kept": kept}
        facts["digest"] = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    except Exception as error:
        facts["problem"] = f"run_dir={config.run_dir} or this environment cannot be looked at ({error})"
    return facts


def versions() -> dict[str, str]:
    """What this process runs on, by name; "absent" for what is not installed.

    "code" stands for the content of this project's source files: a node may have an old copy under the same version.
    """
    cuda = torch.version.cuda
    return {
        "python": platform.python_version(),
        "kairos-train": kairos_train.__version__,
        "code": _code_digest(),
        "torch": torch.__version__,
        "cuda": cuda or ABSENT,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda and dist.is_nccl_available() else ABSENT,
        "cuda driver": _driver(),
        **{package: _installed(package) for package in PACKAGES},
    }


def different_versions(versions_of: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> str | None:
    """One line on the first version that is not the same on all nodes, None when all are.

    Args:
        versions_of: by rank, as `versions` gives them.
        hosts: by rank.
    """
    for name in versions_of[0]:
        found: dict[str, set[str]] = {}
        for host, there in zip(hosts, versions_of):
            found.setdefault(there.get(name, ABSENT), set()).add(host)
        if len(found) > 1:
            where = " and ".join(f"{value} on {_few(sorted(names))}" for value, names in _rarest_last(found))
            return f"{name} is {where}: all nodes must run the same versions; give them one environment"
    return None


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"train.micro_batch": 4, "faults.inject.0.kind": ...} of nested mappings and lists; empty ones are leaves."""
    if isinstance(tree, Mapping) and tree:
        items: Any = tree.items()
    elif isinstance(tree, list | tuple) and tree:
        items = enumerate(tree)
    else:
        return {prefix.removesuffix("."): tree}
    found: dict[str, Any] = {}
    for key, value in items:
        found |= leaves(value, f"{prefix}{key}.")
    return found


def name_ranks(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return f"rank{'s' if len(ranks) > 1 else ''} {_few(['-'.join(map(str, run)) for run in runs])}"


def _different_settings(settings_of: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> str:
    """One line on the first setting that is not the same on all ranks."""
    keys = dict.fromkeys(key for settings in settings_of for key in settings)
    for key in keys:
        found: dict[str, set[int]] = {}
        for rank, settings in enumerate(settings_of):
            value = json.dumps(settings[key], default=str) if key in settings else "not set"
            found.setdefault(value, set()).add(rank)
        if len(found) > 1:
            where = " and ".join(
                f"{value} on {name_ranks(sorted(ranks))} ({_few(sorted({hosts[rank] for rank in ranks}))})"
                for value, ranks in _rarest_last(found)
            )
            return (
                f"{key} is {where}: all ranks must have the same configuration; "
                "give all of them the same command line and the same files"
            )
    raise AssertionError("digests differ, but no setting does")


def _rarest_last(found: Mapping[str, set]) -> list[tuple[str, set]]:
    return sorted(found.items(), key=lambda item: -len(item[1]))


def _few(names: Sequence[str], most: int = 4) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def _driver() -> str:
    """Of the NVIDIA kernel module."""
    try:
        text = DRIVER.read_text()
    except OSError:
        return ABSENT
    match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return match[1] if match else text.splitlines()[0]


def _code_digest() -> str:
    """Twelve digits of the SHA-256 over names and contents of the project's source files."""
    digest = hashlib.sha256()
    for package in SOURCES:
        spec = importlib.util.find_spec(package)
        for root in map(Path, spec.submodule_search_locations if spec else ()):
            for path in sorted(root.rglob("*.py")):
                digest.update(f"{package}/{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
