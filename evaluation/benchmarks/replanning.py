"""One action at a time out of a policy server's chunks, in simulators of others; needs numpy and no torch.

Noise is drawn from a seed that no two requests share: not the replans of one trial, not the trials of one run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from evaluation.benchmarks.interface import noise_seed
from kairos_train.basics.errors import UserError


class ActionServer(Protocol):
    """What is asked for actions, as `kairos_train.serving.client.PolicyClient`."""

    metadata: dict[str, Any]

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """An observation's `actions` (A, D)."""

    def reset(self) -> None:
        """Begin an episode."""


class Replanner:
    """Executes the first `replan_steps` actions of every chunk, then asks again.

    A model that is given several frames gets one of every `action_video_freq_ratio` steps, as in training; the frames
    since the last request go with the next one.

    Args:
        policy: a connected client.
        replan_steps: None executes whole chunks.
        seed: of all noise of this run.

    Raises:
        UserError: more steps than a chunk has, or a number of them that does not fit the model's frames.
    """

    def __init__(self, policy: ActionServer, *, replan_steps: int | None = None, seed: int = 0) -> None:
        told = policy.metadata
        self.replan_steps = told["horizon"] if replan_steps is None else replan_steps
        self._policy, self._seed = policy, seed
        self._given, self._apart = told["given_frames"], told["action_video_freq_ratio"]
        if not 1 <= self.replan_steps <= told["horizon"]:
            raise UserError(f"replan_steps={replan_steps}: the policy's chunks have 1 to {told['horizon']} actions")
        if self._given > 1 and self.replan_steps % self._apart:
            raise UserError(
                f"replan_steps={self.replan_steps}: this policy is given frames {self._apart} actions apart; use a"
                f" multiple of {self._apart}"
            )
        self._trials: set[str] = set()
        self._trial: str | None = None

    def begin(self, trial: str) -> None:
        """Begin a trial; its name makes its noise and must be new to this run.

        Raises:
            ValueError: a name that was used before: the trial would be a copy.
            PolicyError: the server cannot be reached.
        """
        if trial in self._trials:
            raise ValueError(f"trial {trial!r} was begun before; its noise would be the same again")
        self._trials.add(trial)
        self._policy.reset()
        self._trial, self._replans, self._steps = trial, 0, 0
        self._frames: list[dict[str, np.ndarray]] = []
        self._plan: deque[np.ndarray] = deque()

    def act(self, arrays: Mapping[str, np.ndarray], prompt: str) -> np.ndarray:
        """The next action, (D,) float32; call once per control step.

        Args:
            arrays: by the policy's keys, of this step: pictures uint8 (H, W, 3) and states (D,).
            prompt: the instruction.

        Raises:
            PolicyError: from the server; a trial is not to be counted then.
        """
        if self._trial is None:
            raise ValueError("begin() comes before act()")
        if self._given == 1:
            self._frames = [dict(arrays)]
        elif self._steps % self._apart == 0:
            self._frames.append({key: np.array(value) for key, value in arrays.items()})  # simulators reuse buffers
        if not self._plan:
            self._plan.extend(self._ask(prompt))
        self._steps += 1
        return self._plan.popleft()

    def _ask(self, prompt: str) -> np.ndarray:
        frames, self._frames = self._frames[-self._given :], []
        sent = frames[0] if self._given == 1 else {key: np.stack([f[key] for f in frames]) for key in frames[0]}
        seed = noise_seed(self._seed, self._trial, self._replans)
        self._replans += 1
        return self._policy.infer({**sent, "prompt": prompt, "seed": seed})["actions"][: self.replan_steps]
