"""A packed dataset of the pushing task, small enough to train on in seconds, shared by all end-to-end tests."""

from pathlib import Path

import pytest
from commands import TINY


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
