"""What the sources of a run must agree on with its configuration, told before any device is taken."""

from __future__ import annotations

from collections.abc import Sequence

from dataloaders.config import WindowConfig
from dataloaders.shards import ShardIndex
from dataloaders.windows import POLICY_FIELDS
from kairos_train.basics.errors import UserError
from kairos_train.basics.geometry import latent_frames, video_frames
from kairos_train.config.schema import ActionStreamConfig, ModelConfig, StageConfig
from kairos_train.objective.flow_matching import HISTORY_CONDITIONS
from kairos_train.training.inputs.contexts import check_captions


def policy_source(indices: Sequence[ShardIndex]) -> int:
    """Number of the source whose robot a policy of this run is for: the first one with actions, else the first."""
    return next((number for number, index in enumerate(indices) if index.action_dim), 0)


def check_sources(
    indices: Sequence[ShardIndex], *, window: WindowConfig, model: ModelConfig, stage: StageConfig
) -> None:
    """Refuse sources that a stage of this model cannot be trained on.

    `window`, which is `data.window`, is that of the policy's source, so that exports know it; other sources, and videos
    without a robot, have windows of their own.

    Raises:
        UserError: other windows or sizes; no source with actions in a joint stage; captions nobody has; clips that
            history leaves nothing of.
    """
    policy = indices[policy_source(indices)]
    if policy.action_dim:
        check_window(window, policy)
    if stage.streams == "joint":
        _check_actions(model.action, indices)
    _check_history(stage, indices)
    check_captions(stage.captions, indices)


def check_window(window: WindowConfig, index: ShardIndex) -> None:
    """Refuse shards whose windows are not what the configuration says; clips of plain videos have none."""
    if index.clips is not None:
        return
    for field in POLICY_FIELDS:
        packed, wanted = getattr(index.window, field), getattr(window, field)
        if packed != wanted:
            raise UserError(
                f"data.window.{field}={wanted}: {index.folder} was packed with {packed}; set that or repack"
            )


def _check_actions(action: ActionStreamConfig, indices: Sequence[ShardIndex]) -> None:
    number = policy_source(indices)
    for i, index in enumerate(indices):
        for field, packed in (("action_dim", index.action_dim), ("state_dim", index.state_dim)):
            wanted = getattr(action, field)
            if packed != wanted if i == number else packed > wanted:
                raise UserError(
                    f"model.action.{field}={wanted}: {index.folder} holds {packed}; set {packed}"
                    + ("" if len(indices) == 1 else " (the largest, with the policy's robot as the first source)")
                )


def _check_history(stage: StageConfig, indices: Sequence[ShardIndex]) -> None:
    """Frames that are given must leave frames to generate, in clips of every length but images."""
    known = stage.history_frames
    if not any(stage.conditions.get(name, 0) > 0 for name in HISTORY_CONDITIONS):
        return
    for index in indices:
        for shape in index.shapes:
            latents = latent_frames(shape["frames"])
            if 1 < latents <= known:
                raise UserError(
                    f"stage.history_frames={known} leaves nothing of the {latents} latent frames of clips in "
                    f"{index.folder}; use fewer, or pack with data.clips.least_frames={video_frames(known + 1)}"
                )
