"""A training checkpoint → a folder to run, share and archive: weights under the public keys, and all they need.

    DIR/model.safetensors    the weights; its header repeats the model's configuration
    DIR/config.json          the resolved run, the encoders' identity, which weights these are
    DIR/sampler.json         how to sample them (`kairos_train.inference.sampler.SamplerConfig`)
    DIR/dataset_stats.json   what actions and state are normalised with (when the run had data with actions)
    DIR/README.md            model card
    DIR/manifest.json        size and SHA-256 of each file

`kairos_train.inference.load` reads it. Needs no process group and no GPU.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import safe_open
from torch import Tensor

import kairos_train
from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.checkpoint.public import to_public
from kairos_train.checkpoint.resolve import resolve_checkpoint
from kairos_train.checkpoint.tensor_file import Stored, write_tensors
from kairos_train.config.schema import Config, ModelConfig, stage_model
from kairos_train.errors import UserError
from kairos_train.objective import schedule

FORMAT = "kairos-export-1"
SECTIONS = {"ema": "ema", "raw": "model"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STATISTICS = "dataset_stats.json"


def export(
    checkpoint: Path, out: Path, *, weights: str = "ema", dtype: str = "bf16", distilled: bool = False
) -> dict[str, Any]:
    """Write an export folder; it appears under its name only when it is complete and was read back.

    Args:
        checkpoint: a run folder (its newest valid checkpoint is taken) or a checkpoint folder, with `config.yaml` and,
            for runs with actions, `dataset_stats.json`.
            Its state names the encoders that it was trained with.
        out: the folder to write; must not exist.
        weights: "ema" or "raw".
        dtype: "bf16" or "fp32", of every tensor in the file.
        distilled: the model was distilled to the fixed four steps: the sampler is set so, without guidance.

    Returns:
        What was written: out, weights, dtype, step, tensors, parameters, bytes and sha256 of the weights file.

    Raises:
        UserError: unknown options, `out` exists, the checkpoint is damaged or lacks what is asked for, or its weights
            and configuration do not belong together.
    """
    out = Path(out)
    for name, value, known in (("weights", weights, SECTIONS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise UserError(f"{name}={value!r}: must be one of {', '.join(known)}")
    if out.exists():
        raise UserError(f"out={out}: exists, and exports are never overwritten; give another folder or remove it")
    checkpoint = resolve_checkpoint(checkpoint)
    reader = CheckpointReader(checkpoint)
    section = SECTIONS[weights]
    if section not in reader.sections():
        other = "raw" if weights == "ema" else "ema"
        raise UserError(
            f"weights={weights!r}: checkpoint {checkpoint} has no section {section!r}, it has"
            f" {', '.join(reader.sections())}; export weights={other!r}, or another checkpoint"
        )
    _check_files(reader, section)
    config = _read_config(reader)
    _check_fit(reader, section, config.model)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        folder.chmod(0o755)  # mkdtemp makes it private to its owner
        summary = _write(folder, reader, config, weights=weights, dtype=dtype, distilled=distilled)
        _verify(folder, reader, section, DTYPES[dtype])
        os.rename(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already when it was published
    return {"out": str(out), **summary}


def sampler_settings(config: Config, *, distilled: bool) -> dict[str, Any]:
    """Content of sampler.json.

    Guidance is 5 as published; 1 (none) for a model that was distilled or never saw the null form (*ours*).
    """
    null_known = config.stage.cfg_dropout > 0 or config.stage.conditions.get("null2v", 0) > 0
    return {
        "schedule": "distilled" if distilled else "shifted",
        "steps": len(schedule.DISTILLED_TIMES) if distilled else 10,
        "guidance": 5.0 if null_known and not distilled else 1.0,
        "action_shift": schedule.DISTILLED_SHIFT if distilled else config.stage.action_shift,
        "negative_prompt": None,
    }


def _write(
    folder: Path, reader: CheckpointReader, config: Config, *, weights: str, dtype: str, distilled: bool
) -> dict[str, Any]:
    """Write every file of the export; returns its summary."""
    tensors = dict(_stored(reader, SECTIONS[weights], DTYPES[dtype]))
    model = dataclasses.asdict(config.model)
    metadata = {"format": "pt", "weights": weights, "model_config": json.dumps(model, sort_keys=True)}
    weights_file = write_tensors(folder / "model.safetensors", tensors, metadata)
    described = {
        "format": FORMAT,
        "weights": weights,
        "dtype": dtype,
        "step": reader.step,
        "distilled": distilled,
        "encoders": reader.state.get("encoders"),
        "checkpoint_sha256": reader.manifest["sha256"],
        "versions": {
            "trained": reader.manifest["versions"],
            "exported": {part.__name__: part.__version__ for part in (kairos_train, torch, safetensors)},
        },
        "run": dataclasses.asdict(config),
    }
    _write_text(folder / "config.json", _to_json(described))
    _write_text(folder / "sampler.json", _to_json(sampler_settings(config, distilled=distilled)))
    if STATISTICS in reader.manifest["files"]:
        _write_text(folder / STATISTICS, reader.text(STATISTICS))
    elif config.stage.streams == "joint":
        raise UserError(
            f"checkpoint {reader.path}: has no {STATISTICS}, without which its actions mean nothing; put the shards'"
            f" {STATISTICS} into the checkpoint when it is written"
        )
    summary = {
        "weights": weights,
        "dtype": dtype,
        "step": reader.step,
        "tensors": len(tensors),
        "parameters": sum(torch.Size(t.shape).numel() for t in tensors.values()),
        **weights_file,
    }
    statistics = folder / STATISTICS
    card = model_card(described, summary, json.loads(statistics.read_text()) if statistics.exists() else None)
    _write_text(folder / "README.md", card)
    files = {path.name: _describe_file(path) for path in sorted(folder.iterdir())}
    _write_text(folder / "manifest.json", _to_json({"format": FORMAT, "files": files}))
    return summary


def model_card(described: dict[str, Any], summary: dict[str, Any], statistics: dict[str, Any] | None) -> str:
    """README.md of an export, from the content of config.json, the summary and the dataset's statistics."""
    run = described["run"]
    model, data, stage = run["model"], run["data"], run["stage"]
    window = data["window"]
    actions = stage["streams"] == "joint"
    encoders = {part: run["encoders"][part]["kind"] for part in ("video", "text")}
    kinds = ", ".join(f"{part} `{kind}`" for part, kind in encoders.items())
    lines = [
        f"# {run['experiment']}, step {described['step']}",
        "",
        f"World-action model `{model['name']}`, {summary['parameters']:,} parameters, trained with kairos-train.",
        f"It predicts {'video and actions' if actions else 'video'}.",
        "",
        "| | |",
        "|---|---|",
        f"| weights | {'moving average (EMA)' if described['weights'] == 'ema' else 'raw'}, {described['dtype']} |",
        f"| stage | `{stage['name']}`, streams `{stage['streams']}`, {described['step']} steps, seed {run['seed']} |",
        f"| data | `{data['name']}`{_data_size(statistics)} |",
        f"| window | {window['frames']} frames of {window['height']}×{window['width']} per camera, one of"
        f" {window['action_video_freq_ratio']} raw frames; {stage['history_frames']} latent frame(s) given |",
        f"| prompt | `{data['prompt_template']}` |",
        f"| encoders | {kinds} |",
    ]
    if actions:
        lines.append(
            f"| actions | {model['action']['action_dim']} dimensions `{window['action_key']}`,"
            f" `{data['normalize_action']}`; state {model['action']['state_dim']} `{window['state_key']}`,"
            f" `{data['normalize_state']}` |"
        )
    versions = ", ".join(f"{k} {v}" for k, v in sorted(described["versions"]["trained"].items()))
    lines += [
        f"| trained with | {versions} |",
        f"| checkpoint manifest | sha256 `{described['checkpoint_sha256']}` |",
        f"| model.safetensors | sha256 `{summary['sha256']}` |",
        "",
    ]
    if encoders["video"] == "block_dct" or encoders["text"] == "hashed_ngrams":
        lines += ["Trained on weight-free encoders: it cannot be used with the published ones.", ""]
    lines += [
        "Load it (torch, numpy and safetensors suffice):",
        "",
        "```python",
        "from kairos_train.inference.load import load",
        "from kairos_train.inference.predict import Predictor",
        "",
        'predictor = Predictor(load("."))',
        "```",
        "",
        "`config.json` holds every setting of the run, `sampler.json` how to sample, `manifest.json` the hashes.",
        "",
    ]
    return "\n".join(lines)


