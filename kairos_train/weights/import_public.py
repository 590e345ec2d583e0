"""Public weights → a canonical checkpoint, to train from (`stage.init_from`) or to export.

    DIR/step-00000000/   sections "model" and "ema", which name the same bytes: imported weights are their own average,
                         so that both names are found and the disk holds one copy
        config.yaml          the recognised model; of an export of this project its encoders, data and stage too; the
                             rest as the command line composed it
        dataset_stats.json   the statistics of the weights, where there are some

Every tensor keeps its bytes and its dtype. One is in memory at a time. The checkpoint's state says `distilled` of
weights that are sampled as distilled ones, and keeps the identity of an export's encoders.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kairos_train.basics.errors import UserError
from kairos_train.basics.files import new_folder
from kairos_train.basics.plain import MISSING, from_dict
from kairos_train.basics.progress import progress
from kairos_train.checkpoint.canonical import TEMPORARY, checkpoint_path
from kairos_train.checkpoint.tensor_file import Stored, counted, split_by_size, write_tensors
from kairos_train.checkpoint.writing import FILE_BYTES, publish
from kairos_train.config.schema import Config, ModelConfig
from kairos_train.weights import statistics as stats
from kairos_train.weights.public import from_public
from kairos_train.weights.recognise import TRACELESS, recognise
from kairos_train.weights.stated import Company, company_of, compose, stated
from kairos_train.weights.weights_source import WeightsSource

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ENCODERS = {
    **{(2048, streams): "wan_qwen35" for streams in (1, 2)},
    (3584, 1): "wan_qwen25",
    (3584, 2): "wan_qwen25_no_image",
}
"""Width of the context and number of streams -> the encoders of the published weights that are so."""

KEPT = {
    "encoders": ("name", "video", "text"),
    "data": ("name", "window", "prompt_template", "normalize_action", "normalize_state"),
    "stage": ("name", "streams", "conditions", "history_frames", "cfg_dropout", "cfg_dropout_form", "action_shift"),
}
"""What an export's run says of its weights; the rest is of the machine or of how they were trained."""


