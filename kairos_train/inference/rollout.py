"""Video that goes on: chunk after chunk, each behind a history of fixed length.

Two ways to remember, with one interface: `observe` clean latents, `sample` the frames behind them.

- `SlidingHistory` keeps the last K latent frames and gives them to the model again with every chunk, as in training.
- `StreamingHistory` runs every frame through the model as history once and carries the GATED states and the keys in
  reach over (`kairos_train.model.streaming`); for models trained with `model.video.history_causal`.

Both take the same work and memory for every chunk, but for FA layers of the video under a carried history, which reach
back to the first frame.

Shapes: B batch, C latent channels, K history latent frames, F latent frames of a chunk with its history, n new ones,
H W latent height and width, A actions, D action dimensions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from kairos_train.basics.errors import UserError
from kairos_train.inference.sampler import (
    Conditions,
    SampledOutput,
    SamplerConfig,
    StreamNoise,
    check_request,
    denoise_actions,
    integrate,
    sample,
    tokens_per_frame,
    video_sigmas,
)
from kairos_train.model import HistoryCache, streaming


@dataclass(frozen=True)
class ChunkSize:
    """What one chunk is.

    Attributes:
        frames: F, latent frames of the training window, history included.
        history: K, of which a chunk is given the last ones.
        horizon: A; None for a model without actions.
    """

    frames: int
    history: int
    horizon: int | None = None

    def check(self) -> ChunkSize:
        """Return self.

        Raises:
            UserError: no history, or nothing new in a chunk.
        """
        if self.frames < 2:
            raise UserError(
                f"history={self.history}: this model's windows are of {self.frames} latent frame, which leaves nothing "
                "to go on with; use a model of longer windows (data.window.frames)"
            )
        if not 1 <= self.history < self.frames:
            legal = "1" if self.frames == 2 else f"1 to {self.frames - 1}"
            raise UserError(
                f"history={self.history}: a chunk of {self.frames} latent frames goes on from {legal} of them; use that"
            )
        return self


class RolloutHistory(Protocol):
    """What a rollout remembers.

    Attributes:
        chunk: sizes.
        latents: the last K latent frames (B, C, ≤ K, H, W), None before any.
    """

    chunk: ChunkSize
    latents: Tensor | None

    def observe(self, latents: Tensor, conditions: Conditions) -> None:
        """Take clean frames (B, C, n, H, W) as what happened next, under these conditions."""

    def sample(
        self, conditions: Conditions, *, mode: str, seeds: Sequence[int], size: tuple[int, int]
    ) -> SampledOutput:
        """Sample the next chunk.

        Args:
            conditions: prompt and state; its history is not read.
            mode: "video", "joint", or "action" (the video stream does not run on noise then).
            seeds: one per sample, others for every chunk (`chunk_seed`).
            size: latent height and width.

        Returns:
            Latents of the new frames alone. They are not observed yet.

        Raises:
            UserError: a mode that the model cannot serve, or mode action before any frame.
        """


class SlidingHistory:
    """The last K latent frames, recomputed with every chunk.

    Args:
        model: a `WorldActionModel` in evaluation mode.
        config: how it is sampled.
        chunk: sizes.
    """

    def __init__(self, model: nn.Module, config: SamplerConfig, chunk: ChunkSize) -> None:
        self.model, self.config, self.chunk = model, config, chunk.check()
        self.latents: Tensor | None = None

    def observe(self, latents: Tensor, conditions: Conditions) -> None:
        """See `RolloutHistory`."""
        self.latents = _tail(self.latents, latents, self.chunk.history)

    def sample(
        self, conditions: Conditions, *, mode: str, seeds: Sequence[int], size: tuple[int, int]
    ) -> SampledOutput:
        """See `RolloutHistory`."""
        sampled = sample(
            self.model,
            replace(conditions, history=self.latents),
            mode=mode,
            config=self.config,
            seeds=seeds,
            latent_shape=(self.chunk.frames, *size),
            horizon=self.chunk.horizon,
        )
        if sampled.latents is None or self.latents is None:
            return sampled
        return replace(sampled, latents=sampled.latents[:, :, self.latents.shape[2] :].clone())


class StreamingHistory:
    """States and keys of what has been, carried over.

    Actions see the last K frames, in the places that these have in training; SWA and DSWA layers reach as far back as
    their windows do, Gated DeltaNet layers to the first frame. A frame keeps what the conditions under which it was
    observed made of it. With guidance the branch without the prompt carries a history of its own.

    Args:
        model: a `WorldActionModel` in evaluation mode, trained with `model.video.history_causal`.
        config: how it is sampled.
        chunk: sizes.

    Raises:
        UserError: any other model.
    """

    def __init__(self, model: nn.Module, config: SamplerConfig, chunk: ChunkSize) -> None:
        streaming.check_causal(model)
        self.model, self.config, self.chunk = model, config, chunk.check()
        self.latents: Tensor | None = None
        self._past: streaming.StreamingState | None = None
        self._negative: streaming.StreamingState | None = None

    @torch.no_grad()
    def observe(self, latents: Tensor, conditions: Conditions) -> None:
        """See `RolloutHistory`."""
        options = {"state": conditions.state, "visible": self.chunk.history}
        text = (conditions.context, conditions.context_mask)
        self._past = streaming.extend_history(self.model, self._past, latents, *text, **options)
        if self.config.guidance != 1:
            self._negative = streaming.extend_history(
                self.model, self._negative, latents, *conditions.negative_branch(), **options
            )
        self.latents = _tail(self.latents, latents, self.chunk.history)

    @torch.no_grad()
    def sample(
        self, conditions: Conditions, *, mode: str, seeds: Sequence[int], size: tuple[int, int]
    ) -> SampledOutput:
        """See `RolloutHistory`."""
        if self.latents is None:  # the first chunk of a rollout that is given no frame
            plain = SlidingHistory(self.model, self.config, self.chunk)
            return plain.sample(conditions, mode=mode, seeds=seeds, size=size)
        check_request(
            self.model,
            replace(conditions, history=self.latents),
            mode=mode,
            seeds=seeds,
            latent_shape=(self.chunk.frames, *size),
            horizon=self.chunk.horizon,
        )
        device, actions, cache = conditions.context.device, None, None
        if mode != "video":
            shape = (self.chunk.horizon, self.model.config.action.action_dim)
            actions = StreamNoise(shape, seeds, "action", device, own=conditions.action_dim)
            cache = streaming.history_cache(self.model, self._past)
        if mode == "action":
            return SampledOutput(None, denoise_actions(self.model, cache, conditions, self.config, actions))
        return self._denoise(conditions, cache, actions, seeds, size)

    def _denoise(
        self,
        conditions: Conditions,
        cache: HistoryCache | None,
        actions: StreamNoise | None,
        seeds: Sequence[int],
        size: tuple[int, int],
    ) -> SampledOutput:
        """Modes video and joint: the new frames alone, on what is kept of the history."""
        text, state = (conditions.context, conditions.context_mask), conditions.state
        new = streaming.StreamingModel(self.model, self._past, *text, state=state)
        without = None
        if self.config.guidance != 1:
            without = streaming.StreamingModel(self.model, self._negative, *conditions.negative_branch(), state=state)

        read = None if actions is None else self.model.encode_action_context(*text, state=state)

        def positive(z: Tensor, t: Tensor, a: Tensor | None, t_action: Tensor) -> tuple[Tensor, Tensor | None]:
            velocity = new.video(z, t)
            if a is None:
                return velocity, None
            return velocity, self.model.forward_action(cache, a, t_action, read)

        def negative(z: Tensor, t: Tensor) -> Tensor:
            return without.video(z, t)

        shape = (self.model.config.video.latent_channels, self.chunk.frames, *size)
        # The noise of the whole window, as with a sliding history, so that both begin with the same.
        latents = StreamNoise(shape, seeds, "video", conditions.context.device, skipped=self.latents.shape[2])
        return integrate(
            positive,
            negative,
            config=self.config,
            sigmas=video_sigmas(self.config, self.chunk.frames, tokens_per_frame(self.model, *size)),
            latents=latents,
            actions=actions,
            history=None,
        )


def chunk_seed(seed: int, number: int) -> int:
    """Seed of a chunk's noise; that of the first is the rollout's own."""
    if number == 0:
        return int(seed)
    return int.from_bytes(hashlib.sha256(f"{int(seed)}:chunk:{number}".encode()).digest()[:6], "big")


def _tail(old: Tensor | None, new: Tensor, count: int) -> Tensor:
    """The last `count` latent frames (B, C, ·, H, W) of what was and what came; float32, of its own memory."""
    frames = new.float() if old is None else torch.cat([old, new.float()], dim=2)
    return frames[:, :, -count:].clone()
