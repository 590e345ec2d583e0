"""The rules of a stage: its streams, losses, conditions, captions and length, and of the curriculum it stands in."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kairos_train.basics.errors import UserError
from kairos_train.basics.geometry import latent_frames, video_frames
from kairos_train.basics.plain import MISSING
from kairos_train.config.schema import CONDITIONS, IMAGE_CONDITIONS, Config

LENGTHS = ("steps", "epochs", "samples", "tokens")
"""What a stage's length is given in."""

FRAME_CONDITIONS = ("ti2v", "i2v")
"""The conditions that give history frames."""


def joint_has_an_action_stream(config: Config) -> None:
    if config.stage.streams == "joint" and config.model.action is None:
        raise UserError(
            f"stage.streams=joint but model.action=null (model {config.model.name}); "
            "use a model with an action stream or stage.streams=video"
        )


def only_a_joint_stage_freezes_the_video(config: Config) -> None:
    if config.stage.streams == "video" and not config.stage.train_video:
        raise UserError(
            "stage.train_video=false with stage.streams=video trains nothing; "
            "use stage.streams=joint or stage.train_video=true"
        )


def adapters_fit(config: Config) -> None:
    lora = config.stage.lora
    if lora.rank is None:
        return
    for key in ("rank", "alpha"):
        if not getattr(lora, key) > 0:
            raise UserError(f"stage.lora.{key}={getattr(lora, key)} is not positive; give one above 0")
    streams = ("video", "action") if config.stage.streams == "joint" else ("video",)
    if not lora.streams or not set(lora.streams) <= set(streams) or len(set(lora.streams)) < len(lora.streams):
        raise UserError(f"stage.lora.streams={lora.streams}; name each once, out of {', '.join(streams)}")
    if not lora.targets or len(set(lora.targets)) < len(lora.targets):
        raise UserError(f"stage.lora.targets={lora.targets}; name each layer once, as in [self_attn.q, self_attn.v]")
    if config.precision.fp8.recipe is not None:
        raise UserError(f"stage.lora with precision.fp8.recipe={config.precision.fp8.recipe}; use recipe=null")
    if "video" in lora.streams and not config.stage.train_video:
        raise UserError("stage.train_video=false freezes the video stream that stage.lora adapts; use true")


def some_loss_counts(config: Config) -> None:
    stage = config.stage
    video = stage.video_loss_weight if stage.train_video else 0.0
    action = stage.action_loss_weight if stage.streams == "joint" else 0.0
    if video + action == 0:
        raise UserError(
            f"stage.video_loss_weight={stage.video_loss_weight} and stage.action_loss_weight="
            f"{stage.action_loss_weight} leave nothing to train; raise the weight of a stream that trains"
        )


def conditions_are_probabilities(config: Config) -> None:
    _are_probabilities("stage.conditions", config.stage.conditions, CONDITIONS)


def image_conditions_are_probabilities(config: Config) -> None:
    _are_probabilities("stage.image_conditions", config.stage.image_conditions, IMAGE_CONDITIONS)


def _are_probabilities(key: str, shares: dict[str, float], names: Sequence[str]) -> None:
    for name, share in shares.items():
        if name not in names:
            raise UserError(f"{key} holds {name!r}; use {', '.join(names)}")
        if not 0 <= share <= 1:
            raise UserError(f"{key}.{name}={share} is outside [0, 1]; give a probability")
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(
            f"{key}={shares} sums to {sum(shares.values()):g}; probabilities sum to 1 (set the ones not wanted to 0)"
        )


def captions_are_shares(config: Config) -> None:
    captions = config.stage.captions
    names = [share.name for share in captions]
    if len(set(names)) < len(names) or MISSING in names:
        raise UserError(f"stage.captions names {', '.join(names)}; name each caption once")
    for field, sums in (
        ("start", [c.start for c in captions]),
        ("end", [c.start if c.end is None else c.end for c in captions]),
    ):
        if captions and sum(sums) == 0:
            raise UserError(f"stage.captions: every share is 0 at the {field}; give one of them more")


def _gives_frames(config: Config) -> bool:
    return any(config.stage.conditions.get(name, 0) > 0 for name in FRAME_CONDITIONS)


def history_leaves_a_frame_to_generate(config: Config) -> None:
    history, frames = config.stage.history_frames, config.data.window.frames
    latents = latent_frames(frames)
    if not _gives_frames(config) or frames == 1:  # images have conditions of their own
        return
    if history < 1:
        raise UserError(
            f"stage.history_frames={history} but {' and '.join(FRAME_CONDITIONS)} of stage.conditions give frames; "
            "use 1 or more"
        )
    if history >= latents:
        raise UserError(
            f"stage.history_frames={history} leaves nothing to generate of the {latents} latent frames of "
            f"data.window.frames={frames}; use data.window.frames={video_frames(history + 1)} or more, "
            "or fewer history frames"
        )


def joint_sees_history(config: Config) -> None:
    if config.stage.streams != "joint":
        return
    if not _gives_frames(config):
        raise UserError(
            "stage.streams=joint but stage.conditions gives no frames, and actions would be blind; "
            f"give {' or '.join(FRAME_CONDITIONS)} a probability"
        )
    if not config.model.video.restrict_history_query_to_history:
        raise UserError(
            "stage.streams=joint with model.video.restrict_history_query_to_history=false makes action-only inference "
            "inexact; set it to true"
        )


def joint_window_has_actions(config: Config) -> None:
    if config.stage.streams == "joint" and config.data.window.frames == 1:
        raise UserError(
            "data.window.frames=1 spans no action but stage.streams=joint; use data.window.frames=5 or more"
        )


def action_weights_fit(config: Config) -> None:
    weights, action = config.stage.action_dim_weights, config.model.action
    if weights is None or action is None:
        return
    if action.action_dim not in (MISSING, len(weights)):
        raise UserError(
            f"stage.action_dim_weights has {len(weights)} values but model.action.action_dim={action.action_dim}; "
            "give one per dimension"
        )
    if min(weights, default=0) < 0 or abs(sum(weights) - 1) > 1e-6:
        raise UserError(
            f"stage.action_dim_weights={weights} sums to {sum(weights):g}; give weights of 0 or more that sum to 1"
        )


# --- the run ---


def one_budget(config: Config) -> None:
    given = [unit for unit in LENGTHS if getattr(config.train, unit) is not None]
    if not given:
        keys = ", ".join(f"train.{unit}" for unit in LENGTHS)
        raise UserError(f"{keys} are all null; give one, the stage's length")
    if len(given) > 1:
        values = " and ".join(f"train.{unit}={getattr(config.train, unit)}" for unit in given)
        raise UserError(f"{values}: a stage has one length; set the others to null")


def curriculum_stages_have_names(config: Config) -> None:
    names = [stage.name for stage in config.curriculum.stages]
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(f"curriculum.stages holds {name!r}; a name is made of letters, digits, _ and -")
    if len(set(names)) < len(names):
        raise UserError(f"curriculum.stages: {', '.join(names)}; name each once")
    for key in ("first", "last"):
        value = getattr(config.curriculum, key)
        if value is not None and value not in names:
            raise UserError(f"curriculum.{key}={value} is no stage; there are {', '.join(names) or 'none'}")
    first, last = config.curriculum.first, config.curriculum.last
    if first is not None and last is not None and names.index(first) > names.index(last):
        raise UserError(f"curriculum.first={first} comes after curriculum.last={last}; exchange them")
