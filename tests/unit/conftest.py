"""Fixtures of the tests that need a small packed dataset, or an export of a small model."""

from pathlib import Path

import pytest
from support.tiny_export import write_tiny_checkpoint, write_tiny_shards

from kairos_train.weights.export import export


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Windows of a bright square that moves by its actions, not encoded. Read only."""
    return write_tiny_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def exported(shards, tmp_path_factory) -> Path:
    """A model with random weights, exported in float32. Read only."""
    out = tmp_path_factory.mktemp("exports") / "toy"
    export(write_tiny_checkpoint(tmp_path_factory.mktemp("run"), shards), out, dtype="fp32")
    return out
