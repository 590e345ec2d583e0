"""The rules a configuration must keep, one small function each. A rule names key, value and remedy in one line.

What a single value may be stands in the schema, with the setting; the functions here and in the files beside this one
compare settings. Types and key names are checked before, while composing. Mandatory values that are still missing
(`???`) pass here: the command that needs them asks for them.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from kairos_train.basics.errors import UserError, shown
from kairos_train.basics.geometry import PIXEL_MULTIPLE, TIME_STRIDE, whole_frames
from kairos_train.basics.plain import MISSING
from kairos_train.config.cluster_rules import (
    container_or_venv,
    environment_has_names,
    names_are_words,
    options_are_options,
    time_limit_is_a_time,
    time_limit_leaves_time,
)
from kairos_train.config.keys import walk
from kairos_train.config.layout_rules import (
    fp8_names_streams_and_layers,
    selective_recomputation_needs_whole_weights,
    sequence_needs_tensor,
    tensor_ranks_share_heads_and_channels,
)
from kairos_train.config.model_rules import (
    causal_history_is_restricted,
    heads_divide_the_width,
    latents_fit_the_encoders,
    layer_kinds_are_known,
    layers_are_whole_cycles,
    patches_tile_the_latents,
    rotary_splits_the_head,
    text_widths_agree,
    timestep_embedding_is_even,
    token_windows_have_no_history_rule,
)
from kairos_train.config.operation_rules import (
    deadline_is_a_time,
    faults_count_from_one,
    guard_sees_enough,
    silence_is_longer_than_heartbeats,
)
from kairos_train.config.schema import Config
from kairos_train.config.stage_rules import (
    action_weights_fit,
    adapters_fit,
    captions_are_shares,
    conditions_are_probabilities,
    curriculum_stages_have_names,
    history_leaves_a_frame_to_generate,
    image_conditions_are_probabilities,
    joint_has_an_action_stream,
    joint_sees_history,
    joint_window_has_actions,
    one_budget,
    only_a_joint_stage_freezes_the_video,
    some_loss_counts,
)

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""ASCII's and Unicode's control characters and line ends, and bytes of the command line that are no UTF-8."""


def validate(config: Config, sections: Sequence[str] | None = None) -> None:
    """Raise UserError for the first broken rule. Looks at nothing outside `config`: files are `compose`'s to check.

    Args:
        sections: the top-level sections that are going to be used; rules that compare one of them with another one that
            is not used do not apply. None: all are used.
    """
    for rule in RULES:
        compared = COMPARED.get(rule, ())
        if sections is None or set(compared) <= set(sections):
            rule(config)


