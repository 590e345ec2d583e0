"""What the sources of a run must agree on with its configuration, told before any device is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dataloaders.config import DataConfig, WindowConfig
from dataloaders.files.urls import base_name
from dataloaders.shards import ShardIndex
from dataloaders.windows import POLICY_FIELDS
from kairos_train.basics.errors import UserError
from kairos_train.basics.geometry import latent_frames, video_frames
from kairos_train.basics.plain import MISSING
from kairos_train.conditioning.build import build_encoders
from kairos_train.conditioning.interfaces import identities_match
from kairos_train.config.schema import ActionStreamConfig, EncodersConfig, ModelConfig, StageConfig
from kairos_train.inference.normalization import Normalizer, from_statistics
from kairos_train.inference.robots import Robot
from kairos_train.objective.flow_matching import HISTORY_CONDITIONS
from kairos_train.training.inputs.contexts import check_captions

_WEIGHT_FREE = ("block_dct", "hashed_ngrams")


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
    _check_cameras(window, policy)
    for number, index in enumerate(indices):
        for other in indices[:number]:
            _check_order(other, index)
    if stage.streams == "joint":
        _check_actions(model.action, indices)
    _check_history(stage, indices)
    check_captions(stage.captions, indices)


def check_held_out(window: WindowConfig, policy: ShardIndex, held_out: ShardIndex) -> None:
    """Refuse validation shards that are not packed as those of the policy's source.

    Raises:
        UserError: other windows, or other cameras or another order of them.
    """
    if not policy.action_dim:
        _check_order(policy, held_out)
        return
    check_window(window, held_out)
    _check_cameras(window, held_out)
    if held_out.cameras and policy.cameras and held_out.cameras != policy.cameras:
        raise _other_cameras(policy, held_out)


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


def _check_cameras(window: WindowConfig, index: ShardIndex) -> None:
    """Refuse shards of other cameras than the configuration names; it may name none, and shards may not know theirs."""
    wanted = () if window.cameras == MISSING else tuple(window.cameras)
    if wanted and index.cameras and wanted != index.cameras:
        raise UserError(
            f"data.window.cameras={_named(wanted)}: {index.folder} was packed with {_named(index.cameras)}; set that "
            "or repack"
        )


def _check_order(one: ShardIndex, other: ShardIndex) -> None:
    """Refuse two sources that show cameras of the same names in different orders."""
    if [c for c in one.cameras if c in other.cameras] != [c for c in other.cameras if c in one.cameras]:
        raise _other_cameras(one, other)


def _other_cameras(one: ShardIndex, other: ShardIndex) -> UserError:
    return UserError(
        f"data: {one.folder} was packed with the cameras {_named(one.cameras)}, {other.folder} with "
        f"{_named(other.cameras)}; a model sees them in one order: repack one of them with the other's "
        "data.window.cameras"
    )


def _named(cameras: Sequence[str]) -> str:
    return f"[{','.join(cameras)}]"


def _check_actions(action: ActionStreamConfig, indices: Sequence[ShardIndex]) -> None:
    """The model has the sizes of the largest robot, in whatever order the sources are."""
    for field in ("action_dim", "state_dim"):
        wanted = getattr(action, field)
        largest = max(indices, key=lambda index: getattr(index, field))
        if (packed := getattr(largest, field)) != wanted:
            raise UserError(
                f"model.action.{field}={wanted}: {largest.folder} holds {packed}; set {packed}"
                + ("" if len(indices) == 1 else ", the largest of the sources")
            )


def robots_of(indices: Sequence[ShardIndex]) -> dict[int, Robot]:
    """The robot of every source with actions, by the source's number, the policy's first."""
    found: dict[int, Robot] = {}
    for number, index in enumerate(indices):
        if not index.action_dim:
            continue
        stem = name = str(index.source.get("dataset") or base_name(index.folder))
        while name in {robot.name for robot in found.values()}:
            name = f"{stem}-{number}"
            stem = name
        found[number] = Robot(
            name=name,
            action_dim=index.action_dim,
            state_dim=index.state_dim,
            fps=index.fps,
            cameras=list(index.source.get("cameras", [])),
            window={field: getattr(index.window, field) for field in POLICY_FIELDS},
            statistics=index.statistics(),
        )
    return found


def held_out_source(indices: Sequence[ShardIndex], held_out: ShardIndex) -> int:
    """Number of the source whose robot held-out shards are of; the policy's where that cannot be told."""
    policy, about = policy_source(indices), (held_out.action_dim, held_out.state_dim)
    fitting = [
        number
        for number, index in enumerate(indices)
        if index.action_dim
        and (index.action_dim, index.state_dim) == about
        and all(getattr(index.window, field) == getattr(held_out.window, field) for field in POLICY_FIELDS)
    ]
    same = [n for n in fitting if indices[n].source.get("dataset") == held_out.source.get("dataset")]
    same.sort(key=lambda n: indices[n].cameras != held_out.cameras)
    return next(iter([*same, *(n for n in fitting if n == policy), *fitting]), policy)


def rates_of(indices: Sequence[ShardIndex]) -> str | None:
    """What is to be said of sources whose frames or actions follow each other at several rates; None of one rate."""
    rates = [
        (index.fps / index.window.action_video_freq_ratio if index.clips is None else index.fps, index)
        for index in indices
    ]
    actions = {index.fps for index in indices if index.action_dim}
    if len({rate for rate, _ in rates}) < 2 and len(actions) < 2:
        return None
    told = ", ".join(
        f"{index.source.get('dataset') or index.folder} {rate:g} frames"
        + (f" and {index.fps:g} actions" if index.action_dim else "")
        for rate, index in rates
    )
    return f"the sources have several rates per second ({told}): a step of the model is another time in each"


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


def normalizers_of(index: ShardIndex, *, data: DataConfig, stage: StageConfig) -> tuple[Normalizer, Normalizer] | None:
    """Of a source's states and actions; None of a source without a robot, and in a video stage.

    Raises:
        UserError: its statistics are missing or not what they must be.
    """
    if not index.action_dim or stage.streams == "video":
        return None
    statistics = index.statistics()
    return (
        from_statistics(statistics, group="state", key=index.window.state_key, mode=data.normalize_state),
        from_statistics(statistics, group="action", key=index.window.action_key, mode=data.normalize_action),
    )


def check_encoders(wanted: EncodersConfig, indices: Sequence[ShardIndex]) -> None:
    """Refuse shards of several encoders, or of others than the configuration names, as far as that can be told without
    their weights."""
    known = [index.encoders for index in indices if index.encoders is not None]
    for other in known[1:]:
        identities_match(known[0], other)
    if not known:
        return
    check_kinds(wanted, known[0])
    if {wanted.video.kind, wanted.text.kind} <= set(_WEIGHT_FREE):
        identities_match(known[0], build_encoders(wanted).identity)


def check_kinds(wanted: EncodersConfig, identity: Mapping[str, Any]) -> None:
    """Refuse shards that were encoded by encoders of another kind, or of which the VLM was shown other things, than the
    configuration says."""
    for name in ("video", "text"):
        kind = getattr(wanted, name).kind
        if identity[name].get("kind") != kind:
            raise UserError(
                f"encoders.{name}.kind={kind}: the shards were encoded with {identity[name].get('kind')}; choose that"
            )
    for name in ("image", "system_message") if wanted.text.kind == "qwen" else ():
        here, found = getattr(wanted.text, name), identity["text"].get(name, True)
        if here != found:
            text = f"encoders.text.{name}={str(here).lower()}: the shards were encoded with {str(found).lower()}"
            raise UserError(f"{text}; set that, or pack them again")
