"""The files of an export folder, and that they are those of one export, as it was written.

    manifest.json                   every file's size and SHA-256
    model.safetensors.index.json    which of the files beside it has which tensor
    config.json                     the resolved run, the encoders' identity, which weights these are
    sampler.json, dataset_stats.json, robots.json

Before anything is made of them, every file that is read is compared with the manifest. Two may be edited by their
users: of config.json what belongs to a machine (paths, kernels), of sampler.json the settings. What decides a
prediction is compared all the same: the header of each file of weights repeats the model's configuration, because layer
order, windows and history rules leave no trace in keys and shapes, and the export's fingerprint
(`kairos_train.inference.fingerprint`), which sampler.json has too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from kairos_train.basics.errors import UserError, one_line
from kairos_train.basics.files import is_plain_name, read_json, sha256_of
from kairos_train.basics.foreign_files import check_regular, parse_json, refuse_lfs_pointer
from kairos_train.basics.log import logger
from kairos_train.config.schema import ModelConfig
from kairos_train.inference.fingerprint import fingerprint

FORMAT = "kairos-export-2"
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
SAMPLER_FILE = "sampler.json"
STATISTICS_FILE = "dataset_stats.json"
EDITED = (CONFIG_FILE, SAMPLER_FILE)
EXPORT = "write the folder again with `kairos-train export`"
"""The remedy where a file of an export folder is unreadable."""


def read_described(folder: Path) -> dict[str, Any]:
    """Content of an export's config.json, whose parts are there and of their kinds.

    Raises:
        UserError: unreadable, or not that of an export of this format.
    """
    file = folder / CONFIG_FILE
    described = read_json(file, remedy=EXPORT)
    if described.get("format") != FORMAT:
        raise UserError(f"{file}: format is {described.get('format')!r}, not {FORMAT!r}; export again, standalone")
    for key, kinds in PARTS.items():
        value: Any = described
        for name in key.split("."):
            value = value.get(name)
        if not isinstance(value, kinds):
            raise UserError(f"{file}: has no {key!r} as exports have it; export again")
    return described


PARTS: dict[str, tuple[type, ...]] = {
    "run": (dict,),
    **{f"run.{section}": (dict,) for section in ("model", "stage", "data", "encoders")},
    **{f"run.encoders.{part}": (dict,) for part in ("video", "text")},
    **{key: (str,) for key in ("dtype", "weights", "fingerprint")},
    "distilled": (bool,),
    **{key: (dict, type(None)) for key in ("quantization", "robot")},
    **{key: (str, type(None)) for key in ("statistics_sha256", "robots_sha256")},
}
"""What config.json holds, by dotted key: sections before what is in them."""


def check_bytes(folder: Path, names: Collection[str]) -> None:
    """Return if files of an export are, byte by byte, those that its manifest lists.

    They are read as streams. One of `EDITED` that is another now is reported.

    Args:
        names: of the files that are going to be read.

    Raises:
        UserError: names the first that is missing, not listed or another one; or there is no manifest.
    """
    manifest = folder / MANIFEST_FILE
    listed = read_json(manifest, remedy=EXPORT).get("files")
    if not isinstance(listed, dict) or not all(isinstance(info, dict) for info in listed.values()):
        raise UserError(f"{manifest}: lists no files with their SHA-256; {EXPORT}")
    for name in sorted(names):
        file, recorded = folder / name, listed.get(name)
        if recorded is None:
            raise UserError(f"{manifest}: does not list {name}, which is not of this export then; {EXPORT}")
        try:
            check_regular(file)
            same = file.stat().st_size == recorded.get("bytes") and sha256_of(file) == recorded.get("sha256")
        except FileNotFoundError:
            raise UserError(f"{file}: not found; {EXPORT}") from None
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); {EXPORT}") from error
        if same:
            continue
        refuse_lfs_pointer(file)
        if name not in EDITED:
            raise UserError(
                f"{file}: is not the one that was exported, or damaged (its SHA-256 is not that of {MANIFEST_FILE});"
                f" copy the folder again, or {EXPORT}"
            )
        logger.info(f"{file}: was edited after the export")


@dataclass(frozen=True)
class Header:
    """What stands at the beginning of a file of weights: name → (type as safetensors writes it, shape), and text."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str]


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name → file, of an export's index.

    Raises:
        UserError: there is none, or it names files elsewhere.
    """
    names = read_json(folder / INDEX_FILE, remedy=EXPORT).get("weight_map")
    if not isinstance(names, dict) or not all(map(is_plain_name, names.values())):
        raise UserError(f"{folder / INDEX_FILE}: has no weight_map from tensors to files beside it; export again")
    return names


def read_header(file: Path) -> Header:
    """The tensors and the text in the header of a file of weights.

    Raises:
        UserError: the file is missing, cut off or damaged.
    """
    if not file.is_file():
        raise UserError(f"{file}: not found; write an export folder with `kairos-train export`")
    refuse_lfs_pointer(file)
    try:
        with safe_open(file, "pt") as weights:
            parts = {key: weights.get_slice(key) for key in weights.keys()}  # noqa: SIM118, not a dict
            tensors = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in parts.items()}
            return Header(tensors, weights.metadata() or {})
    except SafetensorError as error:
        raise UserError(f"{file}: cannot be read as safetensors ({one_line(error)}); export again") from error


def check_fit(
    folder: Path, tables: Mapping[Path, Header], model: nn.Module, config: ModelConfig, described: Mapping[str, Any]
) -> None:
    """Compare files of weights with the model that a configuration describes: names, shapes, headers, fingerprint.

    Args:
        tables: of every file that the index names.
        model: of `config`, without storage.

    Raises:
        UserError: names the first tensor, file or setting that does not fit.
    """
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    tensors = {key: info for table in tables.values() for key, info in table.tensors.items()}
    found = {key: shape for key, (_, shape) in tensors.items()}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            in_file, by_config = (list(s[key]) if key in s else "none" for s in (found, expected))
            raise UserError(
                f"{folder}: tensor {key!r} has shape {in_file} in the file and {by_config} by {CONFIG_FILE}"
                f" (run.model, {config.name!r}); weights and configuration do not belong together"
            )
    for file, table in tables.items():
        recorded = table.metadata.get("model_config")
        if recorded is None:
            raise UserError(f"{file}: its header has no model_config; only files of `kairos-train export` load here")
        try:
            exported = parse_json(recorded)
        except ValueError as error:
            raise UserError(f"{file}: model_config in its header is no JSON ({one_line(error)}); {EXPORT}") from error
        if difference := _first_difference(exported, described["run"]["model"]):
            name, in_file, by_config = difference
            raise UserError(
                f"{file}: was written for run.model{name}={in_file!r}, {CONFIG_FILE} says {by_config!r};"
                " weights and configuration do not belong together"
            )
    if fingerprint(described, tensors) != described["fingerprint"]:
        raise UserError(
            f"{folder / CONFIG_FILE}: is not as it was exported, or of other weights: what it says of model, data,"
            " stage, encoders or precision has another fingerprint; export again"
        )
    for file, table in tables.items():
        check_fingerprint(file, table.metadata.get("fingerprint"), described)


def check_fingerprint(file: Path, found: Any, described: Mapping[str, Any]) -> None:
    """Raise UserError unless a file has the fingerprint of its config.json."""
    if found != described["fingerprint"]:
        raise UserError(
            f"{file}: is of another export than {CONFIG_FILE} (fingerprint {str(found)[:12]}, not"
            f" {described['fingerprint'][:12]}); take all files from one export"
        )


def _first_difference(found: Any, expected: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Dotted path and both values of the first leaf in which two plain trees differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            if difference := _first_difference(found.get(key), expected.get(key), f"{path}.{key}"):
                return difference
        return None
    return None if found == expected else (path, found, expected)
