"""The schema by dotted key: which keys there are, of which type and metadata, and which one a misspelt key meant."""

from __future__ import annotations

import difflib
import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import Any

from kairos_train.basics.errors import UserError, shown
from kairos_train.basics.plain import describe
from kairos_train.config.schema import Config


@functools.cache
def children(kind: Any) -> Mapping[str, Any]:
    """Key -> annotation of a schema dataclass, forward references resolved."""
    hints = typing.get_type_hints(kind)
    return types.MappingProxyType({field.name: hints[field.name] for field in fields(kind)})


def dataclass_in(annotation: Any) -> Any:
    """The schema dataclass an annotation means (`X` or `X | None`), else the annotation itself."""
    if typing.get_origin(annotation) is list:
        return annotation
    return next((k for k in (annotation, *typing.get_args(annotation)) if is_dataclass(k)), annotation)


def annotation_of(key: str) -> Any:
    """The annotation of a dotted key.

    Raises:
        UserError: there is no such key; names the nearest and its siblings.
    """
    annotation: Any = Config
    done: list[str] = []
    for name in key.split("."):
        part = re.sub(r"\[\d+\]$", "", name)
        kind, prefix = dataclass_in(annotation), ".".join(done)
        if prefix in MAPPINGS:
            legal: Mapping[str, Any] = dict.fromkeys(MAPPINGS[prefix], float)
        elif is_dataclass(kind):
            legal = children(kind)
        else:
            raise UserError(
                f"unknown key {key!r}: {prefix} is {describe(annotation)} and has no keys; set {prefix}=VALUE"
            )
        if part not in legal:
            where = prefix or "the configuration"
            raise UserError(
                f"unknown key {shown(key)!r}; {_nearest_key(key, prefix, part, legal)}{where} has: {', '.join(legal)}"
            )
        annotation = legal[part]
        if name != part and is_dataclass(_item(annotation)):
            annotation = _item(annotation)
        done.append(part)
    return annotation


def _item(annotation: Any) -> Any:
    """What a list is of; anything else as it is."""
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is list else annotation


def type_of(key: str) -> Any:
    return dataclass_in(annotation_of(key))


def all_keys(kind: Any = Config, prefix: str = "") -> Iterator[str]:
    for name, annotation in children(kind).items():
        inner = dataclass_in(annotation)
        if is_dataclass(inner):
            yield from all_keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def walk(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Field]]:
    """Key, section and field of every setting in a section; items of lists have keys as `data.sources[0].weight`."""
    for field in fields(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        if is_dataclass(value):
            yield from walk(value, f"{key}.")
            continue
        yield key, section, field
        for number, item in enumerate(value if isinstance(value, list) else ()):
            if is_dataclass(item):
                yield from walk(item, f"{key}[{number}].")


MAPPINGS = {key: field.metadata["names"] for key, _, field in walk(Config()) if field.metadata.get("names")}
"""The settings that are mappings of a few names, with these."""


def on_resume(key: str) -> str:
    """What becomes of a setting that a resumed run has otherwise than its checkpoint: "fixed", "free" or "silent"."""
    kind, found = Config, "fixed"
    for name in key.split("."):
        if not is_dataclass(kind):
            break  # a name in a mapping
        metadata = next(field.metadata for field in fields(kind) if field.name == name)
        found, kind = metadata.get("on_resume") or found, dataclass_in(children(kind)[name])
    return found


def _nearest_key(key: str, prefix: str, part: str, legal: Mapping[str, Any]) -> str:
    """The same name in another section; else a sibling that is spelt alike; else whatever whole key is nearest."""
    known = list(all_keys())
    for other in known:
        if other.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]:
            return f"did you mean {other}? "
    if siblings := difflib.get_close_matches(part, legal, n=1):
        rest = shown(key)[len(prefix) + bool(prefix) + len(part) :]
        return f"did you mean {prefix + '.' if prefix else ''}{siblings[0]}{rest}? "
    return nearest(key, known)


def nearest(word: str, legal: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, legal, n=1)
    return f"did you mean {close[0]}? " if close else ""
