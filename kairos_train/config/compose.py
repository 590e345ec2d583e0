"""From YAML groups and command-line overrides to one validated `Config`, with hydra's Compose API.

Hydra is used for composition alone: no output folders, no logging, no working directory of its own, and its global
state is cleared by every call. Whatever goes wrong while composing leaves this module as a one-line `UserError`.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from dataloaders.config import DataConfig, WindowConfig
from kairos_train.basics.errors import UserError, one_line, shown
from kairos_train.basics.files import write_whole
from kairos_train.basics.plain import MISSING, from_dict
from kairos_train.basics.secrets import redacted_values
from kairos_train.basics.yaml_text import MAX_DEPTH, yaml_text
from kairos_train.config.groups import SHIPPED, groups_of
from kairos_train.config.keys import MAPPINGS, annotation_of, describe, nearest, type_of, walk
from kairos_train.config.schema import ActionStreamConfig, Config, ModelConfig, StageConfig
from kairos_train.config.texts import check_file, entries, kept, quoted
from kairos_train.config.validate import validate

MAX_OVERRIDE = 2**15
"""Characters; hydra takes a second for a tenth of a million."""

# --- composing and storing ---


def load_config(
    overrides: Sequence[str] = (),
    *,
    config_name: str = "config",
    config_dirs: Sequence[str | Path] = (),
    sections: Sequence[str] | None = None,
) -> Config:
    """Compose, check and resolve the settings of a run.

    Args:
        overrides: `GROUP=OPTION` and `KEY=VALUE`, as on the command line. They beat every file, experiments included.
        config_name: the root file, without `.yaml`.
        config_dirs: folders of the user's own, laid out as `configs/`; they add options, and shadow no shipped one.
        sections: the dotted prefixes whose mandatory values must be given and whose paths must exist; None for all of
            them. A command that needs no data asks for fewer.

    Raises:
        UserError: unknown key or option, wrong type, malformed override, missing value, a broken rule of `validate`.
    """
    with composing(overrides, config_dirs) as (_, texts):
        config = _at_home(_to_config(compose(config_name, texts)))
    check(config, sections)
    return config


@contextmanager
def composing(
    overrides: Sequence[str], config_dirs: Sequence[str | Path] = ()
) -> Iterator[tuple[list[Path], list[str]]]:
    """Hydra, ready to compose these overrides: the folders of settings, the shipped one first, and the words for hydra.

    Raises:
        UserError: a folder or override that cannot be used, or whatever goes wrong while composing.
    """
    roots = [SHIPPED, *_own_roots(config_dirs, SHIPPED)]
    texts = _overrides(overrides, groups_of(roots))
    searchpath = ",".join(quoted(f"file://{root}") for root in roots[1:])
    _store_schema()
    GlobalHydra.instance().clear()  # another caller may have initialised it; what follows leaves it as clean as this
    try:
        with initialize_config_dir(config_dir=str(SHIPPED), job_name="kairos-train", version_base="1.3"):
            yield roots, [*texts, f"hydra.searchpath=[{searchpath}]"]
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        raise _one_line(error) from error
    except AssertionError as error:
        raise _below_null(texts, error) from error


def check(config: Config, sections: Sequence[str] | None = None) -> None:
    """What `load_config` asks of the settings, for such as were composed for fewer sections.

    Args:
        config: composed.
        sections: as for `load_config`.

    Raises:
        UserError: a missing value, a broken rule of `validate`, a path that does not exist.
    """
    used = None if sections is None else {section.partition(".")[0] for section in sections}
    sections = [""] if sections is None else sections
    _require(config, sections)
    validate(config, used)
    _check_paths(config, sections)


def to_yaml(config: Config, *, secrets: bool = False) -> str:
    """The resolved configuration as YAML, in the order of the schema.

    Args:
        secrets: with user, password and query of its URLs, for a process that opens them.
    """
    values = asdict(config) if secrets else redacted_values(asdict(config))
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def to_text(value: Any) -> str:
    """A value as it stands in YAML, on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n...\n").strip()


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what another reader of YAML takes for a number, as OmegaConf does 1e3."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'" if _is_number(text) else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def _is_number(text: str) -> bool:
    try:
        float(text.replace("_", ""))
    except ValueError:
        return False
    return True


def save_config(config: Config, path: str | Path, *, secrets: bool = False) -> None:
    """Write the resolved configuration, as `to_yaml` gives it; the file appears complete or not at all."""
    write_whole(path, to_yaml(config, secrets=secrets))