def validate_model(config: Config) -> None:
    """Raise UserError for the first broken rule on the sizes of the model alone: of weights that are read, the rest of
    the configuration is of the machine that trained them."""
    values_are_legal(config.model, "model.")
    for rule in MODEL_RULES:
        rule(config)


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key; None below a section that is null."""
    section, _, name = key.rpartition(".")
    owner = operator.attrgetter(section)(config) if section else config
    return getattr(owner, name) if owner is not None else None


def values_are_legal(config: Any, prefix: str = "") -> None:
    """Every value keeps the rule that its field in the schema has.

    Args:
        config: a configuration or, with the key that it has there as `prefix`, a section of one.
    """
    for key, section, field in walk(config, prefix):
        rule, value = field.metadata.get("rule"), getattr(section, field.name)
        missing = value == MISSING
        if rule is None or value is None or (missing and "[" not in key):  # in items of lists nobody asks for it later
            continue
        if missing or not rule.holds(value):
            raise UserError(f"{key}={shown(value)} {rule.fault}")


def texts_are_lines(config: Config) -> None:
    """Texts end up in scripts, variables, names of files and logs, where a control character means something else."""
    for key, section, field in walk(config):
        value = getattr(section, field.name)
        texts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for text in texts:
            if isinstance(text, str) and _CONTROL.search(text) and key != "data.prompt_template":
                raise UserError(f"{key} holds {shown(repr(text))}; give one line of text, without control characters")


# --- data ---


def frames_are_4k_plus_1(config: Config) -> None:
    for key in ("data.window.frames", "data.clips.most_frames", "data.clips.least_frames"):
        frames = value_of(config, key)
        if (below := whole_frames(frames)) != frames:
            raise UserError(f"{key}={frames} is not 4k+1; use {max(below, 1)} or {below + TIME_STRIDE}")


def some_clips_are_long_enough(config: Config) -> None:
    least, most = config.data.clips.least_frames, config.data.clips.most_frames
    if least > most:
        raise UserError(
            f"data.clips.least_frames={least} is above data.clips.most_frames={most} and leaves no sample; lower it"
        )


def clips_have_sides(config: Config) -> None:
    clips = config.data.clips
    if clips.short_side < PIXEL_MULTIPLE:
        raise UserError(
            f"data.clips.short_side={clips.short_side} is below {PIXEL_MULTIPLE}; use {PIXEL_MULTIPLE} or more"
        )
    if not clips.aspects or not all(1 <= aspect <= 8 for aspect in clips.aspects):
        raise UserError(f"data.clips.aspects={clips.aspects}; give long side over short side, each from 1 to 8")


def pictures_are_multiples_of_32(config: Config) -> None:
    for key in ("data.window.height", "data.window.width"):
        pixels = value_of(config, key)
        if pixels % PIXEL_MULTIPLE:
            below = pixels // PIXEL_MULTIPLE * PIXEL_MULTIPLE
            use = f"{below} or {below + PIXEL_MULTIPLE}" if below else str(PIXEL_MULTIPLE)
            raise UserError(f"{key}={pixels} is no multiple of {PIXEL_MULTIPLE}; use {use}")


def head_stands_over_two_wrists(config: Config) -> None:
    """The head takes two thirds of the height, each wrist a third of it and half of the width."""
    window = config.data.window
    if window.layout != "head_over_wrists":
        return
    if window.cameras != MISSING and len(window.cameras) != 3:
        raise UserError(
            f"data.window.layout=head_over_wrists with data.window.cameras={window.cameras}; "
            "name three: the head, the left wrist, the right wrist"
        )
    if window.height % (3 * PIXEL_MULTIPLE):
        above = math.ceil(window.height / (3 * PIXEL_MULTIPLE)) * 3 * PIXEL_MULTIPLE
        raise UserError(
            f"data.window.height={window.height} with layout=head_over_wrists is no multiple of {3 * PIXEL_MULTIPLE}; "
            f"use {above}"
        )


def cameras_are_named_once(config: Config) -> None:
    cameras = config.data.window.cameras
    if cameras != MISSING and len(set(cameras)) < len(cameras):
        raise UserError(f"data.window.cameras={cameras} names a camera twice; name each once")


def absolute_dims_are_named_once(config: Config) -> None:
    dims = config.data.window.absolute_dims
    if len(set(dims)) < len(dims) or min(dims, default=0) < 0:
        raise UserError(f"data.window.absolute_dims={dims}; name each action dimension once, counted from 0")


def sources_give_samples(config: Config) -> None:
    sources = config.data.sources
    for i, source in enumerate(sources):
        if source.shards == MISSING:
            raise UserError(f"data.sources[{i}] has no shards; name its folder")
        if source.max_epochs is not None and source.max_epochs < 1:
            raise UserError(f"data.sources[{i}].max_epochs={source.max_epochs} is below 1; give 1 or more, or null")
    if sources and all(source.weight == 0 for source in sources):
        raise UserError("data.sources: every weight is 0; give one of them more")


def prompt_holds_the_task(config: Config) -> None:
    if "{task}" not in config.data.prompt_template:
        raise UserError(
            f"data.prompt_template={config.data.prompt_template!r} lacks {{task}}, the place of the instruction; add it"
        )


# --- optimizer and machine ---


def betas_are_two_fractions(config: Config) -> None:
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"optimizer.betas={betas}; give two numbers in [0, 1), as in [0.9, 0.95]")


def ema_forgets(config: Config) -> None:
    if config.train.ema_decay == 1:
        raise UserError("train.ema_decay=1 would keep the first weights for ever; give a fraction below 1, as 0.999")


MODEL_RULES: tuple[Callable[[Config], None], ...] = (
    layer_kinds_are_known,
    layers_are_whole_cycles,
    heads_divide_the_width,
    rotary_splits_the_head,
    timestep_embedding_is_even,
    patches_tile_the_latents,
    token_windows_have_no_history_rule,
    causal_history_is_restricted,
)
"""Those that look at `model` alone."""

RULES: tuple[Callable[[Config], None], ...] = (
    values_are_legal,
    texts_are_lines,
    *MODEL_RULES,
    latents_fit_the_encoders,
    text_widths_agree,
    frames_are_4k_plus_1,
    some_clips_are_long_enough,
    clips_have_sides,
    pictures_are_multiples_of_32,
    head_stands_over_two_wrists,
    cameras_are_named_once,
    absolute_dims_are_named_once,
    sources_give_samples,
    prompt_holds_the_task,
    joint_has_an_action_stream,
    only_a_joint_stage_freezes_the_video,
    adapters_fit,
    some_loss_counts,
    conditions_are_probabilities,
    image_conditions_are_probabilities,
    captions_are_shares,
    history_leaves_a_frame_to_generate,
    joint_sees_history,
    joint_window_has_actions,
    action_weights_fit,
    one_budget,
    curriculum_stages_have_names,
    betas_are_two_fractions,
    ema_forgets,
    tensor_ranks_share_heads_and_channels,
    sequence_needs_tensor,
    selective_recomputation_needs_whole_weights,
    fp8_names_streams_and_layers,
    deadline_is_a_time,
    guard_sees_enough,
    silence_is_longer_than_heartbeats,
    faults_count_from_one,
    time_limit_is_a_time,
    time_limit_leaves_time,
    names_are_words,
    options_are_options,
    environment_has_names,
    container_or_venv,
)
"""Every rule, in the order in which they are asked: single values first, so that later rules may divide."""

COMPARED = {
    text_widths_agree: ("encoders", "model"),
    latents_fit_the_encoders: ("encoders", "model"),
    joint_has_an_action_stream: ("stage", "model"),
    history_leaves_a_frame_to_generate: ("stage", "data"),
    joint_sees_history: ("stage", "model"),
    adapters_fit: ("stage", "precision"),
    joint_window_has_actions: ("stage", "data"),
    action_weights_fit: ("stage", "model"),
    tensor_ranks_share_heads_and_channels: ("parallel", "model", "stage"),
    fp8_names_streams_and_layers: ("precision", "model", "parallel", "train"),
    time_limit_leaves_time: ("cluster", "train"),
}
"""The sections that a rule compares, where it compares several."""
