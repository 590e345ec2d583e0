"""Text settings keep the text that was typed.

Hydra and YAML read 2024_11_30, 1e3, 0123 and on as numbers and truth values before anyone knows that a text is meant.
On the command line such a value is put in quotes before hydra sees it; in a file it is refused, for what YAML has read
cannot be told any more.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from antlr4 import CommonTokenStream, InputStream, Token
from hydra.core.override_parser.overrides_parser import create_functions
from hydra.core.override_parser.overrides_visitor import HydraErrorListener, HydraOverrideVisitor
from hydra.core.override_parser.types import ChoiceSweep, QuotedString
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf import OmegaConf

from kairos_train.basics.errors import UserError, shown
from kairos_train.basics.yaml_text import yaml_text
from kairos_train.config.keys import MAPPINGS, all_keys, annotation_of, children, dataclass_in
from kairos_train.config.schema import Config

OPEN_MAPPINGS = tuple(k for k in all_keys() if typing.get_origin(annotation_of(k)) is dict and k not in MAPPINGS)
_PACKAGE = re.compile(r"^\s*#\s*@package\s+(\S+)", re.M)


def kept(override: str, groups: typing.Collection[str]) -> str:
    """An override `KEY=VALUE` with quotes around what would be retyped though a text is meant; else as it is.

    Args:
        groups: keys that choose a file by its name.
    """
    key, equals, value = (part.strip() for part in override.partition("="))
    if not equals or not value:
        return override
    try:
        annotation = str if key in groups else annotation_of(key)
    except UserError:
        return override  # an unknown key is told elsewhere
    try:
        parsed = _parsed(value)
    except HydraException:  # a character that hydra keeps to itself
        return override if value[0] in "'\"" or not _takes_text(annotation) else f"{key}={quoted(value)}"
    if _takes_text(annotation):
        retyped = isinstance(parsed, _Retyped) or (isinstance(parsed, ChoiceSweep) and key not in groups)
        return f"{key}={quoted(value)}" if retyped else override
    return f"{key}={_written(parsed, annotation)}" if _has_retyped(parsed, annotation) else override


def entries(override: str) -> list[str]:
    """An override of a mapping that takes any name, as one for each of its entries; any other as it is.

    Hydra refuses names that the file's mapping does not have; others stay as they are there.
    """
    key, _, value = override.partition("=")
    try:
        parsed = _parsed(value) if key in OPEN_MAPPINGS else None
    except HydraException:
        parsed = None
    if not isinstance(parsed, dict):
        return [override]
    return [f"++{key}.{_name(name)}={_written(text, str)}" for name, text in parsed.items()]


def quoted(text: str) -> str:
    """`text` as a quoted string of hydra's override grammar."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def check_file(file: Path, root: Path) -> None:
    """Refuse a file in which YAML reads a text setting as something else, or an integer by another base.

    Args:
        file: a file of settings below the folder `root`.

    Raises:
        UserError: names the setting, and says to quote it; or what `yaml_text` refuses.
    """
    content = yaml_text(file)
    package = _PACKAGE.search(content)
    group = ".".join(file.relative_to(root).parts[:-1])
    prefix = group if package is None or package[1] == "_group_" else package[1].removeprefix("_global_").lstrip(".")
    try:
        read = OmegaConf.to_container(OmegaConf.load(file))
        typed = yaml.load(content, Loader=yaml.BaseLoader)  # every scalar a text
    except Exception:  # that it cannot be read is told when it is composed
        return
    try:
        whole = annotation_of(prefix) if prefix else Config
    except UserError:
        return
    for key, value, text, annotation in _scalars(read, typed, prefix, whole):
        became = f"{file}: {key}: {shown(text)} is read as {shown(value)}"
        if _takes_text(annotation) and isinstance(value, bool | int | float):
            raise UserError(f'{became}; a text is meant: write "{shown(text)}" in quotes')
        numeric = {int, float} & {annotation, *typing.get_args(annotation)}
        if numeric and type(value) is int and not _plain_integer(text, value):
            raise UserError(f"{became}; write it without zeros in front or colons")


# --- the command line ---


@dataclass(frozen=True)
class _Retyped:
    """A number or truth value, as it was typed."""

    text: str


class _AsTyped(HydraOverrideVisitor):
    def visitPrimitive(self, ctx: Any) -> Any:
        value = super().visitPrimitive(ctx)
        return _Retyped(ctx.getText().strip()) if isinstance(value, bool | int | float) else value


def _parsed(value: str) -> Any:
    """A value of hydra's grammar, its numbers and truth values as they were typed.

    Raises:
        HydraException: it is malformed.
    """
    lexer, listener = OverrideLexer(InputStream(value)), HydraErrorListener()
    lexer.removeErrorListeners()
    lexer.addErrorListener(listener)
    lexer.mode(OverrideLexer.VALUE_MODE)
    parser = OverrideParser(CommonTokenStream(lexer))
    parser.removeErrorListeners()
    parser.addErrorListener(listener)
    tree = parser.value()
    if parser.getTokenStream().LA(1) != Token.EOF:
        raise HydraException(f"{value!r} goes on behind a value")
    return _AsTyped(create_functions()).visitValue(tree)


def _takes_text(annotation: Any) -> bool:
    return annotation is str or set(typing.get_args(annotation)) == {str, types.NoneType}


def _below(annotation: Any, name: str | None) -> Any:
    """What an entry of a list (None), mapping or section is to be."""
    kind = dataclass_in(annotation)
    if is_dataclass(kind):
        return children(kind).get(name, Any)
    arguments = typing.get_args(annotation)
    return arguments[-1] if typing.get_origin(annotation) in (list, dict) else Any


def _has_retyped(parsed: Any, annotation: Any) -> bool:
    if isinstance(parsed, dict):
        return any(_has_retyped(value, _below(annotation, name)) for name, value in parsed.items())
    if isinstance(parsed, list):
        return any(_has_retyped(value, _below(annotation, None)) for value in parsed)
    return isinstance(parsed, _Retyped) and _takes_text(annotation)


def _written(parsed: Any, annotation: Any) -> str:
    """A parsed value in hydra's grammar again."""
    if isinstance(parsed, dict):
        entries = (f"{_name(name)}: {_written(value, _below(annotation, name))}" for name, value in parsed.items())
        return "{" + ", ".join(entries) + "}"
    if isinstance(parsed, list):
        return "[" + ", ".join(_written(value, _below(annotation, None)) for value in parsed) + "]"
    if isinstance(parsed, _Retyped):
        return quoted(parsed.text) if _takes_text(annotation) else parsed.text
    return "null" if parsed is None else quoted(parsed.text if isinstance(parsed, QuotedString) else parsed)


def _name(key: Any) -> str:
    return key if isinstance(key, str) else str(getattr(key, "text", key))


# --- files ---


def _scalars(read: Any, typed: Any, key: str, annotation: Any) -> Iterator[tuple[str, Any, str, Any]]:
    """(key, value, text, annotation) of every scalar of a file, as it was read and as it was typed."""
    if isinstance(read, dict) and isinstance(typed, dict):
        for (name, value), text in zip(read.items(), typed.values()):
            yield from _scalars(value, text, f"{key}.{name}".lstrip("."), _below(annotation, name))
    elif isinstance(read, list) and isinstance(typed, list):
        for number, (value, text) in enumerate(zip(read, typed)):
            yield from _scalars(value, text, f"{key}[{number}]", _below(annotation, None))
    elif isinstance(typed, str):
        yield key, read, typed, annotation


def _plain_integer(text: str, value: int) -> bool:
    try:
        return int(text, 0) == value
    except ValueError:
        return False
