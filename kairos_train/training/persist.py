"""A run into a checkpoint and back: weights, moments, averages, random states, loader positions, configuration."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dataloaders.loader import ShardLoader
from kairos_train.checkpoint.canonical import CheckpointReader, find_latest, write_checkpoint
from kairos_train.checkpoint.retention import prune
from kairos_train.conditioning.interfaces import identities_match
from kairos_train.config.compose import load_saved, to_yaml
from kairos_train.config.schema import Config
from kairos_train.errors import UserError
from kairos_train.training.describe import chosen_kernels
from kairos_train.training.ema import Ema
from kairos_train.training.engine import TrainingEngine
from kairos_train.training.engine_state import gather_full_state, load_full_state
from kairos_train.training.feed import Feed
from kairos_train.training.random_state import random_state, set_random_state

FREE_TO_CHANGE = (
    "run_dir",
    "train.",
    "data.workers",
    "data.validation_shards",
    "data.on_corrupt",
    "kernels.",
    "stage.init",
)
"""Settings that a resumed run may have otherwise than its checkpoint (announced); any other change is refused."""

LAYOUT = ("train.micro_batch", "train.accumulation", "train.precision")
"""Of `train.`, what decides the numbers: not free to change."""


def find_resumable(config: Config) -> tuple[CheckpointReader | None, list[str]]:
    """The checkpoint to continue from by `train.resume`, and warnings about damaged ones.

    Raises:
        UserError: `must` without a checkpoint, or a run folder that holds a different run.
    """
    if config.train.resume == "never":
        if list(checkpoints(config).glob("step-*")):
            raise UserError(
                f"train.resume=never: run_dir={config.run_dir} holds checkpoints; choose another run_dir or resume=auto"
            )
        return None, []
    path, problems = find_latest(checkpoints(config))
    if path is None and config.train.resume == "must":
        raise UserError(f"train.resume=must: no valid checkpoint in {checkpoints(config)}; use resume=auto")
    return (None if path is None else CheckpointReader(path)), problems


def checkpoints(config: Config) -> Path:
    """Where a run's checkpoints are."""
    return Path(config.run_dir) / "checkpoints"


def changed_settings(config: Config, reader: CheckpointReader) -> list[str]:
    """Settings that differ from the checkpoint's, "key old -> new", all of them free to change.

    Raises:
        UserError: one that is not; naming it.
    """
    old, new = _leaves(asdict(load_saved(reader.path / "config.yaml"))), _leaves(asdict(config))
    changes = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    for key in changes:
        if key in LAYOUT or not key.startswith(FREE_TO_CHANGE):
            raise UserError(
                f"{key}={new.get(key)}: the run in run_dir={config.run_dir} was started with {old.get(key)}; "
                "set that to resume it, or choose another run_dir"
            )
    return [f"{key} {old.get(key)} -> {new.get(key)}" for key in changes]


def save(
    engine: TrainingEngine, ema: Ema, loader: ShardLoader, feed: Feed, config: Config, *, step: int, samples: int
) -> None:
    """Write the checkpoint of `step` and drop old ones. Collective."""
    sections, optimizer = gather_full_state(engine)
    average = ema.gather()
    tensors, plain = random_state()
    ranks: list[dict[str, Any]] = [{} for _ in range(engine.world.size)]
    dist.all_gather_object(ranks, {"loader": loader.state_dict(), "random": plain, "tensors": tensors})
    if engine.world.rank == 0:
        state = {
            "samples": samples,
            "optimizer": optimizer,
            "ema": ema.state_dict(),
            "encoders": feed.identity,
            "kernels": chosen_kernels(config, engine.world.device),
            "ranks": [{k: v for k, v in rank.items() if k != "tensors"} for rank in ranks],
        }
        rng = {f"rank{i}.{name}": t for i, rank in enumerate(ranks) for name, t in rank["tensors"].items()}
        write_checkpoint(
            checkpoints(config),
            step,
            sections={**sections, "ema": average, "rng": rng},
            state=state,
            files={"config.yaml": to_yaml(config), "dataset_stats.json": json.dumps(feed.statistics, indent=1)},
        )
        prune(checkpoints(config), config.train.keep_last, config.train.keep_every)
    dist.barrier()


def restore(engine: TrainingEngine, ema: Ema, loader: ShardLoader, feed: Feed, reader: CheckpointReader) -> int:
    """Continue where `reader`'s checkpoint stood; returns the samples seen so far. Collective.

    Raises:
        UserError: other encoders, another number of processes, other shards, another model.
    """
    identities_match(reader.state["encoders"], feed.identity)
    ranks = reader.state["ranks"]
    if len(ranks) != engine.world.size:
        raise UserError(
            f"{reader.path}: written by {len(ranks)} processes, this run has {engine.world.size}; use as many to resume"
        )
    mine = ranks[engine.world.rank]
    loader.load_state_dict(mine["loader"])
    load_full_state(engine, reader)
    ema.load(reader)
    prefix = f"rank{engine.world.rank}."
    tensors: dict[str, torch.Tensor] = {}
    for name in reader.names("rng"):
        if name.startswith(prefix):
            tensors[name.removeprefix(prefix)] = reader.read("rng", name)
    set_random_state(tensors, mine["random"])
    return int(reader.state["samples"])


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves
