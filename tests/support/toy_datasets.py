"""Small LeRobot datasets and encoders for tests of packing and of what is done with packed shards."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataloaders.config import WindowConfig
from dataloaders.lerobot.writer import LeRobotWriter

CAMERA = "observation.images.top"
WINDOW = WindowConfig(frames=5, action_video_freq_ratio=1, stride=2, height=32, width=32)


def write_dataset(root: Path, episodes: int = 12, length: int = 14, **extra) -> Path:
    """Noise of 10 fps, 32x32 pixels, two states and actions; episode i has length + i frames. extra: functions of i."""
    rng = np.random.default_rng(0)
    with LeRobotWriter(
        root, fps=10, robot_type="toy", cameras={CAMERA: (32, 32)}, state_names=["x", "y"], action_names=["dx", "dy"]
    ) as writer:
        for i in range(episodes):
            frames = rng.integers(0, 255, (length + i, 32, 32, 3), np.uint8)
            vectors = rng.normal(size=(2, length + i, 2)).astype(np.float32)
            writer.add_episode({CAMERA: frames}, *vectors, f"task {i % 3}", {k: f(i) for k, f in extra.items()} or None)
    return root


@dataclass
class ToyEncoder:
    """Tells in its numbers what it was given; `sees` says whether it looks at pictures."""

    sees: bool

    @property
    def identity(self):
        return {"text": {"kind": "toy", "image": self.sees}}

    @property
    def sees_pictures(self):
        return self.sees

    def latents(self, frames):
        return np.full((16, 2, 4, 4), frames.mean())

    def context(self, text, picture):
        return np.full((2, 3), len(text) + (0.5 if picture is not None else 0))


def toy_encoder(worker: int, *, sees: bool) -> ToyEncoder:
    return ToyEncoder(sees)
