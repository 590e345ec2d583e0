"""Public weights → a canonical checkpoint, to train from (`stage.init_from`) or to export.

    DIR/step-00000000/   sections "model" and "ema", which name the same bytes: imported weights are their own average,
                         so that both names are found and the disk holds one copy
        config.yaml          the recognised model; the rest as the command line composed it
        dataset_stats.json   the one beside the weights, where there is one

Every tensor keeps its bytes and its dtype. One is in memory at a time.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kairos_train.basics.errors import UserError
from kairos_train.basics.files import new_folder
from kairos_train.checkpoint.canonical import TEMPORARY, checkpoint_path
from kairos_train.checkpoint.tensor_file import Stored, split_by_size, write_tensors
from kairos_train.checkpoint.writing import FILE_BYTES, publish
from kairos_train.config.schema import MISSING, Config, ModelConfig
from kairos_train.weights.public import from_public
from kairos_train.weights.recognise import TRACELESS, Word, leaves, recognise
from kairos_train.weights.weights_source import WeightsSource

CONFIG, STATISTICS = "config.json", "dataset_stats.json"
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ENCODERS = {2048: "wan_qwen35", 3584: "wan_qwen25"}
"""Width of the context -> the published encoders that give it."""

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


def import_weights(
    file: Path, out: Path, overrides: Sequence[str] = (), *, config_dirs: Sequence[Path] = ()
) -> dict[str, Any]:
    """Write a canonical checkpoint from public weights; it appears under its name only when it is complete.

    Args:
        file: a `.safetensors` file, or the `.index.json` of several.
        out: the folder to write; must not exist. `stage.init_from` and `kairos-train export` take it.
        overrides: `GROUP=OPTION` and `KEY=VALUE` of a run. `model=NAME` and `model.KEY=VALUE` say what leaves no trace
            in the weights; `data`, `encoders` and `stage` are kept for a later export.
        config_dirs: folders of own configurations.

    Returns:
        What was found: streams, sizes, dtypes, who said what, the encoders, bytes written.

    Raises:
        UserError: unreadable weights, tensors that do not fit, or a configuration that is missing or contradicts them.
    """
    file, out = Path(file), Path(out)
    if out.exists():
        raise UserError(f"out={out}: exists, and checkpoints are never overwritten; give another folder or remove it")
    source = WeightsSource(file)
    names = {parameter: key for key, parameter in from_public(source.keys()).items()}
    for key in names.values():
        if source.dtype(key) not in DTYPES:
            raise UserError(
                f"{file}: {key!r} is {_name(source.dtype(key))}, no floating type; quantised weights cannot be trained:"
                " import the unquantised ones"
            )
    words = stated(source, overrides, config_dirs)
    shapes = {parameter: source.shape(key) for parameter, key in names.items()}
    config = _compose(recognise(shapes, words), overrides, config_dirs)
    tensors = {
        parameter: Stored(source.dtype(key), source.shape(key), partial(_read, source, key))
        for parameter, key in sorted(names.items())
    }
    prefix = names["video_dit.patch_embedding.weight"].removesuffix("patch_embedding.weight")
    state = {"imported": {"file": file.name, "prefix": prefix}, "encoders": None}
    nbytes = _write(out, tensors, config, state, _statistics(file))
    return {
        "out": str(out),
        "streams": ["video"] if config.model.action is None else ["video", "action"],
        "prefix": prefix,
        "tensors": len(tensors),
        "parameters": sum(prod(t.shape) for t in tensors.values()),
        "dtypes": dict(Counter(_name(t.dtype) for t in tensors.values())),
        "bytes": nbytes,
        "model": dataclasses.asdict(config.model),
        "stated_by": {key: words[key].source for key in (*TRACELESS, "num_heads") if key in words},
        "encoders": config.encoders.name,
        "statistics": (file.parent / STATISTICS).is_file(),
    }


# --- what was stated ---


def stated(source: WeightsSource, overrides: Sequence[str], config_dirs: Sequence[Path]) -> dict[str, Word]:
    """Settings below `model` by dotted key: those of the weights' own configuration, then a named model's, then single
    ones of the command line; later ones win.

    Raises:
        UserError: two configurations of the same weights contradict each other.
    """
    words: dict[str, Word] = {}
    for text, values in _beside(source):
        for key, value in values.items():
            before = words.get(key)
            if before is not None and before.value != value:
                raise UserError(
                    f"model.{key} is {before.value!r} by {before.source} and {value!r} by {text}; they do not belong"
                    " together: remove the wrong one"
                )
            words[key] = Word(value, text)
    given = [text.partition("=")[0].strip() for text in overrides]
    named = next((text for text in overrides if text.startswith(("model=", "experiment="))), None)
    single = [key.removeprefix("model.") for key in given if key.startswith("model.")]
    if named is None and not single:
        return words
    composed = leaves(dataclasses.asdict(_load(overrides, config_dirs).model))
    if named is not None:
        words |= {key: Word(value, named, named_model=True) for key, value in composed.items() if value != MISSING}
    for key in single:
        inside = {k: v for k, v in composed.items() if k == key or k.startswith(f"{key}.")}
        words |= {k: Word(value, "the command line") for k, value in inside.items()}
    return words


def _beside(source: WeightsSource) -> list[tuple[str, dict[str, Any]]]:
    """(where it stands, settings) of every configuration that came with the weights."""
    found = []
    for name in ("model_config", "config"):
        if name in source.metadata:
            where = f"metadata {name!r} of {source.path.name}"
            found.append((where, _settings(_json(source.metadata[name], where))))
    file = source.path.parent / CONFIG
    if file.is_file():
        content = _json(file.read_text(encoding="utf-8"), str(file))
        run = content.get("run")
        model = run.get("model") if isinstance(run, dict) else None
        found.append((str(file), _settings(model if isinstance(model, dict) else content)))
    return found


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{where}: is no JSON object; correct or remove it")
    return value


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted settings of a configuration in this project's form or as a flat header; none of any other, as programs of
    all kinds leave a config.json beside weights."""
    if isinstance(content.get("video"), Mapping):
        return leaves(content)
    if "layers" not in content:
        return {}
    values = {known: content[name] for name, known in HEADER_NAMES.items() if name in content}
    values |= {HEADER_NAMES[name]: False for name in FLAGS if name not in content}
    values.setdefault("video.window_semantics", "frame")
    return values