def load_saved(path: str | Path, *, sections: Sequence[str] | None = None) -> Config:
    """Read what `save_config` wrote. Paths inside it are not checked: it may come from another machine.

    What an earlier version did not write yet has the schema's default. Nothing in the file is interpolated: it was
    resolved before it was saved, and a `${oc.env:…}` in it would be answered by the machine of its reader.

    Args:
        path: the file.
        sections: as for `load_config`.

    Raises:
        UserError: no such file, not YAML, an unknown key, a wrong type, a broken rule.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the config.yaml of a run or a checkpoint")
    text = yaml_text(path)
    try:
        saved = _literal(yaml.load(text, Loader=get_yaml_loader()) or {})
        config = _to_config(OmegaConf.merge(OmegaConf.structured(schema_of_files()), saved))
    except (UserError, OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from error
    config.stage.image_conditions = config.stage.image_conditions or StageConfig().image_conditions
    _require(config, [""] if sections is None else sections)
    validate(config, sections)
    return config


def _literal(value: Any) -> Any:
    """Plain values whose texts OmegaConf takes as they are: what would be an interpolation is escaped."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


@functools.cache
def _store_schema() -> None:
    """Let hydra know the schema; once a process, for it is costly."""
    ConfigStore.instance().store(name="schema", node=schema_of_files())


def schema_of_files() -> Config:
    """What files are merged into: the defaults, less those that belong to one robot or dataset and a file must state.

    The conditions are emptied because mappings are merged, not replaced: each file states all of its own.
    """
    missing: Any = MISSING
    return Config(
        model=ModelConfig(action=ActionStreamConfig(action_dim=missing, state_dim=missing)),
        data=DataConfig(window=WindowConfig(cameras=missing)),
        stage=StageConfig(conditions={}, image_conditions={}),
    )


def _to_config(node: Any) -> Config:
    values = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else None
    if not isinstance(values, dict):
        raise UserError("the configuration is not a mapping; write KEY: VALUE lines")
    return from_dict(Config, values)


def _require(config: Config, sections: Sequence[str]) -> None:
    for key, section, field in walk(config):
        if (key == "data.shards" and config.data.sources) or "[" in key:
            continue  # the sources are the data; items of lists have rules of their own
        if getattr(section, field.name) == MISSING and any(_within(key, prefix) for prefix in sections):
            raise UserError(f"{key} has no value; give {key}=VALUE ({describe(type_of(key))})")


def _within(key: str, section: str) -> bool:
    return not section or key == section or key.startswith(section + ".")


def _at_home(config: Config) -> Config:
    """`~` in paths becomes the home folder, here and nowhere else: readers of a setting take it as it is."""
    for _, section, field in walk(config):
        value = getattr(section, field.name)
        if field.metadata.get("path") and value is not None:
            one = isinstance(value, str)
            setattr(section, field.name, os.path.expanduser(value) if one else [*map(os.path.expanduser, value)])
    return config


def _check_paths(config: Config, sections: Sequence[str]) -> None:
    """Every path that must exist does."""
    for key, section, field in walk(config):
        path = getattr(section, field.name) if field.metadata.get("path") == "exists" else None
        if path is not None and any(_within(key, prefix) for prefix in sections) and not Path(path).exists():
            raise UserError(f"{key}={path} does not exist; give an existing path")


# --- folders and groups ---


def _own_roots(config_dirs: Sequence[str | Path], shipped: Path) -> list[Path]:
    roots = []
    for given in config_dirs:
        root = Path(given).expanduser().resolve()
        if not root.is_dir():
            raise UserError(
                f"--config-dir {given}: no such folder; give one laid out as configs/ (model/, experiment/, ...)"
            )
        for file in sorted(root.rglob("*.yaml")):
            name = file.relative_to(root)
            if (shipped / name).exists():
                raise UserError(f"{file}: a shipped configuration is called {name} already; rename yours")
            check_file(file, root)
        roots.append(root)
    return roots


# --- overrides ---


def _overrides(texts: Sequence[str], groups: dict[str, list[str]]) -> list[str]:
    """What hydra is given of the overrides.

    Raises:
        UserError: one that cannot be read, or sets what there is not.
    """
    found = []
    for text in texts:
        if len(text) > MAX_OVERRIDE:
            raise UserError(
                f"override {shown(text)!r} has {len(text):,} characters, and {MAX_OVERRIDE:,} are the most; "
                "put long settings into a file of --config-dir"
            )
        if _depth(text) > MAX_DEPTH:
            raise UserError(f"override {shown(text)!r} is nested more than {MAX_DEPTH} deep; no setting is")
        try:
            found += entries(_checked_override(kept(text, groups), groups))
        except UserError:
            raise
        except (HydraException, ValueError, RecursionError) as error:  # among them numbers of more than 4,300 digits
            raise UserError(f"override {shown(text)!r} cannot be read ({_reason(error)}); write KEY=VALUE") from error
    return found


