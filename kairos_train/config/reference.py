"""The settings in words, from the schema itself: what `config --show` prints, and the page docs/settings.md."""

from __future__ import annotations

import ast
import functools
import inspect
import io
import re
import tokenize
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING as NONE
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import Any

from kairos_train.basics.plain import MISSING
from kairos_train.config.compose import schema_of_files, to_text
from kairos_train.config.keys import MAPPINGS, annotation_of, children, dataclass_in, describe, on_resume, walk
from kairos_train.config.schema import Config

PAGE = """# Settings

Every setting of a run, from the schema: written by `kairos-train config --reference`, not by hand. On the command line
as `KEY=VALUE`; files of `configs/` set other values than these defaults. `kairos-train config --show SECTION` prints
the values of a run, `--origin` the file or override that set each.

*Required* settings have no default. "(ours)" marks what the publication leaves open and this project chose. A resumed
run keeps what is *fixed* as its checkpoint has it; a change of what is *free* is allowed and reported, of what is
*silent* just allowed.
"""


SECTION = "a section"


@dataclass(frozen=True)
class SettingDoc:
    """One setting in words.

    Attributes:
        key: dotted; items of lists have keys as `data.sources[N].weight`.
        values: which ones it takes.
        default: as one writes it; "" of one that is required.
        about: what it is.
        on_resume: "fixed", "free" or "silent".
    """

    key: str
    values: str
    default: str
    about: str
    on_resume: str


@dataclass(frozen=True)
class SectionDoc:
    """A section of settings, one of its lists' items included: its key, what it is, its own settings."""

    key: str
    about: str
    settings: tuple[SettingDoc, ...]


def sections(kind: type = Config, key: str = "") -> Iterator[SectionDoc]:
    """The sections of the schema, outer ones first."""
    said, inner, settings = comments(kind), [], []
    for field in fields(kind):
        name, annotation = (f"{key}.{field.name}" if key else field.name), children(kind)[field.name]
        section = dataclass_in(annotation)
        if is_dataclass(section):
            inner.append((section, name))
            if type(None) not in typing.get_args(annotation):
                continue
        settings.append(_setting(field, name, annotation, said.get(field.name, "")))
        item = next(iter(typing.get_args(annotation)), None)
        if typing.get_origin(annotation) is list and is_dataclass(item):
            inner.append((item, f"{name}[N]"))
    yield SectionDoc(key, _paragraph(inspect.getdoc(kind) or ""), tuple(settings))
    for section, name in inner:
        yield from sections(section, name)


def comments(kind: type) -> dict[str, str]:
    """Field of a schema dataclass -> the comment on it: behind it, or on the lines above."""
    source = inspect.getsource(kind)
    found, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = token.string.removeprefix("#").strip()
            if token.line.strip().startswith("#"):
                alone.add(token.start[0])
    said = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            lines = [found[line] for line in range(first, node.end_lineno + 1) if line in found]
            if lines:
                said[node.target.id] = " ".join(lines)
    return said


def settings_of(config: Config, section: str | None = None) -> list[tuple[str, Any, SettingDoc]]:
    """Key, value and words of every setting of a run; entries of mappings that take any name stand alone.

    Args:
        section: dotted key of a section or setting; None: all.

    Raises:
        UserError: there is no such key; names the nearest.
    """
    if section is not None:
        annotation_of(section)
    docs = {setting.key: setting for part in sections() for setting in part.settings}
    found = []
    for key, owner, field in walk(config):
        value, doc = getattr(owner, field.name), docs[re.sub(r"\[\d+\]", "[N]", key)]
        if isinstance(value, dict) and value and key not in MAPPINGS:
            found += [(f"{key}.{name}", entry, doc) for name, entry in value.items()]
        else:
            found.append((key, value, doc))
    return [row for row in found if section is None or f"{row[0]}.".replace("[", ".").startswith(f"{section}.")]


def page() -> str:
    """docs/settings.md."""
    parts = [PAGE]
    for section in sections():
        parts.append(f"## `{section.key}`\n" if section.key else "## The run\n")
        if section.about:
            parts.append(f"{section.about}\n")
        if section.settings:
            parts.append("| setting | default | values | what it is | resumed |\n| --- | --- | --- | --- | --- |")
            parts.append("\n".join(map(_row, section.settings)) + "\n")
    return "\n".join(parts)


def _row(setting: SettingDoc) -> str:
    default = f"`{setting.default}`" if setting.default not in ("", SECTION) else setting.default or "*required*"
    cells = (f"`{setting.key}`", default, setting.values, setting.about, setting.on_resume)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _setting(field: Field, key: str, annotation: Any, said: str) -> SettingDoc:
    rule, values = field.metadata.get("rule"), describe(annotation)
    if rule is not None:
        null = " or null" if types.NoneType in typing.get_args(annotation) else ""
        kind = "" if rule.words.startswith("one of") else f"{values.removesuffix(' or null')} "
        values = f"{kind}{rule.words}{null}"
    if names := field.metadata.get("names"):
        values += f", of {', '.join(names)}"
    return SettingDoc(key, values, _default(field, key), said, on_resume(key.partition("[")[0]))


def _default(field: Field, key: str) -> str:
    value = field.default if field.default is not NONE else field.default_factory()
    if is_dataclass(value):
        return SECTION
    return "" if MISSING in (value, _of_files().get(key)) else to_text(value)


@functools.cache
def _of_files() -> dict[str, Any]:
    """The schema's values where they can be compared; what belongs to one robot or dataset a file must state."""
    return {key: getattr(section, field.name) for key, section, field in walk(schema_of_files())}


def _paragraph(text: str) -> str:
    return " ".join(text.split())
