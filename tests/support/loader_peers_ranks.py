"""Ranks of the peers' test: the loader of a run with two tensor ranks and two data ranks."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

from dataloaders.config import DataConfig
from kairos_train.basics.errors import RunStopped
from kairos_train.config.schema import TrainConfig
from kairos_train.training.build_run import open_loader
from parallel.topology import Degrees, Topology


@cache
def topology() -> Topology:
    return Topology.build(Degrees(tensor=2, context=1, data=2), torch.device("cpu"))


def read_steps(folders: list[str], steps: int, *, check: bool) -> list[str] | str:
    """Keys that this rank gets from its own folder, or what its run is stopped by."""
    data = DataConfig(shards=folders[dist.get_rank()], workers=0, check_peers=check)
    train = TrainConfig(micro_batch=2, accumulation=2, device="cpu")
    quarantine = Path(folders[0]) / "quarantine.jsonl"
    loader = open_loader(data, train, topology(), seed=0, with_frames=False, quarantine=quarantine)
    try:
        return [key for _ in range(2 * steps) for key in next(loader).keys]
    except RunStopped as error:
        return str(error)
    finally:
        loader.close()
