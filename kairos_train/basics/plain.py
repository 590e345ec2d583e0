"""Plain data and the dataclasses that it fills."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from kairos_train.basics.errors import UserError, shown

MISSING = "???"
"""A mandatory value that has not been given, in the place of any."""

_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
_PLURALS = {int: "integers", float: "numbers", str: "texts"}


def from_dict(cls: type, values: dict[str, Any], *, where: str = "") -> Any:
    """Build a schema dataclass (nested ones too) from a plain dictionary, as read from a saved JSON or YAML.

    Args:
        where: what the keys of messages begin with, as "model.".

    Raises:
        UserError: a key that `cls` does not have, or a value of another type than its field's.
    """
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(map(str, set(values) - names)):
        raise UserError(f"{cls.__name__}: unknown key {unknown[0]!r}; it has {', '.join(sorted(names))}")
    return cls(**{name: _value(hints[name], value, where + name) for name, value in values.items()})


def _value(hint: Any, value: Any, key: str) -> Any:
    """A value as its annotation has it.

    Raises:
        UserError: it has another type.
    """
    kinds = _alternatives(hint)
    section = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
    if section is not None and isinstance(value, dict):
        return from_dict(section, value, where=f"{key}.")
    for kind in kinds:
        if typing.get_origin(kind) is list and isinstance(value, list):
            return [_value(typing.get_args(kind)[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
        if typing.get_origin(kind) is dict and isinstance(value, dict) and all(isinstance(name, str) for name in value):
            return {name: _value(typing.get_args(kind)[1], item, f"{key}.{name}") for name, item in value.items()}
    fits = any(type(value) is kind or (kind is float and type(value) is int) or kind is Any for kind in kinds)
    if not fits and value != MISSING:
        raise UserError(f"{key}={shown(value)} has the wrong type; it expects {describe(hint)}")
    return value


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )


def describe(hint: Any) -> str:
    """An annotation in words: "a list of integers or null"."""
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is list:
        return f"a list of {_PLURALS.get(arguments[0], 'sections, as [{KEY: VALUE}, …]')}"
    if origin is dict:
        return f"a mapping of names to {_PLURALS[arguments[1]]}"
    if arguments:
        return " or ".join(describe(argument) for argument in arguments)
    return _KINDS.get(hint, "a section")