def import_weights(
    file: Path,
    out: Path,
    overrides: Sequence[str] = (),
    *,
    config_dirs: Sequence[Path] = (),
    distilled: bool = False,
    statistics: Path | None = None,
    public_config: Path | None = None,
) -> dict[str, Any]:
    """Write a canonical checkpoint from public weights; it appears under its name only when it is complete.

    Args:
        file: a `.safetensors` file, or the `.index.json` of several.
        out: the folder to write; must not exist. `stage.init_from` and `kairos-train export` take it.
        overrides: `GROUP=OPTION` and `KEY=VALUE` of a run. `model=NAME` and `model.KEY=VALUE` say what leaves no trace
            in the weights; `data`, `encoders` and `stage` are kept for a later export.
        config_dirs: folders of own configurations.
        distilled: the weights are of a model distilled to the released fixed times; a configuration that comes with
            them may say so too.
        statistics: what actions and state are normalised with; None: the file beside the weights, if there is one.
        public_config: a Python configuration of the public code that loads these weights.

    Returns:
        What was found: streams, sizes, dtypes, who said what, the encoders, bytes written.

    Raises:
        UserError: unreadable weights, tensors that do not fit, a configuration that is missing or contradicts them, or
            statistics that are ambiguous or of which nobody said how they normalise.
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
    company = company_of(source, public_config)
    words = stated(company, overrides, config_dirs)
    shapes = {parameter: source.shape(key) for parameter, key in names.items()}
    config = _compose(recognise(shapes, words), company, overrides, config_dirs)
    statistics = statistics or stats.statistics_file(file.parent)
    content = None
    if statistics is not None:
        exported = isinstance(company.run.get("data"), dict)
        content = stats.imported_statistics(statistics, config, _keys(overrides), exported=exported)
    tensors = {
        parameter: Stored(source.dtype(key), source.shape(key), partial(_read, source, key))
        for parameter, key in sorted(names.items())
    }
    prefix = names["video_dit.patch_embedding.weight"].removesuffix("patch_embedding.weight")
    distilled = distilled or company.distilled
    state = {"imported": {"file": file.name, "prefix": prefix}, "encoders": None, "distilled": distilled}
    if not _chosen("encoders", _keys(overrides)):
        state["encoders"] = company.record.get("encoders")
    nbytes = _write(out, tensors, config, state, content)
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
        "distilled": distilled,
        "statistics": None if statistics is None else statistics.name,
    }


# --- the configuration of the checkpoint ---


def _keys(overrides: Sequence[str]) -> list[str]:
    """What a command line sets: groups and dotted keys."""
    return [text.partition("=")[0].strip() for text in overrides]


def _chosen(section: str, keys: Sequence[str]) -> bool:
    """Whether the command line chose a whole section."""
    return section in keys or "experiment" in keys


def _compose(model: ModelConfig, company: Company, overrides: Sequence[str], config_dirs: Sequence[Path]) -> Config:
    """The configuration of the checkpoint: the recognised model, what an export says of its encoders, data and stage,
    and where neither it nor the command line chose, the published encoders and a stage of these streams.

    Raises:
        UserError: a rule is broken, as by encoders of another width.
    """
    from kairos_train.config.validate import validate

    keys = _keys(overrides)
    known = {section for section in KEPT if isinstance(company.run.get(section), dict)}
    chosen = {section for section in KEPT if _chosen(section, keys)}
    encoders = ENCODERS.get((model.text_dim, 1 if model.action is None else 2))
    added = []
    if "encoders" not in chosen | known and encoders is not None:
        added.append(f"encoders={encoders}")
    if "stage" not in chosen and model.action is None:
        added.append("stage=physical")
    config = copy.deepcopy(compose([*added, *overrides], config_dirs))
    for section in sorted(known):
        if section not in chosen:
            setattr(config, section, _kept(section, company.run[section], config, keys))
    if model.action is not None and config.stage.streams == "video":
        raise UserError(
            f"stage.streams=video (stage {config.stage.name!r}), but the weights hold both streams; leave it out, or"
            " choose a joint stage"
        )
    config.model = model
    if "encoders" not in chosen | known and encoders is None:
        config.encoders.name, config.encoders.text.text_dim = "unnamed", model.text_dim
    if "stage" not in known and "stage.cfg_dropout_form" not in keys:
        config.stage.cfg_dropout_form = "empty_prompt"  # what the public samplers guide the published weights with
    if config.data.window.cameras == MISSING:
        config.data.window.cameras = []
    validate(config, ("model", "encoders"))  # what only a trained stage must keep is not asked here
    return config


def _kept(section: str, run: Mapping[str, Any], config: Config, keys: Sequence[str]) -> Any:
    """A section as an export's run has it, but for what the command line sets and what is not of the weights."""
    composed = dataclasses.asdict(getattr(config, section))
    tree = composed | {name: copy.deepcopy(run[name]) for name in KEPT[section] if name in run}
    for key in keys:
        *path, last = key.split(".")
        if path[:1] == [section]:
            source, target = composed, tree
            for name in path[1:]:
                source, target = source[name], target[name]
            target[last] = source[last]
    return from_dict(type(getattr(config, section)), tree)


# --- writing ---


def _write(
    out: Path,
    tensors: Mapping[str, Stored],
    config: Config,
    state: Mapping[str, Any],
    statistics: Mapping[str, Any] | None,
) -> int:
    """Write the checkpoint; returns the bytes of its tensors' files."""
    from kairos_train.config.compose import to_yaml

    with new_folder(out, durable=True) as parent:
        target = checkpoint_path(parent, 0)
        folder = parent / f"{TEMPORARY}{target.name}"
        folder.mkdir()
        described, files = {}, {}
        with progress("import", sum(tensor.nbytes for tensor in tensors.values()) / 1e6, "MB") as advance:
            for number, group in enumerate(split_by_size(counted(tensors, advance), FILE_BYTES), 1):
                name = f"model-00000-{number:05d}.safetensors"
                files[name] = write_tensors(folder / name, group)
                for key, tensor in group.items():
                    piece = {"file": name, "key": key, "offset": [0] * len(tensor.shape), "shape": list(tensor.shape)}
                    described[key] = {"dtype": _name(tensor.dtype), "shape": list(tensor.shape), "pieces": [piece]}
        texts = {"config.yaml": to_yaml(config)} | ({} if statistics is None else {stats.FILE: json.dumps(statistics)})
        part = {"sections": {"model": described, "ema": copy.deepcopy(described)}, "files": files}
        publish(folder, target, [part], state=state, files=texts)
    return sum(info["bytes"] for info in files.values())


def _read(source: WeightsSource, key: str) -> Tensor:
    tensor = source.read(key)
    if not tensor.isfinite().all():
        raise UserError(f"{source.path}: {key!r} has values that are not finite; get the weights again")
    return tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
