"""A packed dataset of the pushing task, small enough to train on in seconds, shared by all end-to-end tests."""

from pathlib import Path
from subprocess import CompletedProcess

import pytest
from support.command_ranks import run_inside
from support.commands import TINY, train_overrides


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Windows of eight simulated episodes, encoded, in eight shards; `dataset_unseen` beside them in two more."""
    from dataloaders.simulators.collect import simulate
    from kairos_train.cli import main

    folder = tmp_path_factory.mktemp("push2d")
    settings = {"env": "push2d", "tasks": [], "size": 32, "processes": 1}
    simulate(**settings, episodes_per_task=4, out=folder / "dataset")
    simulate(**settings, episodes_per_task=1, out=folder / "dataset_unseen", seed_start=10_000)
    for name, out in (("dataset", "shards"), ("dataset_unseen", "shards_validation")):
        arguments = ["data", "pack", folder / name, "--out", folder / out, "--encode", "--shard-samples", 64]
        assert main([*map(str, arguments), *TINY]) == 0
    return folder


@pytest.fixture(scope="session")
def train(world, shards):
    """`kairos-train train` on the shared shards, in processes that are kept; they may not start others."""

    def run(run_dir: Path, *overrides: str, ranks: int = 1, code: int = 0) -> CompletedProcess:
        settings = train_overrides(shards, run_dir, "data.workers=0", *overrides)
        return run_inside(world(ranks), ["train", *settings], code=code)

    return run
