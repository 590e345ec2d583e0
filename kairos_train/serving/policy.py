"""An export as what a server needs of it: which observations it takes, chunks of actions for several at a time.

Time: a model with K history latent frames is given T = 4·(K − 1) + 1 video frames, `action_video_freq_ratio` raw frames
apart, and the state of the first of them; its actions begin there, too. For K = 1 that is the present. For larger K the
first 4·(K − 1)·ratio actions of a chunk lie before the newest frame: they are cut off, and what is served begins now.

Shapes: B requests, T given frames, H W pixels of the picture made of all cameras, A actions served, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.config import WindowConfig
from dataloaders.windows import action_offset, compose, picture_size
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import sha256_of
from kairos_train.basics.geometry import video_frames
from kairos_train.inference.export_files import STATISTICS_FILE
from kairos_train.inference.load import load
from kairos_train.inference.normalization import action_range
from kairos_train.inference.predict import Predictor, Request
from kairos_train.serving.observation import Observation, ObservationReader, layouts_of


@dataclass(frozen=True)
class ModelInput:
    """What the model is given for one request.

    Attributes:
        frames: uint8 (T, H, W, 3).
        state: float32 (state_dim,), raw, of the first frame.
    """

    frames: np.ndarray
    state: np.ndarray
    prompt: str
    seed: int


class ObservationHistory:
    """The last T pictures and states of one client. Before there are as many, the first one stands for those missing.

    Args:
        frames: T.
        window: how cameras are put together.
    """

    def __init__(self, frames: int, window: WindowConfig) -> None:
        self._frames, self._window = frames, window
        self.clear()

    def clear(self) -> None:
        """Begin an episode."""
        self._pictures: list[np.ndarray] = []
        self._states: list[np.ndarray] = []

    def window(self, observation: Observation) -> ModelInput:
        """Take the observation in; what the model is given now."""
        self._pictures += list(compose(observation.pictures, self._window))
        self._states += list(observation.states)
        self._pictures, self._states = self._pictures[-self._frames :], self._states[-self._frames :]
        missing = self._frames - len(self._pictures)
        pictures = [self._pictures[0]] * missing + self._pictures
        return ModelInput(np.stack(pictures), self._states[0], observation.prompt, observation.seed)


@dataclass(frozen=True)
class ActionClipping:
    """Keep actions within what the data holds, as the model gives them: before a state is added.

    Attributes:
        range: "minmax" or "quantile" (q01 to q99).
        margin: what both sides are moved outwards, as a share of the range.
    """

    range: str
    margin: float = 0.0


class ServedPolicy:
    """A loaded export behind the keys of its clients.

    Args:
        folder: written by `kairos-train export`.
        steps: of the sampler; None takes the export's.
        cameras: the dataset's camera keys in the order of training, for an export that does not say.
        fps: of actions, told to clients; None: as the export says.
        robot: name of one of several that it was trained on; None: the first.
        clipping: of actions; None: they are as the model says.
        device: where it is computed.

    Attributes:
        clipped: values of actions that have been bounded so far.
        metadata: what a client is told on connecting.
        reader: checks its observations.
        contradictions: of its robot's dataset, by name, that were resolved when that was packed.

    Raises:
        UserError: an export without actions, or whose cameras are not known.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps: int | None = None,
        cameras: Sequence[str] = (),
        fps: float | None = None,
        robot: str | None = None,
        clipping: ActionClipping | None = None,
        device: str = "cpu",
    ) -> None:
        policy = load(folder, device=device, robot=robot)
        if not policy.acts:
            raise UserError(f"{folder}: was trained without actions; a policy needs a joint model")
        self._policy, self._data = policy, policy.config.data
        self._predictor = Predictor(policy, sampler=policy.sampler.replaced(steps=steps))
        self._window = self._data.window
        self.clipped, self._bounds = 0, None
        if clipping is not None:
            self._bounds = action_range(
                policy.statistics, key=self._window.action_key, kind=clipping.range, margin=clipping.margin
            )
        self.given_frames = video_frames(policy.history_frames)
        self._past = (self.given_frames - 1) * self._window.action_video_freq_ratio
        about = policy.about.get("robot") or {}  # imported weights do not know theirs
        self.contradictions: list[str] = about.get("contradictions", [])
        cameras = _cameras(folder, policy.cameras, cameras)
        self._size = picture_size(self._window, len(cameras))
        state_dim = policy.state_dim
        layouts = layouts_of(cameras, self._window.state_key, state_dim)
        self.reader = ObservationReader(layouts, state_dim=state_dim, most_frames=self.given_frames)
        self.metadata: dict[str, Any] = {
            "horizon": policy.horizon - self._past,
            "action_dim": policy.action_dim,
            "state_dim": state_dim,
            "robot": None if policy.robot is None else policy.robot.name,
            "fps": about.get("fps") if fps is None else fps,
            "cameras": list(cameras),
            "observation_keys": {layout.name: [*layout.keys, "prompt"] for layout in layouts},
            "given_frames": self.given_frames,
            "action_video_freq_ratio": self._window.action_video_freq_ratio,
            "statistics_sha256": sha256_of(Path(folder) / STATISTICS_FILE),
            "model": {key: policy.about.get(key) for key in ("weights", "step", "checkpoint_sha256")},
            "sampling_steps": self._predictor.sampler.steps,
            "clipping": None if clipping is None else asdict(clipping),
        }

    def history(self) -> ObservationHistory:
        """Of one client."""
        return ObservationHistory(self.given_frames, self._window)

    def act(self, windows: Sequence[ModelInput]) -> np.ndarray:
        """Raw actions, float32 (B, A, D), each row the same whatever the others are.

        With `data.window.action_values=minus_state` the model's actions are relative to the state it is given: that
        state is added again, except in `absolute_dims`.
        """
        requests = [Request(window.frames, window.state, window.prompt, window.seed) for window in windows]
        actions = np.stack([prediction.actions for prediction in self._predictor.predict_batch(requests)])
        actions = self._bounded(actions[:, self._past :])
        states = np.stack([window.state for window in windows])
        offset = action_offset(actions.shape[-1], states, np.arange(len(states)), self._window)  # (B, D)
        return actions + offset[:, None]

    def _bounded(self, actions: np.ndarray) -> np.ndarray:
        """Actions (B, A, D) within the bounds; those that are not finite stay so, for they are a fault."""
        if self._bounds is None:
            return actions
        bounded = np.where(np.isfinite(actions), np.clip(actions, *self._bounds), actions)
        self.clipped += int((bounded != actions)[np.isfinite(actions)].sum())
        return bounded

    def warm_up(self, batch: int) -> None:
        """Compute one batch of nothing, so that faults and memory errors come before the first client."""
        frames = np.zeros((self.given_frames, *self._size, 3), np.uint8)
        state = np.zeros(self.reader.state_dim, np.float32)
        self.act([ModelInput(frames, state, "", seed) for seed in range(batch)])


def _cameras(folder: Path, known: Sequence[str], told: Sequence[str]) -> tuple[str, ...]:
    """The dataset's camera keys in the order of training: those that an export knows, or else is told."""
    if known and told and list(told) != list(known):
        raise UserError(f"cameras={','.join(told)}: {folder} was trained with {','.join(known)}; leave the option out")
    cameras = tuple(known or told)
    if not cameras:
        raise UserError(
            f"{folder}: data.window.cameras is empty, which means every camera of its dataset in name order; name them"
            " in this order, with --cameras KEY,KEY or kt.load(…, cameras=[KEY, KEY])"
        )
    if len(set(cameras)) < len(cameras):
        raise UserError(f"cameras={','.join(cameras)}: names one twice; name each once")
    return cameras
