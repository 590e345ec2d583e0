"""Exports of small random models with other cameras, states and histories than `exported`, for the policy server."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from support.tiny_export import tiny_config, write_tiny_checkpoint

from kairos_train.config.schema import Config
from kairos_train.weights.export import export


def config_of(*, action_dim: int = 3, state_dim: int = 2, history_frames: int = 1, **window: Any) -> Config:
    """A tiny joint model's configuration with these sizes and window settings."""
    config = tiny_config(history_frames=history_frames)
    action = dataclasses.replace(config.model.action, action_dim=action_dim, state_dim=state_dim)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, action=action),
        data=dataclasses.replace(config.data, window=dataclasses.replace(config.data.window, **window)),
    )


def write_export(folder: Path, config: Config) -> Path:
    """Its export; statistics with every range [-1, 1], the same weights for the same sizes."""
    window, action = config.data.window, config.model.action
    entries = {}
    for group, key, dim in (
        ("action", window.action_key, action.action_dim),
        ("state", window.state_key, action.state_dim),
    ):
        fields = {"min": -1.0, "max": 1.0, "mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}
        entries[group] = {key: {f"global_{name}": [value] * dim for name, value in fields.items()}}
    folder.mkdir(parents=True)
    (folder / "dataset_stats.json").write_text(json.dumps(entries))
    export(write_tiny_checkpoint(folder / "run", folder, config=config), folder / "export", dtype="fp32")
    return folder / "export"


def picture(seed: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