def _depth(text: str) -> int:
    """Of brackets, those in quotes too."""
    steps = ((char in "[{(") - (char in ")}]") for char in text)
    return max(itertools.accumulate(steps), default=0)


def _checked_override(text: str, groups: dict[str, list[str]]) -> str:
    """`text` as hydra shall see it, or a UserError that says what is legal instead."""
    try:
        override = OverridesParser.create().parse_overrides([text])[0]
    except OverrideParseException as error:
        hint = "write KEY=VALUE, and quote a VALUE that holds one of = , : [ ] { } ( ) as in KEY='\"VALUE\"'"
        raise UserError(f"override {shown(text, most=200)!r} is malformed; {hint}") from error
    key = override.key_or_group
    if not key:
        raise UserError(f"override {text!r} is malformed; write KEY=VALUE")
    if override.is_add() or override.is_force_add() or override.is_delete() or override.package is not None:
        raise UserError(
            f"override {shown(text)!r}: keys are neither added, removed nor moved; write KEY=VALUE with a known KEY"
        )
    if override.is_sweep_override():
        raise UserError(f"override {text!r} names several values; give one, or write a list as {key}=[A,B]")
    if key in groups:
        _check_option(key, override.value(), groups[key], text)
        return text
    kind = type_of(key)
    if is_dataclass(kind) and not isinstance(override.value(), dict) and not _is_null_for(key, override):
        child = fields(kind)[0].name
        raise UserError(f"override {text!r}: {key} is a section; set its keys, for example {key}.{child}=VALUE")
    if key in MAPPINGS and isinstance(override.value(), dict):
        # A mapping replaces the file's: hydra would merge the two, and probabilities would not sum to 1.
        absent = [f"{name}: 0" for name in MAPPINGS[key] if name not in override.value()]
        given = text[: text.rindex("}")]
        return given + (", " if override.value() else "") * bool(absent) + ", ".join(absent) + "}"
    return text


def _is_null_for(key: str, override: Override) -> bool:
    return override.value() is None and types.NoneType in typing.get_args(annotation_of(key))


def _check_option(group: str, value: Any, options: list[str], text: str) -> None:
    if group == "experiment" and value is None:
        return
    if isinstance(value, dict | list):
        raise UserError(
            f"override {text!r}: {group} takes a name, one of {', '.join(options)}; or set {group}.KEY=VALUE"
        )
    if str(value) not in options:
        raise UserError(
            f"{group}={shown(value)} is unknown; {nearest(str(value), options)}it is one of: {', '.join(options)}"
        )


# --- hydra's and OmegaConf's errors, in one line ---


def _one_line(error: BaseException) -> UserError:
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    found = re.match(r"In '([^']+)'", str(error))
    where = f" (in {found[1]}.yaml)" if found else ""
    for link in chain:
        if isinstance(link, UserError):
            return UserError(f"{link}{where}")
        if isinstance(link, OmegaConfBaseException) and link.full_key:
            return UserError(f"{_value_error(link)}{where}")
    missing = next((link for link in chain if isinstance(link, MissingConfigException)), None)
    if missing is not None and missing.missing_cfg_file:
        close = nearest(str(missing.missing_cfg_file), list(missing.options or ()))
        return UserError(
            f"configuration {missing.missing_cfg_file} does not exist{where}; {close}name an existing YAML file"
        )
    told = next((link for link in chain if isinstance(link, yaml.YAMLError)), error)
    return UserError(f"the configuration cannot be read{where}: {_reason(told)}")


def _reason(error: BaseException) -> str:
    return "it is nested too deep" if isinstance(error, RecursionError) else shown(one_line(error), most=500)


def _value_error(error: OmegaConfBaseException) -> str:
    key, message = str(error.full_key), shown(str(error).splitlines()[0], most=500)
    try:
        annotation = annotation_of(key)
    except UserError as unknown:
        return str(unknown)
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        return f"{key}: {message}; it expects {describe(annotation)}"
    value = re.match(r"(?:Value|Invalid type assigned: |Invalid value assigned: ) ?'(.*?)'", message)
    if value:
        return f"{key}={shown(value[1])} has the wrong type; it expects {describe(annotation)}"
    return f"{key}: {message}; it expects {describe(annotation)}"


def _below_null(texts: Sequence[str], error: AssertionError) -> BaseException:
    """OmegaConf asserts when a key is set below a section that is null; any other assertion stays what it is."""
    below = [text for text in texts if text.startswith("model.action.")]
    if not below:
        return error
    return UserError(f"override {below[0]!r}: this model has model.action=null; choose a model with an action stream")