def _load(overrides: Sequence[str], config_dirs: Sequence[Path], sections: Iterable[str] = ()) -> Config:
    from kairos_train.config.compose import load_config  # needs hydra, which reading weights does not

    return load_config(overrides, config_dirs=config_dirs, sections=list(sections))


def _compose(model: ModelConfig, overrides: Sequence[str], config_dirs: Sequence[Path]) -> Config:
    """The configuration of the checkpoint: the recognised model, and where the command line chose none, the published
    encoders of its context width and a stage of its streams.

    Raises:
        UserError: a rule is broken, as by encoders of another width.
    """
    from kairos_train.config.validate import validate

    chosen = {text.partition("=")[0].strip().partition(".")[0] for text in overrides} | (
        {"encoders", "stage"} if any(text.startswith("experiment=") for text in overrides) else set()
    )
    added = []
    if "encoders" not in chosen and model.text_dim in ENCODERS:
        added.append(f"encoders={ENCODERS[model.text_dim]}")
    if "stage" not in chosen and model.action is None:
        added.append("stage=physical")
    config = copy.deepcopy(_load([*added, *overrides], config_dirs))
    if model.action is not None and config.stage.streams == "video":
        raise UserError(
            f"stage.streams=video (stage {config.stage.name!r}), but the weights hold both streams; leave it out, or"
            " choose a joint stage"
        )
    config.model = model
    if "encoders" not in chosen and model.text_dim not in ENCODERS:
        config.encoders.name, config.encoders.text.text_dim = "unnamed", model.text_dim
    if config.data.window.cameras == MISSING:
        config.data.window.cameras = []
    validate(config, ("model", "encoders"))  # what only a trained stage must keep is not asked here
    return config


# --- writing ---


def _write(
    out: Path, tensors: Mapping[str, Stored], config: Config, state: Mapping[str, Any], statistics: str | None
) -> int:
    """Write the checkpoint; returns the bytes of its tensors' files."""
    from kairos_train.config.compose import to_yaml

    with new_folder(out, durable=True) as parent:
        target = checkpoint_path(parent, 0)
        folder = parent / f"{TEMPORARY}{target.name}"
        folder.mkdir()
        described, files = {}, {}
        for number, group in enumerate(split_by_size(tensors, FILE_BYTES), 1):
            name = f"model-00000-{number:05d}.safetensors"
            files[name] = write_tensors(folder / name, group)
            for key, tensor in group.items():
                piece = {"file": name, "key": key, "offset": [0] * len(tensor.shape), "shape": list(tensor.shape)}
                described[key] = {"dtype": _name(tensor.dtype), "shape": list(tensor.shape), "pieces": [piece]}
        texts = {"config.yaml": to_yaml(config)} | ({} if statistics is None else {STATISTICS: statistics})
        part = {"sections": {"model": described, "ema": copy.deepcopy(described)}, "files": files}
        publish(folder, target, [part], state=state, files=texts)
    return sum(info["bytes"] for info in files.values())


def _read(source: WeightsSource, key: str) -> Tensor:
    tensor = source.read(key)
    if not tensor.isfinite().all():
        raise UserError(f"{source.path}: {key!r} has values that are not finite; get the weights again")
    return tensor


def _statistics(file: Path) -> str | None:
    """The dataset statistics beside the weights."""
    path = file.parent / STATISTICS
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    _json(text, str(path))
    return text


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