def _data_size(statistics: dict[str, Any] | None) -> str:
    known = statistics or {}
    parts = [
        f"{known[key]:,} {name}"
        for key, name in (("num_episodes", "episodes"), ("num_transition", "steps"))
        if key in known
    ]
    return f": {', '.join(parts)}" if parts else ""


def _read_config(reader: CheckpointReader) -> Config:
    """The run's resolved configuration, its model the one that the checkpoint holds."""
    from kairos_train.config.compose import load_saved  # needs hydra, which reading an export does not

    reader.text("config.yaml")  # it is recorded, and its hash was compared
    config = load_saved(reader.path / "config.yaml")
    return dataclasses.replace(config, model=stage_model(config))


def _check_files(reader: CheckpointReader, section: str) -> None:
    """Compare the files that are about to be read with their recorded hashes; the optimiser's are left alone."""
    tensors = reader.manifest["sections"][section].values()
    names = {piece["file"] for info in tensors for piece in info["pieces"]}
    names |= {name for name in reader.manifest["files"] if not name.endswith(".safetensors")}
    for name in sorted(names):
        file, recorded = reader.path / name, reader.manifest["files"].get(name)
        if not file.is_file() or recorded is None:
            raise UserError(f"checkpoint {reader.path}: {name} is missing; use another checkpoint")
        if _describe_file(file) != recorded:
            raise UserError(f"checkpoint {reader.path}: {name} is damaged (not the recorded SHA-256); use another one")


