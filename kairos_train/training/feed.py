"""From raw shard batches to conditioned micro-batches: encoders, normalisation, objective.

Shards may carry cached latents and contexts; what they lack is encoded here, on the training device. Either way the
encoders' identity is one fact of the run, recorded in its checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dataloaders.batch import Batch
from dataloaders.shards import ShardIndex
from kairos_train.conditioning.build import build_encoders
from kairos_train.conditioning.interfaces import Encoders, identities_match
from kairos_train.config.schema import Config
from kairos_train.errors import UserError
from kairos_train.inference import normalization
from kairos_train.objective.flow_matching import ConditionedBatch, FlowMatching


class Feed:
    """Encodes, normalises and conditions batches.

    Args:
        config: data keys and modes, encoders, stage.
        index: of the shards that the batches come from.
        device: where the results lie.

    Attributes:
        identity: the encoders', for checkpoints and exports.
        needs_frames: whether batches must carry decoded frames.

    Raises:
        UserError: the shards were packed for other windows, actions or encoders than the configuration names.
    """

    def __init__(self, config: Config, index: ShardIndex, device: torch.device) -> None:
        check_index(config, index)
        self.config, self.device = config, device
        self.needs_frames = index.encoders is None
        self.encoders: Encoders | None = None
        if index.encoders is None or _weights_given(config):
            self.encoders = build_encoders(config.encoders, device)
        if index.encoders is not None:
            if self.encoders is not None:
                identities_match(index.encoders, self.encoders.identity)
            else:
                _check_kinds(config, index.encoders)
        self.identity: dict[str, Any] = index.encoders or self.encoders.identity
        self.objective = FlowMatching(config.stage, seed=config.seed, patch=tuple(config.model.video.patch_size[1:]))
        self.statistics = index.statistics()
        data = config.data
        self.action_normalizer = normalization.from_statistics(
            self.statistics, group="action", key=data.window.action_key, mode=data.normalize_action
        )
        self.state_normalizer = normalization.from_statistics(
            self.statistics, group="state", key=data.window.state_key, mode=data.normalize_state
        )
        self.empty_context = self._empty_context(index)

    def condition(self, batch: Batch, *, step: int) -> ConditionedBatch:
        """The micro-batch of `step`: what is drawn depends on (seed, step, sample key) alone."""
        latents, (context, mask) = self._latents(batch), self._context(batch)
        joint = self.config.stage.streams == "joint"
        return self.objective.condition(
            keys=batch.keys,
            step=step,
            latents=latents,
            context=context,
            context_mask=mask,
            empty_context=self.empty_context,
            state=self.state_normalizer.normalize(batch.state).to(self.device) if joint else None,
            actions=self.action_normalizer.normalize(batch.actions).to(self.device) if joint else None,
            action_mask=batch.action_mask.to(self.device) if joint else None,
        )

    def _latents(self, batch: Batch) -> Tensor:
        if batch.latents is not None:
            return batch.latents.to(self.device).float()
        return self.encoders.video.encode(batch.frames.to(self.device))

    def _context(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.context is not None:
            return batch.context.to(self.device).float(), batch.context_mask.to(self.device)
        # The first frame is the image of the prompt, for encoders that look at one.
        images = None if batch.frames is None else batch.frames[:, 0].to(self.device)
        return self.encoders.text.encode(batch.text, images)

    def _empty_context(self, index: ShardIndex) -> Tensor | None:
        if not self.config.stage.conditions.get("i2v", 0):
            return None
        cached = index.empty_context()
        if cached is not None:
            return torch.from_numpy(cached).float().to(self.device)
        if self.encoders is None:
            raise UserError("stage.conditions.i2v needs the empty prompt's encoding: repack with --encode")
        context, mask = self.encoders.text.encode([""], None)
        return context[0, mask[0]]


def check_index(config: Config, index: ShardIndex) -> None:
    """Refuse shards whose windows, actions or states are not what the configuration says."""
    window = config.data.window
    for field in ("frames", "action_video_freq_ratio", "height", "width", "state_key", "action_key"):
        packed, wanted = getattr(index.window, field), getattr(window, field)
        if packed != wanted:
            raise UserError(
                f"data.window.{field}={wanted}: {index.folder} was packed with {packed}; set that or repack"
            )
    if config.stage.streams == "joint":
        for field, packed in (("action_dim", index.action_dim), ("state_dim", index.state_dim)):
            wanted = getattr(config.model.action, field)
            if packed != wanted:
                raise UserError(f"model.action.{field}={wanted}: {index.folder} holds {packed}; set {packed}")


def _weights_given(config: Config) -> bool:
    """Whether the encoders can be built: weight-free ones always, real ones where their weights are named."""
    encoders = config.encoders
    real = [e for e in (encoders.video, encoders.text) if e.kind in ("wan", "qwen")]
    return all(e.path is not None for e in real)


def _check_kinds(config: Config, identity: dict[str, Any]) -> None:
    for name in ("video", "text"):
        kind = getattr(config.encoders, name).kind
        if identity[name].get("kind") != kind:
            raise UserError(
                f"encoders.{name}.kind={kind}: the shards were encoded with {identity[name].get('kind')}; choose that"
            )
