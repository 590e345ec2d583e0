"""Plain data and the dataclasses that it fills."""

from __future__ import annotations

from typing import Any


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Build a schema dataclass (nested ones too) from a plain dictionary, as read from a saved JSON or YAML.

    Raises:
        UserError: a key that `cls` does not have.
    """
    import dataclasses
    import typing

    from kairos_train.basics.errors import UserError

    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - names):
        raise UserError(f"{cls.__name__}: unknown key {unknown[0]!r}; it has {', '.join(sorted(names))}")
    kwargs = {}
    for key, value in values.items():
        kinds = [k for k in (hints[key], *typing.get_args(hints[key])) if dataclasses.is_dataclass(k)]
        if kinds and isinstance(value, list):
            value = [from_dict(kinds[0], item) for item in value]
        kwargs[key] = from_dict(kinds[0], value) if kinds and isinstance(value, dict) else value
    return cls(**kwargs)
