"""From the keys and shapes of public weights to a model's configuration.

Sizes, streams and the places of Gated DeltaNet layers show in the keys. What leaves no trace in them (`TRACELESS`)
comes from words: a configuration beside the weights, a named model, the command line. The same words may state sizes
too; they are then compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from kairos_train.basics.errors import UserError
from kairos_train.basics.plain import from_dict
from kairos_train.config.schema import ATTENTION_KINDS, ModelConfig
from kairos_train.model.public_keys import public_keys

Shapes = Mapping[str, tuple[int, ...]]

TRACELESS = (
    "video.layer_cycle",
    "video.window_frames",
    "video.dilation",
    "video.window_semantics",
    "video.restrict_history_query_to_history",
    "video.all_attend_history",
    "eps",
)
"""Settings that no shape tells."""

ROBOT_AND_ENCODER = ("text_dim", "action.action_dim", "action.state_dim")
"""Sizes in which two files of one named model may differ."""

SEVERAL = 5  # keys that an error names


class Word(NamedTuple):
    """A setting that somebody stated, and who did."""

    value: Any
    source: str
    named_model: bool = False  # by the name of a model, which does not speak of `ROBOT_AND_ENCODER`


class Size(NamedTuple):
    """A size that shows in the file, and in which tensor."""

    value: Any
    key: str


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a nested mapping."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def recognise(shapes: Shapes, words: Mapping[str, Word]) -> ModelConfig:
    """The configuration of weights.

    Args:
        shapes: by parameter name, with stream prefix.
        words: stated settings by dotted key below `model`, as in `video.dilation`.

    Returns:
        A configuration of which `shapes` are exactly the tensors.

    Raises:
        UserError: names the tensors that do not fit, or the settings that nobody stated.
    """
    sizes = visible_sizes(shapes)
    for key, size in sizes.items():
        word = words.get(key)
        free = word is not None and word.named_model and key in ROBOT_AND_ENCODER
        if word is not None and not free and word.value != size.value:
            raise UserError(
                f"{size.key} has shape {list(shapes[size.key])}: model.{key} is {size.value}, but {word.value} by"
                f" {word.source}; these weights are of another model"
            )
    needed = [key for key in (*TRACELESS, "num_heads") if key not in sizes]
    if unknown := [key for key in needed if key not in words]:
        raise UserError(
            f"model.{', model.'.join(unknown)}: nothing in the weights tells; put their config.json beside them, or"
            " name the model with model=NAME"
        )
    _check_streams(sizes, words)
    values = {key: word.value for key, word in words.items()} | {key: size.value for key, size in sizes.items()}
    config = _build(values, action="action.dim" in sizes)
    _check_tensors(shapes, config, words["video.layer_cycle"].source)
    return config


def visible_sizes(shapes: Shapes) -> dict[str, Size]:
    """Every size that a shape tells, by dotted key.

    Raises:
        UserError: a tensor that every model has is missing, or has too few dimensions.
    """
    sizes: dict[str, Size] = {}

    def see(setting: str, key: str, *dims: int) -> None:
        shape = _shape(shapes, key, 1 + max(dims))
        sizes[setting] = Size(shape[dims[0]], key)

    see("video.dim", "video_dit.patch_embedding.weight", 0)
    patch = _shape(shapes, "video_dit.patch_embedding.weight", 5)
    sizes["video.latent_channels"] = Size(patch[1], "video_dit.patch_embedding.weight")
    sizes["video.patch_size"] = Size(list(patch[2:]), "video_dit.patch_embedding.weight")
    see("text_dim", "video_dit.text_embedding.0.weight", 1)
    see("freq_dim", "video_dit.time_embedding.0.weight", 1)
    see("video.ffn_dim", "video_dit.blocks.0.ffn.0.weight", 0)
    numbers = {int(part) for part in (name.split(".")[2] for name in _blocks(shapes)) if part.isdecimal()}
    sizes["num_layers"] = Size(len(numbers), f"video_dit.blocks.{max(numbers)}.modulation")
    _shape(shapes, sizes["num_layers"].key, 1)
    gated = next((n for n in sorted(numbers) if f"video_dit.blocks.{n}.gated_delta.A_log" in shapes), None)
    if gated is not None:
        block = f"video_dit.blocks.{gated}.gated_delta"
        see("num_heads", f"{block}.A_log", 0)
        see("video.gdn_value_dim", f"{block}.o_norm.weight", 0)
        see("video.gdn_conv_size", f"{block}.q_conv1d.weight", 2)
        width = _shape(shapes, f"{block}.q_proj.weight", 2)[0]
        sizes["video.gdn_key_dim"] = Size(width // max(1, sizes["num_heads"].value), f"{block}.q_proj.weight")
    if any(name.startswith("action_dit.") for name in shapes):
        see("action.dim", "action_dit.action_encoder.weight", 0)
        see("action.action_dim", "action_dit.action_encoder.weight", 1)
        see("action.state_dim", "action_dit.proprio_encoder.0.weight", 1)
        see("action.ffn_dim", "action_dit.blocks.0.ffn.0.weight", 0)
    return sizes


def _shape(shapes: Shapes, key: str, dims: int) -> tuple[int, ...]:
    if key not in shapes or len(shapes[key]) < dims:
        found = f"shape {list(shapes[key])}" if key in shapes else "no such tensor"
        raise UserError(f"{key}: {found} in the file; these are no weights of a Kairos model, or not all of them")
    return shapes[key]


def _blocks(shapes: Shapes) -> list[str]:
    names = [name for name in shapes if name.startswith("video_dit.blocks.")]
    if not any(name.split(".")[2].isdecimal() for name in names):
        raise UserError("video_dit.blocks.0.…: no such tensor in the file; these are no weights of a Kairos model")
    return names


def _check_streams(sizes: Mapping[str, Size], words: Mapping[str, Word]) -> None:
    """Words that speak of an action stream, or deny it, against the file; the name of a model does not."""
    stated = {key: word for key, word in words.items() if key == "action" or key.startswith("action.")}
    for key, word in stated.items():
        if word.named_model or (key == "action" and word.value is not None):
            continue
        if (key == "action") == ("action.dim" in sizes):
            there = "an action stream" if "action.dim" in sizes else "no action stream"
            raise UserError(f"model.{key}={word.value} by {word.source}, but the weights hold {there}; correct it")


def _build(values: Mapping[str, Any], *, action: bool) -> ModelConfig:
    """A configuration from dotted keys; defaults where neither word nor shape matters (GATED sizes without GATED)."""
    tree: dict[str, Any] = {"video": {}, "action": {} if action else None}
    known = leaves(dataclasses.asdict(ModelConfig()))
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if key == "action" or (section == "action" and not action):
            continue
        if key not in known:
            raise UserError(f"model.{key}: there is no such setting; remove it from the weights' configuration")
        _check_type(key, value, known[key])
        (tree[section] if section else tree)[name] = value
    tree.setdefault("name", "imported")
    return from_dict(ModelConfig, tree)


def _check_type(key: str, value: Any, default: Any) -> None:
    """A setting out of somebody's JSON must be what the schema's default is."""
    number = isinstance(default, int | float) and not isinstance(default, bool)
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    fits = isinstance(value, kinds) and not (number and isinstance(value, bool))
    if key == "video.layer_cycle":
        fits = isinstance(value, list) and bool(value) and all(kind in ATTENTION_KINDS for kind in value)
    if not fits:
        raise UserError(f"model.{key}={value!r}: must be like {default!r}; correct the weights' configuration")


def _check_tensors(shapes: Shapes, config: ModelConfig, order: str) -> None:
    expected = public_keys(config)
    wrong = sorted(key for key in expected.keys() | shapes.keys() if expected.get(key) != shapes.get(key))
    if not wrong:
        return
    named = [
        f"{key} is {_text(shapes.get(key))} in the file and {_text(expected.get(key))} by the model"
        for key in wrong[:SEVERAL]
    ]
    more = f", and {len(wrong) - SEVERAL} more" if len(wrong) > SEVERAL else ""
    raise UserError(
        f"{len(wrong)} tensors do not fit: {'; '.join(named)}{more} (layers {'/'.join(config.video.layer_cycle)} by"
        f" {order}); give the configuration of these weights"
    )


def _text(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
