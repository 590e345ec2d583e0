"""What is said of weights besides themselves: by the files that came with them, by a named model, by the command line.

The shapes do not tell everything (`recognise.TRACELESS`). These may speak of the rest, later ones winning: a
configuration in the header of the weights, `config.json` and `kairos_config.py` beside them, a configuration of the
public code that is named; then `model=NAME`; then `model.KEY=VALUE`. What came with the weights must agree in itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kairos_train.basics.errors import UserError
from kairos_train.basics.files import read_json
from kairos_train.basics.foreign_files import parse_json
from kairos_train.basics.plain import MISSING
from kairos_train.config.schema import Config
from kairos_train.weights.public_pipeline import CONFIG_FILE as PUBLIC_CONFIG
from kairos_train.weights.public_words import network_settings, read_public_config, shortest_cycle
from kairos_train.weights.recognise import Word, leaves
from kairos_train.weights.weights_source import WeightsSource

CONFIG = "config.json"

HEADER_NAMES = {
    "dim": "video.dim",
    "ffn_dim": "video.ffn_dim",
    "layers": "video.layer_cycle",
    "window_frames": "video.window_frames",
    "dilation": "video.dilation",
    "window_semantics": "video.window_semantics",
    "restrict_history_query_to_history": "video.restrict_history_query_to_history",
    "all_attend_history": "video.all_attend_history",
    "gdn_head_dim": "video.gdn_key_dim",
    "action_dim_model": "action.dim",
    "action_ffn_dim": "action.ffn_dim",
    "action_dim": "action.action_dim",
    "state_dim": "action.state_dim",
    **{name: name for name in ("num_layers", "num_heads", "text_dim", "freq_dim", "eps")},
}
"""Names of a flat configuration, as reference vectors have it in their header; a flag that is absent there is false."""

FLAGS = ("restrict_history_query_to_history", "all_attend_history")


@dataclass
class Company:
    """What came with a file of weights.

    Attributes:
        settings: (where it stands, settings below `model` by dotted key) of every configuration.
        run: the run that an export of this project was made of, `{section: {...}}`; {} beside weights of others.
        record: what such an export's config.json says beside the run.
        distilled: whether one of the configurations says that these are weights of a distilled model.
    """

    settings: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    distilled: bool = False


def company_of(source: WeightsSource, public_config: Path | None = None) -> Company:
    """Read the configurations in the header of weights and beside them, and one of the public code that is named.

    Raises:
        UserError: one is damaged, or says what cannot be expressed here.
    """
    company = Company()
    for name in ("model_config", "config"):
        if name in source.metadata:
            where = f"metadata {name!r} of {source.path.name}"
            company.settings.append((where, _settings(_json(source.metadata[name], where), where)))
    file = source.path.parent / CONFIG
    if file.is_file():
        content = read_json(file, remedy="correct or remove it")
        run = content.get("run")
        company.run = run if isinstance(run, dict) else {}
        company.record = {key: value for key, value in content.items() if key != "run"} if company.run else {}
        company.distilled = company.record.get("distilled") is True
        model = company.run.get("model")
        company.settings.append((str(file), _settings(model if isinstance(model, dict) else content, str(file))))
    for python in (source.path.parent / PUBLIC_CONFIG, public_config):
        if python is not None and (python == public_config or python.is_file()):
            words = read_public_config(python)
            company.settings.append((str(python), words.settings))
            company.distilled |= words.distilled
    return company


def stated(company: Company, overrides: Sequence[str], config_dirs: Sequence[Path]) -> dict[str, Word]:
    """Settings below `model` by dotted key: those of the weights' own configuration, then a named model's, then single
    ones of the command line; later ones win.

    Raises:
        UserError: two configurations of the same weights contradict each other.
    """
    words: dict[str, Word] = {}
    for text, values in company.settings:
        for key, value in values.items():
            before = words.setdefault(key, Word(value, text))
            if not _same(key, before.value, value):
                raise UserError(
                    f"model.{key} is {before.value!r} by {before.source} and {value!r} by {text}; they do not belong"
                    " together: remove the wrong one"
                )
    given = [text.partition("=")[0].strip() for text in overrides]
    named = next((text for text in overrides if text.startswith(("model=", "experiment="))), None)
    single = [key.removeprefix("model.") for key in given if key.startswith("model.")]
    if named is None and not single:
        return words
    composed = leaves(dataclasses.asdict(compose(overrides, config_dirs).model))
    if named is not None:
        words |= {key: Word(value, named, named_model=True) for key, value in composed.items() if value != MISSING}
    for key in single:
        inside = {k: v for k, v in composed.items() if k == key or k.startswith(f"{key}.")}
        words |= {k: Word(value, "the command line") for k, value in inside.items()}
    return words


def _same(key: str, one: Any, other: Any) -> bool:
    """Whether two words say the same; a cycle of layers may be written out in many ways."""
    if key == "video.layer_cycle" and isinstance(one, list) and isinstance(other, list):
        return shortest_cycle(one) == shortest_cycle(other)
    return one == other


def compose(overrides: Sequence[str], config_dirs: Sequence[Path], sections: Iterable[str] = ()) -> Config:
    """The configuration of a command line."""
    from kairos_train.config.compose import load_config  # needs hydra, which reading weights does not

    return load_config(overrides, config_dirs=config_dirs, sections=list(sections))


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{where}: is no JSON object; correct or remove it")
    return value


def _settings(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Dotted settings of a configuration in this project's form, in that of the public code or as a flat header; none
    of any other, as programs of all kinds leave a config.json beside weights."""
    if isinstance(content.get("video"), Mapping):
        return leaves(content)
    if isinstance(content.get("dit_config"), Mapping):
        return network_settings(content["dit_config"], where)
    if "layers" not in content:
        return {}
    values = {known: content[name] for name, known in HEADER_NAMES.items() if name in content}
    values |= {HEADER_NAMES[name]: False for name in FLAGS if name not in content}
    values.setdefault("video.window_semantics", "frame")
    return values
