"""What several tests of exported models need: a tiny random checkpoint, and a packed dataset that fits it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dataloaders.config import DataConfig, WindowConfig
from dataloaders.lerobot.writer import LeRobotWriter
from dataloaders.packing.pack import pack
from dataloaders.shards import ShardIndex
from kairos_train.checkpoint.writing import write_checkpoint
from kairos_train.conditioning.build import build_encoders
from kairos_train.conditioning.sample_encoder import load_sample_encoder
from kairos_train.config.compose import to_yaml
from kairos_train.config.schema import (
    ActionStreamConfig,
    Config,
    EncodersConfig,
    ModelConfig,
    StageConfig,
    TextEncoderConfig,
    VideoEncoderConfig,
    VideoStreamConfig,
)
from kairos_train.model import WorldActionModel
from kairos_train.training.inputs.feed import Feed

CAMERA = "observation.images.top"
WINDOW = WindowConfig(frames=5, action_video_freq_ratio=2, stride=3, height=32, width=32, cameras=[CAMERA])
TEMPLATE = "Robot: {task}"


def tiny_config(*, streams: str = "joint", actions: bool = True, history_frames: int = 1, **stage) -> Config:
    return Config(
        experiment="toy",
        model=ModelConfig(
            name="toy",
            num_layers=4,
            num_heads=2,
            text_dim=24,
            freq_dim=16,
            video=VideoStreamConfig(dim=32, ffn_dim=48, dilation=2, gdn_key_dim=8, gdn_value_dim=16),
            action=ActionStreamConfig(dim=16, ffn_dim=32, action_dim=3, state_dim=2) if actions else None,
        ),
        encoders=EncodersConfig(
            name="weight_free",
            video=VideoEncoderConfig(kind="block_dct"),
            text=TextEncoderConfig(kind="hashed_ngrams", text_dim=24, max_tokens=16),
        ),
        data=DataConfig(name="toy", shards="shards", window=WINDOW, prompt_template=TEMPLATE),
        stage=StageConfig(streams=streams, history_frames=history_frames, **stage),
    )


def feed_of(config: Config, indices: Sequence[ShardIndex]) -> Feed:
    """What a run of `config` feeds its model with from shards, on the CPU."""
    return Feed(
        indices,
        torch.device("cpu"),
        data=config.data,
        encoders=config.encoders,
        model=config.model,
        stage=config.stage,
        seed=config.seed,
    )


def random_weights(config: Config, seed: int = 0) -> dict[str, torch.Tensor]:
    """Initial values disturbed: heads and gates start at zero, and every path must count."""
    torch.manual_seed(seed)
    state = WorldActionModel(config.model).state_dict()
    return {name: tensor + torch.randn_like(tensor) * 0.1 for name, tensor in state.items()}


def write_tiny_checkpoint(folder: Path, shards: Path | None, *, config: Config | None = None, ema: bool = True) -> Path:
    """A canonical checkpoint of step 40 with the shards' statistics."""
    config = config or tiny_config()
    sections = {"model": random_weights(config, 1)}
    if ema:
        sections["ema"] = random_weights(config, 2)
    sections["exp_avg"] = {name: torch.zeros_like(tensor) for name, tensor in sections["model"].items()}
    files = {"config.yaml": to_yaml(config)}
    if shards is not None:
        files["dataset_stats.json"] = (shards / "dataset_stats.json").read_text()
    return write_checkpoint(
        folder, 40, sections=sections, state={"encoders": build_encoders(config.encoders).identity}, files=files
    )


def write_tiny_shards(folder: Path, *, episodes: int = 4, encoded: bool = False, shard_samples: int = 8) -> Path:
    """A bright square that moves by its actions, packed; some windows reach past the end of their episode."""
    rng = np.random.default_rng(0)
    with LeRobotWriter(
        folder / "lerobot",
        fps=10.0,
        robot_type="square",
        cameras={CAMERA: (32, 32)},
        state_names=["x", "y"],
        action_names=["dx", "dy", "grip"],
    ) as writer:
        for number in range(episodes):
            action = np.concatenate([rng.uniform(-1, 1, (22, 2)), rng.integers(0, 2, (22, 1))], 1).astype(np.float32)
            state = np.clip(8 + np.cumsum(action[:, :2], 0), 0, 23).astype(np.float32)
            frames = np.full((22, 32, 32, 3), 40, np.uint8)
            for frame, (x, y) in zip(frames, state.astype(int)):
                frame[y : y + 8, x : x + 8] = (230, 60 + 40 * number, 30)
            writer.add_episode({CAMERA: frames}, state, action, f"push square {number % 2}")
    config = tiny_config()
    pack(
        folder / "lerobot",
        folder / "shards",
        window=WINDOW,
        prompt_template=TEMPLATE,
        shard_samples=shard_samples,
        encoder=functools.partial(load_sample_encoder, config.encoders, "cpu") if encoded else None,
    )
    return folder / "shards"
