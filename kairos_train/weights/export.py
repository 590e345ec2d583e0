"""A checkpoint → a folder to run, share and archive: weights under the public keys, and all they need.

    standalone                                         public
    DIR/model.safetensors.index.json, model-….safetensors   DIR/model.safetensors    the weights
    DIR/config.json          the resolved run, the encoders' identity, which weights these are; public: `dit_config` too
    DIR/sampler.json         how to sample them (`kairos_train.inference.sampler.SamplerConfig`)
    DIR/dataset_stats.json   what actions and state are normalised with (when the run had data with actions); public:
                             one entry per group, `default`
    DIR/robots.json          standalone: sizes, windows and statistics of each of several robots that it was trained on
    DIR/kairos_config.py     public only: the configuration that the public code loads all this with
    DIR/README.md            model card
    DIR/manifest.json        size and SHA-256 of each file

`kairos_train.inference.load` reads a standalone export; its large linear layers may be quantised. A public one is for
the public inference code and for `kairos-train import`. Needs no process group and no GPU.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from math import prod
from pathlib import Path
from typing import Any

import safetensors
import torch

import kairos_train
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import describe_file, new_folder, write_json, write_whole
from kairos_train.basics.progress import progress
from kairos_train.checkpoint.adapters import MergedWeights
from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.checkpoint.resolve import resolve_checkpoint
from kairos_train.checkpoint.tensor_file import CODES, Stored, counted, split_by_size, write_tensors
from kairos_train.checkpoint.writing import FILE_BYTES
from kairos_train.config.schema import Config, ModelConfig, stage_model
from kairos_train.inference.export_files import (
    CONFIG_FILE,
    FORMAT,
    INDEX_FILE,
    MANIFEST_FILE,
    SAMPLER_FILE,
    STATISTICS_FILE,
)
from kairos_train.inference.fingerprint import fingerprint
from kairos_train.inference.quantized import METHODS, is_large
from kairos_train.inference.robots import ROBOTS_FILE
from kairos_train.model.public_keys import public_keys, refuse_larger
from kairos_train.objective import schedule
from kairos_train.weights.export_tensors import ExportTensors, WrittenTensors, computed_bytes
from kairos_train.weights.model_card import model_card
from kairos_train.weights.public import to_public
from kairos_train.weights.public_config import public_config
from kairos_train.weights.public_pipeline import CONFIG_FILE as PUBLIC_CONFIG_FILE
from kairos_train.weights.public_pipeline import public_pipeline
from kairos_train.weights.quantize import output_error
from kairos_train.weights.statistics import public_statistics

FORMATS = {"standalone": FORMAT, "public": "kairos-public-1"}
SMALL = 2**16  # elements
PUBLIC_FILE = "model.safetensors"
SECTIONS = {"ema": "ema", "raw": "model"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "stored": None}


def export(
    checkpoint: Path,
    out: Path,
    *,
    form: str = "standalone",
    weights: str = "ema",
    dtype: str | None = None,
    quantize: str | None = None,
    distilled: bool = False,
    file_bytes: int = FILE_BYTES,
) -> dict[str, Any]:
    """Write an export folder; it appears under its name only when it is complete and was read back.

    Args:
        checkpoint: a run folder (its newest valid checkpoint is taken), a checkpoint folder or what `kairos-train
            import` wrote, with `config.yaml` and, for runs with actions, `dataset_stats.json`.
            Its state names the encoders that it was trained with, the robot's cameras and its rate of actions.
        out: the folder to write; must not exist.
        form: "standalone" (for `kairos_train.inference`) or "public" (one file, for the public code).
        weights: "ema" or "raw".
        dtype: "bf16" or "fp32", of every tensor that is not quantised, or "stored", as the checkpoint has it; None:
            stored for imported weights, bf16 for trained ones, whose checkpoints are float32.
        quantize: "int8", "fp8" or "int4": the large linear layers, weight-only; None: none.
        distilled: the model was distilled to the fixed four steps: the sampler is set so, without guidance. The
            checkpoint of imported weights may say so too.
        file_bytes: a file of a standalone export is closed before it would grow beyond this.

    Returns:
        What was written: out, format, weights, dtype, step, tensors, parameters; the weights' bytes on disk, of them
        in headers, and the bytes of tensors as computed from the model's shapes; of a public export the sha256 of the
        weights; of a quantised one its method, layers and the error of its outputs.

    Raises:
        UserError: unknown options, `out` exists, the checkpoint is damaged or lacks what is asked for, or its weights
            and configuration do not belong together.
    """
    out = Path(out)
    for name, value, known in (("form", form, FORMATS), ("weights", weights, SECTIONS), ("dtype", dtype, DTYPES)):
        if value not in known and not (name == "dtype" and value is None):
            raise UserError(f"{name}={value!r}: must be one of {', '.join(known)}")
    if quantize is not None and quantize not in METHODS:
        raise UserError(f"quantize={quantize!r}: must be one of {', '.join(METHODS)}")
    if quantize is not None and form == "public":
        raise UserError(f"quantize={quantize!r}: the public code reads no scales; use format 'standalone'")
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
    reader.verify(section)  # the optimizer's files are left alone
    config = _read_config(reader)
    merged = MergedWeights(reader)
    _check_fit(merged, section, config.model)
    if form == "standalone" and config.stage.streams == "joint" and STATISTICS_FILE not in reader.manifest["files"]:
        raise UserError(
            f"checkpoint {reader.path}: has no {STATISTICS_FILE}, without which its actions mean nothing; put the"
            f" shards' {STATISTICS_FILE} into the checkpoint when it is written, or beside weights that are imported"
        )
    dtype = dtype or ("stored" if "imported" in reader.state else "bf16")
    source = ExportTensors(merged, section, dtype=DTYPES[dtype], method=quantize)
    distilled = distilled or reader.state.get("distilled") is True
    writer = _Export(reader, source, config, form=form, weights=weights, distilled=distilled, file_bytes=file_bytes)
    with new_folder(out, durable=True) as folder:
        summary = writer.write(folder)
    return {"out": str(out), **summary}


def sampler_settings(config: Config, *, distilled: bool) -> dict[str, Any]:
    """The settings of sampler.json.

    Guidance is 5 as published; 1 (none) for a model that was distilled or never saw the null form (*ours*). Its
    negative branch is what dropped contexts became in training: zeros, or the empty prompt, as for imported weights.
    """
    stage = config.stage
    null_known = stage.cfg_dropout > 0 or stage.conditions.get("null2v", 0) > 0
    empty_prompt = stage.cfg_dropout > 0 and stage.cfg_dropout_form == "empty_prompt"
    return {
        "schedule": "distilled" if distilled else "shifted",
        "steps": len(schedule.DISTILLED_TIMES) if distilled else 10,
        "guidance": 5.0 if null_known and not distilled else 1.0,
        "action_shift": schedule.DISTILLED_SHIFT if distilled else stage.action_shift,
        "negative_prompt": "" if empty_prompt else None,
        "renoise": "fresh",
        "timestep_dtype": "float32",
    }


class _Export:
    """One export being written."""

    def __init__(
        self,
        reader: CheckpointReader,
        source: ExportTensors,
        config: Config,
        *,
        form: str,
        weights: str,
        distilled: bool,
        file_bytes: int,
    ) -> None:
        self.source, self.config, self.form, self.file_bytes = source, config, form, file_bytes
        self.distilled, self.reader = distilled, reader
        known = STATISTICS_FILE in self.reader.manifest["files"]
        self.statistics = self.reader.text(STATISTICS_FILE) if known else None
        if known and form == "public":
            public = public_statistics(json.loads(self.statistics), config.data.window)
            self.statistics = json.dumps(public, indent=1, sort_keys=True, allow_nan=False) + "\n"
        several = form == "standalone" and ROBOTS_FILE in self.reader.manifest["files"]
        self.robots = self.reader.text(ROBOTS_FILE) if several else None
        keys = to_public(source.names, stream_prefix=form == "standalone" or config.model.action is not None)
        self.tensors: dict[str, Stored] = {keys.get(name, name): info for name, info in source.stored().items()}
        self.described = self._describe(weights)

    def _describe(self, weights: str) -> dict[str, Any]:
        """Content of config.json, but for what is known when the weights are written."""
        reader, method, names = self.reader, self.source.method, self.source.names
        kept = {self.source.dtype_of(name) for name in names}
        described = {
            "format": FORMATS[self.form],
            "weights": weights,
            "dtype": "bf16" if kept == {torch.bfloat16} else "fp32",
            "step": reader.step,
            "distilled": self.distilled,
            "imported": reader.state.get("imported"),
            "encoders": reader.state.get("encoders"),
            "robot": reader.state.get("robot"),
            "robots_sha256": None if self.robots is None else _sha256(self.robots),
            "checkpoint_sha256": reader.manifest["sha256"],
            "small_tensors_sha256": self._small_tensors(),
            "statistics_sha256": None if self.statistics is None else _sha256(self.statistics),
            "quantization": None if method is None else {"method": method, "layers": sum(map(is_large, names))},
            "versions": {
                "trained": reader.manifest.get("versions", {}),
                "exported": {part.__name__: part.__version__ for part in (kairos_train, torch, safetensors)},
            },
            "run": dataclasses.asdict(self.config),
        }
        if self.form == "public":
            described["dit_config"], missing = public_config(self.config.model)
            if missing:
                described["dit_config_missing"] = missing
        table = {name: (CODES[info.dtype], info.shape) for name, info in self.tensors.items()}
        described["fingerprint"] = fingerprint(described, table)
        return described

    def _small_tensors(self) -> str:
        """SHA-256 of the norms, biases and modulations: whose weights these are, by whatever layout they were saved."""
        digest = hashlib.sha256()
        for name in self.source.names:
            if prod(self.source.shape(name)) <= SMALL:
                digest.update(name.encode())
                digest.update(self.source.read(name).reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def write(self, folder: Path) -> dict[str, Any]:
        """Write every file of the export, the weights read back and compared; returns its summary."""
        described = self.described
        model = json.dumps(described["run"]["model"], sort_keys=True)
        metadata = {"format": "pt", "fingerprint": described["fingerprint"], "model_config": model}
        megabytes = sum(tensor.nbytes for tensor in self.tensors.values()) / 1e6
        with progress("export and read back", 2 * megabytes, "MB") as advance:
            tensors = counted(self.tensors, advance)
            files = self._write_weights(folder, metadata, tensors)
            written = WrittenTensors([folder / name for name in files], self.source.method)
            written.compare(tensors)
        summary = self._summarize(files)
        if self.source.method is not None:
            described["quantization_error"] = self._error(written)
            summary |= {key: described[key] for key in ("quantization", "quantization_error")}
        settings = sampler_settings(self.config, distilled=self.distilled)
        write_json(folder / CONFIG_FILE, described, durable=True)
        write_json(folder / SAMPLER_FILE, settings | {"fingerprint": described["fingerprint"]}, durable=True)
        if described.get("dit_config") is not None:
            text = self.config.encoders.text
            content = public_pipeline(described["dit_config"], weights=PUBLIC_FILE, text=text, sampler=settings)
            write_whole(folder / PUBLIC_CONFIG_FILE, content, durable=True)
        if self.statistics is not None:
            write_whole(folder / STATISTICS_FILE, self.statistics, durable=True)
        if self.robots is not None:
            write_whole(folder / ROBOTS_FILE, self.robots, durable=True)
        statistics = None if self.statistics is None else json.loads(self.statistics)
        write_whole(folder / "README.md", model_card(described, summary, statistics, settings), durable=True)
        others = [path for path in folder.iterdir() if path.name not in files]
        contents = {**files, **{path.name: describe_file(path) for path in others}}
        write_json(folder / MANIFEST_FILE, {"format": described["format"], "files": contents}, durable=True)
        return summary

    def _write_weights(
        self, folder: Path, metadata: dict[str, str], tensors: dict[str, Stored]
    ) -> dict[str, dict[str, Any]]:
        """Write the weights; returns size and digest by file."""
        if self.form == "public":
            groups = {PUBLIC_FILE: tensors}
        else:
            parts = list(split_by_size(tensors, self.file_bytes))
            groups = {f"model-{n:05d}-of-{len(parts):05d}.safetensors": part for n, part in enumerate(parts, 1)}
            weight_map = {key: name for name, part in groups.items() for key in part}
            total = sum(tensor.nbytes for tensor in self.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(folder / INDEX_FILE, index, durable=True)
        return {name: write_tensors(folder / name, part, metadata) for name, part in groups.items()}

    def _summarize(self, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
        source, described = self.source, self.described
        on_disk = sum(info["bytes"] for info in files.values())
        shapes = public_keys(self.config.model)
        computed = computed_bytes(shapes, lambda name: source.dtype_of(name).itemsize, source.method)
        return {
            "format": described["format"],
            "weights": described["weights"],
            "dtype": described["dtype"],
            "step": described["step"],
            "tensors": len(self.tensors),
            "parameters": sum(prod(shape) for shape in shapes.values()),
            "files": len(files),
            "bytes": on_disk,
            "header_bytes": on_disk - sum(tensor.nbytes for tensor in self.tensors.values()),
            "computed_bytes": computed,
            "fingerprint": described["fingerprint"],
            **({"sha256": files[PUBLIC_FILE]["sha256"]} if self.form == "public" else {}),
        }

    def _error(self, written: WrittenTensors) -> dict[str, Any]:
        """What quantisation does to the outputs, for config.json; the weights as a loaded export has them."""
        source = self.source
        errors = output_error(self.config.model, source.read, lambda name: written.weight(name, source.shape(name)))
        return {"relative_l2": errors, "against": self.described["dtype"]}


def _read_config(reader: CheckpointReader) -> Config:
    """The run's resolved configuration, its model the one that the checkpoint holds."""
    from kairos_train.config.compose import load_saved  # needs hydra, which reading an export does not

    reader.text("config.yaml")  # it is recorded, and its hash was compared
    # Imported weights have no shards, and need not be ones that a stage would train.
    config = load_saved(reader.path / "config.yaml", sections=("model", "encoders"))
    return dataclasses.replace(config, model=stage_model(config))


def _check_fit(reader: MergedWeights, section: str, config: ModelConfig) -> None:
    """Names and shapes of a section against the model that the configuration describes."""
    found = {name: reader.shape(section, name) for name in reader.names(section)}
    refuse_larger(config, found, f"checkpoint {reader.path}: config.yaml")
    expected = public_keys(config)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            stored, by_config = (list(s[name]) if name in s else "none" for s in (found, expected))
            raise UserError(
                f"checkpoint {reader.path}: {section}/{name} has shape {stored}, by config.yaml (model {config.name!r})"
                f" {by_config}; weights and configuration do not belong together"
            )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
