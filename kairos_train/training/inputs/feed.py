"""From raw shard batches to conditioned micro-batches: encoders, normalisation, objective.

Shards may carry cached latents and contexts; what they lack is encoded here, on the training device. Either way the
encoders' identity is one fact of the run, recorded in its checkpoints.

With several sources each is normalised with its own statistics, and states and actions of fewer dimensions than the
model's are padded with zeros that carry no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dataloaders.config import DataConfig
from dataloaders.consistency.report import read_report
from dataloaders.loading.batch import Batch
from dataloaders.loading.buckets import Bucket
from dataloaders.shards import ShardIndex, read_index
from dataloaders.windows import action_count
from kairos_train.basics.errors import UserError
from kairos_train.basics.geometry import latent_frames, latent_sides
from kairos_train.conditioning.build import build_encoders
from kairos_train.conditioning.interfaces import Encoders, identities_match
from kairos_train.config.schema import EncodersConfig, ModelConfig, StageConfig
from kairos_train.objective.flow_matching import ConditionedBatch, FlowMatching
from kairos_train.objective.randomness import Choices
from kairos_train.training.describe import sample_flops
from kairos_train.training.inputs.contexts import Contexts
from kairos_train.training.inputs.sources import (
    check_kinds,
    held_out_source,
    normalizers_of,
    policy_source,
    robots_of,
)


class Feed:
    """Encodes, normalises and conditions batches.

    Args:
        indices: of the sources that the batches come from, in their order (`check_sources` accepts them).
        device: where the results lie.
        data: windows, modes of normalisation.
        encoders: for what the shards do not have.
        model: its sizes.
        stage: streams, conditions, captions.
        seed: of what is drawn.

    Attributes:
        stage: as given.
        identity: the encoders', for checkpoints and exports.
        needs_frames: whether batches must carry decoded frames.
        policy: number of the source whose robot a policy of this run is for.
        statistics: of that source.
        robot: how a policy meets that robot: its cameras in the order of the picture, `fps` of frames and actions, and
            which `contradictions` of its dataset were resolved, where there were any; None without a robot.
        robots: of all sources with actions, the policy's first; none in a video stage.
        held_out: number of the source whose robot the validation shards are of.

    Raises:
        UserError: the shards were packed with other encoders than the configuration names, or with several.
    """

    def __init__(
        self,
        indices: Sequence[ShardIndex],
        device: torch.device,
        *,
        data: DataConfig,
        encoders: EncodersConfig,
        model: ModelConfig,
        stage: StageConfig,
        seed: int,
    ) -> None:
        self.stage, self.device = stage, device
        self._data, self._model = data, model
        self.needs_frames = any(index.encoders is None for index in indices)
        self.encoders: Encoders | None = None
        if self.needs_frames or _weights_given(encoders):
            self.encoders = build_encoders(encoders, device)
        self.identity = _identity(encoders, indices, self.encoders)
        self.objective = FlowMatching(stage, seed=seed, patch=tuple(model.video.patch_size[1:]))
        self.contexts = Contexts(
            stage.captions,
            None if self.encoders is None else self.encoders.text,
            sees_pictures=bool(self.identity["text"].get("image", False)),
            device=device,
        )
        self.policy = policy_source(indices)
        self.statistics = indices[self.policy].statistics()
        self.robot = _robot(indices[self.policy])
        self.robots = list(robots_of(indices).values()) if stage.streams == "joint" else []
        self.held_out = self.policy
        if data.validation_shards is not None and len(self.robots) > 1:
            self.held_out = held_out_source(indices, read_index(data.validation_shards))
        self._normalizers = [normalizers_of(index, data=data, stage=stage) for index in indices]
        self.empty_context = self._empty_context(indices)

    def condition(
        self, batch: Batch, *, step: int, progress: float = 0.0, source: int | None = None
    ) -> ConditionedBatch:
        """The micro-batch of `step`: what is drawn depends on (seed, step, sample key) alone.

        Args:
            progress: share of the stage that is done.
            source: number of the source whose statistics hold; None: each sample's own.
        """
        latents = self._latents(batch)
        choices = self.objective.choices(batch.keys, step=step, frames=latents.shape[2])
        given = self._given(batch, latents, choices, progress=progress, source=source)
        conditioned = self.objective.condition(keys=batch.keys, step=step, empty_context=self.empty_context, **given)
        actions = 0 if conditioned.action is None else conditioned.action.shape[1]
        patch = self.objective.patch[0] * self.objective.patch[1]
        conditioned.tokens = latents[0, 0].numel() // patch + actions
        conditioned.flops = sample_flops(
            self._model, self.stage, latents.shape[1:], context_tokens=given["context"].shape[1], actions=actions
        )
        return conditioned

    def encode(self, batch: Batch, condition: str, *, source: int) -> dict[str, Tensor]:
        """What `condition` would add noise to: latents, context, context_mask, and in a joint stage state, actions and
        action_mask; every sample under the same condition, with the caption it begins the stage with.

        Args:
            condition: "ti2v" or "t2v": whether the context may show the first frame.
            source: number of the source whose statistics hold.
        """
        choices = [Choices(condition, drop_context=False, video_index=0, action_index=0, caption=0.0)] * len(batch.keys)
        return self._given(batch, self._latents(batch), choices, progress=0.0, source=source)

    def zeros(self, bucket: Bucket, samples: int, *, like: ConditionedBatch) -> ConditionedBatch:
        """A micro-batch of a size, of nothing but zeros; its contexts are as long as those of `like`."""
        frames, sides = latent_frames(bucket.frames), latent_sides(bucket.height, bucket.width)
        context = like.context[:1].expand(samples, -1, -1)
        inputs = {
            "latents": torch.zeros(samples, self._model.video.latent_channels, frames, *sides, device=self.device),
            "context": context,
            "context_mask": torch.ones(context.shape[:2], dtype=torch.bool, device=self.device),
        }
        if bucket.has_actions and self.stage.streams == "joint":
            count, sizes = action_count(self._data.window), self._model.action
            inputs |= {
                "state": torch.zeros(samples, 1, sizes.state_dim, device=self.device),
                "actions": torch.zeros(samples, count, sizes.action_dim, device=self.device),
                "action_mask": torch.ones(samples, count, dtype=torch.bool, device=self.device),
            }
        keys = [f"zeros {i}" for i in range(samples)]
        return self.objective.condition(keys=keys, step=0, empty_context=self.empty_context, **inputs)

    def _given(
        self, batch: Batch, latents: Tensor, choices: Sequence[Choices], *, progress: float, source: int | None
    ) -> dict[str, Tensor]:
        context, mask = self.contexts.of(batch, choices, progress=progress)
        sources = batch.source if source is None else [source] * len(batch.keys)
        return {"latents": latents, "context": context, "context_mask": mask, **self._numbers(batch, sources)}

    def _latents(self, batch: Batch) -> Tensor:
        if batch.latents is not None:
            return batch.latents.to(self.device).float()
        return self.encoders.video.encode(batch.frames.to(self.device))

    def _numbers(self, batch: Batch, sources: Sequence[int]) -> dict[str, Tensor]:
        """State, actions and their masks as the objective takes them; nothing in a video stage or without actions."""
        if self.stage.streams == "video" or batch.actions is None:
            return {}
        sizes = self._model.action
        state = torch.zeros(len(batch.keys), 1, sizes.state_dim)
        actions = torch.zeros(len(batch.keys), batch.actions.shape[1], sizes.action_dim)
        dims = torch.zeros(len(batch.keys), sizes.action_dim, dtype=torch.bool)
        for i, source in enumerate(sources):
            of_state, of_action = self._normalizers[source]
            state[i, :, : of_state.dim] = of_state.normalize(batch.state[i, :, : of_state.dim])
            own = of_action.normalize(batch.actions[i, :, : of_action.dim])
            actions[i, :, : of_action.dim] = own
            dims[i, : of_action.dim] = True
        numbers = {"state": state, "actions": actions, "action_mask": batch.action_mask}
        if not dims.all():
            numbers["action_dim_mask"] = dims
        return {name: value.to(self.device) for name, value in numbers.items()}

    def _empty_context(self, indices: Sequence[ShardIndex]) -> Tensor | None:
        dropped = self.stage.cfg_dropout > 0 and self.stage.cfg_dropout_form == "empty_prompt"
        if not (self.stage.conditions.get("i2v", 0) or dropped):
            return None
        for index in indices:
            cached = index.empty_context()
            if cached is not None:
                return torch.from_numpy(cached).float().to(self.device)
        if self.encoders is None:
            who = "stage.cfg_dropout_form=empty_prompt" if dropped else "stage.conditions.i2v"
            raise UserError(f"{who} needs the empty prompt's encoding: repack with --encode")
        context, mask = self.encoders.text.encode([""], None)
        return context[0, mask[0]]


def _robot(index: ShardIndex) -> dict[str, Any] | None:
    if not index.action_dim:
        return None
    found = read_report(index.folder)
    names = sorted({entry["name"] for entry in found["contradictions"]}) if found else []
    robot = {"fps": index.fps, "cameras": list(index.source.get("cameras", []))}
    return robot | ({"contradictions": names} if names else {})


def _identity(wanted: EncodersConfig, indices: Sequence[ShardIndex], encoders: Encoders | None) -> dict[str, Any]:
    """The one pair of encoders of all sources and this run."""
    known = [index.encoders for index in indices if index.encoders is not None]
    if encoders is not None:
        known.append(encoders.identity)
    for other in known[1:]:
        identities_match(known[0], other)
    if encoders is None:
        check_kinds(wanted, known[0])
    return known[-1]


def _weights_given(encoders: EncodersConfig) -> bool:
    """Whether the encoders can be built: weight-free ones always, real ones where their weights are named."""
    real = [e for e in (encoders.video, encoders.text) if e.kind in ("wan", "tiny_vae", "qwen")]
    return all(e.path is not None for e in real)
