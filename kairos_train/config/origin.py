"""Where the value of a setting comes from: the file or the override that set it last, else the schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from kairos_train.basics.plain import MISSING
from kairos_train.config.compose import composing
from kairos_train.config.groups import SHIPPED
from kairos_train.config.keys import MAPPINGS

SCHEMA = "the schema's default"


@dataclass(frozen=True)
class Origin:
    """Who set a setting last.

    Attributes:
        where: a file, `override KEY=VALUE`, or the schema.
        written: the value as it stands there, references to other settings (`${…}`) unresolved; of the schema None.
    """

    where: str
    written: Any = None

    def __str__(self) -> str:
        refers = isinstance(self.written, str) and "${" in self.written
        return f"{self.where}: {self.written}" if refers else self.where


def origins(
    overrides: Sequence[str] = (), *, config_name: str = "config", config_dirs: Sequence[str | Path] = ()
) -> dict[str, Origin]:
    """Dotted key -> who set it, of everything that a file or override says. What is not in it has the schema's default.

    A section that is set to null, and a mapping that is replaced, stand as one key.

    Args:
        overrides, config_name, config_dirs: as for `load_config`.

    Raises:
        UserError: as `load_config`, for what cannot be composed.
    """
    found: dict[str, Origin] = {}
    with composing(overrides, config_dirs) as (roots, texts):
        listed = GlobalHydra.instance().config_loader().compute_defaults_list(config_name, texts, RunMode.RUN)
    for entry in listed.defaults:
        file = _file(entry, roots)
        if file is not None:
            content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            content.pop("defaults", None)
            shown = f"configs/{file.relative_to(SHIPPED)}" if file.is_relative_to(SHIPPED) else str(file)
            _note(found, content, entry.package or "", shown)
    for text in overrides:
        override = OverridesParser.create().parse_overrides([text])[0]
        if not (SHIPPED / override.key_or_group).is_dir():
            _note(found, {override.key_or_group: override.value()}, "", f"override {text}")
    return found


def origin_of(key: str, found: Mapping[str, Origin]) -> Origin:
    """Who set a setting: it, an entry of it, or the section that it is in."""
    inside = [origin for other, origin in found.items() if other.startswith(f"{key}.")]
    while key:
        if key in found:
            return found[key]
        if inside:
            return inside[-1]
        key = key.rpartition(".")[0]
    return Origin(SCHEMA)


def _file(entry: ResultDefault, roots: Sequence[Path]) -> Path | None:
    """The file of an entry of the defaults list; None of hydra's own, and of the schema."""
    files = [root / f"{entry.config_path}.yaml" for root in roots]
    return next((file for file in files if file.is_file()), None)


def _note(found: dict[str, Origin], content: Mapping[str, Any], package: str, where: str) -> None:
    for key, value in _leaves(content, package):
        for other in [other for other in found if other.startswith(f"{key}.") or key.startswith(f"{other}.")]:
            del found[other]
        found.pop(key, None)  # so that the last one that was set stands last
        found[key] = Origin(where, value)


def _leaves(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping) and value and key not in MAPPINGS:
            yield from _leaves(value, key)
        elif value != MISSING:  # which takes no value away
            yield key, value
