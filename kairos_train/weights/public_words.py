"""What a configuration of the public inference code says of the weights that it loads.

Such a configuration is a Python file. It is read, not run: constants, lists, `dict(...)` and names assigned before are
followed; whatever else a file computes (paths out of the environment) counts as unknown.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kairos_train.basics.errors import UserError
from kairos_train.objective import schedule

OLDER_CYCLE = ["SWA", "SWA", "DSWA", "GATED"]
"""Layers of `KairosDiT`, which takes no order of its own."""

NOT_EXPRESSIBLE = (
    *("use_first_frame_cond", "has_image_input", "has_image_pos_emb", "has_ref_conv", "add_control_adapter"),
    *("require_clip_embedding", "require_vae_embedding", "attend_k0"),
)
"""Switches of the public networks that are off in every release."""

SIZES = {
    **{name: name for name in ("num_layers", "num_heads", "text_dim", "freq_dim", "eps")},
    **{"dim": "video.dim", "ffn_dim": "video.ffn_dim", "in_dim": "video.latent_channels"},
    "patch_size": "video.patch_size",
}
ACTION_SIZES = {"dim": "action.dim", "ffn_dim": "action.ffn_dim"}
HEAD_SIZES = {"action_dim": "action.action_dim", "action_state_dim": "action.state_dim"}


class Unknown:
    """What a file computes and reading it does not tell."""

    def __repr__(self) -> str:
        return "(computed)"


UNKNOWN = Unknown()


@dataclass(frozen=True)
class PublicWords:
    """What a public configuration says.

    Attributes:
        settings: below `model`, by dotted key.
        distilled: whether it samples with the fixed times of a distilled model.
    """

    settings: dict[str, Any]
    distilled: bool


def read_public_config(file: Path) -> PublicWords:
    """The words of a Python configuration.

    Raises:
        UserError: unreadable, without a network, or with what cannot be expressed here.
    """
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{file}: is no Python file ({error}); give a configuration of the public code") from None
    names: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            value = _value(statement.value, names)
            names |= {target.id: value for target in statement.targets if isinstance(target, ast.Name)}
    pipeline = _dict(names.get("pipeline"))
    arguments = _dict(pipeline.get("pipeline_args"))
    network = arguments.get("dit_config", names.get("dit_config"))
    if not isinstance(network, dict):
        raise UserError(f"{file}: has no dit_config, in pipeline_args of pipeline or alone; give another configuration")
    if pipeline.get("tea_cache_l1_thresh") is not None:
        raise UserError(
            f"{file}: tea_cache_l1_thresh={pipeline['tea_cache_l1_thresh']}: TeaCache leaves out passes of the network "
            "and is not implemented here; set it to None in a copy of the file, the weights are the same without it"
        )
    times = arguments.get("selected_sampling_time", names.get("selected_sampling_time"))
    return PublicWords(network_settings(network, str(file)), distilled=_is_distilled(times, file))


def network_settings(network: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings below `model` out of a `dit_config`.

    Raises:
        UserError: a network, or a switch of it, that cannot be expressed here.
    """
    kind = network.get("dit_type")
    if kind == "Simple_Multi_DIT_Wrapper":
        video, action = _dict(network.get("video_dit")), _dict(network.get("action_dit"))
        kind = video.get("dit_type")
    else:
        video, action = network, {}
    if kind not in ("KairosDiT", "KairosDiTV2"):
        raise UserError(f"{where}: dit_type {kind!r} is no network that is known here; give the model with model=NAME")
    for name in NOT_EXPRESSIBLE:
        if found := video.get(name) or action.get(name):
            raise UserError(f"{where}: {name}={found} has no counterpart here, where it is False as in every release")
    if not video.get("seperated_timestep", False):
        raise UserError(f"{where}: seperated_timestep=False has no counterpart here; video timesteps are per token")
    settings = {known: video[name] for name, known in SIZES.items() if name in video}
    settings |= {known: action[name] for name, known in ACTION_SIZES.items() if name in action}
    settings |= {known: value for name, known in HEAD_SIZES.items() if (value := _head(action, name)) is not None}
    settings |= _older_windows(video) if kind == "KairosDiT" else _windows(video)
    return {key: value for key, value in settings.items() if value is not UNKNOWN}


def _windows(video: Mapping[str, Any]) -> dict[str, Any]:
    """What `KairosDiTV2` is told of attention; what is absent has its default."""
    frames, layers = video.get("attn_method", "flash") == "flex", video.get("layers_settings", UNKNOWN)
    return {
        "video.layer_cycle": shortest_cycle(layers) if isinstance(layers, list) else UNKNOWN,
        "video.window_frames": video.get("window_size", 3),
        "video.dilation": _dilation(video),
        "video.window_semantics": "frame" if frames else "token",
        "video.restrict_history_query_to_history": frames and video.get("restrict_history_query_to_history", True),
        "video.all_attend_history": frames and video.get("all_atten_history", False),
    }


def _older_windows(video: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "video.layer_cycle": OLDER_CYCLE,
        "video.window_frames": 3,
        "video.dilation": _dilation(video),
        "video.window_semantics": "token",
        "video.restrict_history_query_to_history": False,
        "video.all_attend_history": False,
    }


def _dilation(video: Mapping[str, Any]) -> Any:
    """The only entry of `dilated_lengths`, or of one per layer of a cycle the one that is not 1."""
    lengths = video.get("dilated_lengths")
    return max(lengths) if isinstance(lengths, list) and lengths else UNKNOWN


def _head(action: Mapping[str, Any], name: str) -> Any:
    return _dict(action.get("action_head_cfg")).get(name)


def shortest_cycle(layers: list[Any]) -> list[Any]:
    """The shortest list that, repeated, gives `layers`."""
    for length in range(1, len(layers)):
        if len(layers) % length == 0 and layers == layers[:length] * (len(layers) // length):
            return layers[:length]
    return layers


def _is_distilled(times: Any, file: Path) -> bool:
    if times is None:
        return False
    if times != list(schedule.DISTILLED_TIMES):
        raise UserError(
            f"{file}: selected_sampling_time={times}: a distilled model is sampled at "
            f"{[int(time) for time in schedule.DISTILLED_TIMES]} here; there is no other schedule"
        )
    return True


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression, UNKNOWN where reading does not tell."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return names.get(name, UNKNOWN)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, names) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {
                key.value: _value(value, names) for key, value in zip(keys, values) if isinstance(key, ast.Constant)
            }
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            return {word.arg: _value(word.value, names) for word in keywords if word.arg}
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            values = [_value(left, names), _value(right, names)]
            return values[0] * values[1] if isinstance(values[0], list) and isinstance(values[1], int) else UNKNOWN
    return UNKNOWN