def _check_fit(reader: CheckpointReader, section: str, config: ModelConfig) -> None:
    """Names and shapes of a section against the model that the configuration describes."""
    from kairos_train.model import WorldActionModel

    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in WorldActionModel(config).state_dict().items()}
    found = {name: reader.shape(section, name) for name in reader.names(section)}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            stored, by_config = (list(s[name]) if name in s else "none" for s in (found, expected))
            raise UserError(
                f"checkpoint {reader.path}: {section}/{name} has shape {stored}, by config.yaml (model {config.name!r})"
                f" {by_config}; weights and configuration do not belong together"
            )


def _stored(reader: CheckpointReader, section: str, dtype: torch.dtype) -> Iterator[tuple[str, Stored]]:
    """Public key and tensor in the export's precision, read when it is asked for: one is in memory at a time."""
    for name, key in to_public(reader.names(section)).items():
        yield key, Stored(dtype, reader.shape(section, name), partial(_cast, reader, section, name, dtype))


def _cast(reader: CheckpointReader, section: str, name: str, dtype: torch.dtype) -> Tensor:
    tensor = reader.read(section, name).to(dtype)
    if not tensor.isfinite().all():
        raise UserError(f"checkpoint {reader.path}: {section}/{name} has values that are not finite; use another one")
    return tensor


def _verify(folder: Path, reader: CheckpointReader, section: str, dtype: torch.dtype) -> None:
    """Read the written weights back and compare every tensor with its source, cast."""
    with safe_open(folder / "model.safetensors", "pt") as written:
        left = set(written.keys())
        for key, source in _stored(reader, section, dtype):
            if key not in left or not torch.equal(written.get_tensor(key), source.load()):
                raise OSError(f"{folder}: tensor {key!r} reads back unlike it was written; is the disk sound?")
            left.remove(key)
    if left:
        raise OSError(f"{folder}: holds tensors that were not written: {', '.join(sorted(left))}")


def _describe_file(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"
