"""Reading an export folder: weights, configuration, sampler settings and statistics that belong together, or an error.

An export folder holds `model.safetensors`, `config.json` (the resolved run and the encoders' identity), `sampler.json`
and `dataset_stats.json`. The safetensors header repeats the model's configuration, because layer order, windows and
history rules leave no trace in keys and shapes: a config.json from elsewhere is found out by it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from kairos_train.config.schema import Config, ModelConfig, from_dict
from kairos_train.errors import UserError
from kairos_train.inference.sampler import SamplerConfig
from kairos_train.model import WorldActionModel

FORMAT = "kairos-export-1"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
SAMPLER_FILE = "sampler.json"
STATISTICS_FILE = "dataset_stats.json"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Policy:
    """A loaded export.

    Attributes:
        folder: where it came from.
        model: in evaluation mode, without gradients, on `device`.
        config: the run that trained it, resolved.
        sampler: how it is sampled by default.
        statistics: the dataset statistics its actions and state are normalised with; {} without actions.
        encoders: identity of the encoders it was trained with, None when the checkpoint recorded none.
        about: what config.json says beside the run: which weights, dtype, step, versions.
    """

    folder: Path
    model: nn.Module
    config: Config
    sampler: SamplerConfig
    statistics: dict[str, Any]
    encoders: dict[str, Any] | None
    about: dict[str, Any]
    device: torch.device
    dtype: torch.dtype

    @property
    def acts(self) -> bool:
        """Whether the run trained an action stream."""
        return self.config.model.action is not None and self.config.stage.streams == "joint"

    @property
    def horizon(self) -> int:
        """Actions of one chunk, A."""
        window = self.config.data.window
        return (window.frames - 1) * window.action_video_freq_ratio

    @property
    def latent_frames(self) -> int:
        """Latent frames of one window, F = (frames − 1)/4 + 1, history included."""
        return (self.config.data.window.frames - 1) // 4 + 1

    @property
    def history_frames(self) -> int:
        """K, the latent frames that are given; 0 when the stage trained no condition that gives frames."""
        stage = self.config.stage
        return stage.history_frames if any(stage.conditions.get(name, 0) > 0 for name in ("ti2v", "i2v")) else 0


def load(folder: Path, device: str | torch.device = "cpu", dtype: str | None = None) -> Policy:
    """Load an export folder.

    Args:
        folder: written by `kairos-train export`.
        device: where the model goes.
        dtype: "bf16" or "fp32"; None: float32 on a CPU, where bfloat16 is slow, else the file's own precision.

    Raises:
        UserError: a file is missing or damaged, or weights, configuration and sampler do not belong together.
    """
    folder, device = Path(folder), torch.device(device)
    described = read_json(folder, CONFIG_FILE)
    if described.get("format") != FORMAT:
        raise UserError(f"{folder / CONFIG_FILE}: format is {described.get('format')!r}, not {FORMAT!r}; export anew")
    for key in ("run", "distilled", "dtype", "weights"):
        if key not in described:
            raise UserError(f"{folder / CONFIG_FILE}: has no {key!r}; export anew")
    config = from_dict(Config, described["run"])
    name = dtype or ("fp32" if device.type == "cpu" else described["dtype"])
    if name not in DTYPES:
        raise UserError(f"dtype={name!r}: must be one of {', '.join(DTYPES)}")
    sampler = read_sampler(folder, distilled=described["distilled"])
    acts = config.model.action is not None and config.stage.streams == "joint"
    statistics = read_json(folder, STATISTICS_FILE) if acts else {}
    model = load_model(folder / WEIGHTS_FILE, config, device=device, dtype=DTYPES[name])
    about = {k: v for k, v in described.items() if k not in ("run", "encoders")}
    return Policy(
        folder=folder,
        model=model,
        config=config,
        sampler=sampler,
        statistics=statistics,
        encoders=described.get("encoders"),
        about=about,
        device=device,
        dtype=DTYPES[name],
    )


def load_model(file: Path, config: Config, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model of `config` with the weights of `file`, in evaluation mode.

    Raises:
        UserError: the file is missing or damaged, or its keys, shapes or recorded configuration differ from `config`.
    """
    if not file.is_file():
        raise UserError(f"{file}: not found; write an export folder with `kairos-train export`")
    try:
        with safe_open(file, "pt") as weights:
            check_fit(weights, config.model, file)
            # Built without storage and given the file's tensors: no time for initial values, one copy in memory.
            with torch.device("meta"):
                model = WorldActionModel(config.model, config.kernels)
            tensors = {key: weights.get_tensor(key).to(device, dtype) for key in model.state_dict()}
    except SafetensorError as error:
        raise UserError(f"{file}: cannot be read as safetensors ({one_line(error)}); export anew") from error
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def check_fit(weights: Any, model: ModelConfig, file: Path) -> None:
    """Compare an open safetensors file with the model that a configuration describes, by names, shapes and header.

    Raises:
        UserError: names the first key that does not fit, its shape in the file and by the configuration.
    """
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in WorldActionModel(model).state_dict().items()}
    found = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118, not a dict
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            in_file, by_config = (list(s[key]) if key in s else "none" for s in (found, expected))
            raise UserError(
                f"{file}: tensor {key!r} has shape {in_file} in the file and {by_config} by {CONFIG_FILE}"
                f" (run.model, {model.name!r}); weights and configuration do not belong together"
            )
    recorded = (weights.metadata() or {}).get("model_config")
    if recorded is None:
        raise UserError(f"{file}: its header has no model_config; only files of `kairos-train export` load here")
    if difference := _first_difference(json.loads(recorded), dataclasses.asdict(model)):
        name, in_file, by_config = difference
        raise UserError(
            f"{file}: was written for run.model{name}={in_file!r}, {CONFIG_FILE} says {by_config!r};"
            " weights and configuration do not belong together"
        )


def read_sampler(folder: Path, *, distilled: bool) -> SamplerConfig:
    """Sampler settings of an export.

    Raises:
        UserError: unreadable, or a distilled schedule for a model that is not distilled, or the other way round.
    """
    sampler = from_dict(SamplerConfig, read_json(folder, SAMPLER_FILE)).check()
    if (sampler.schedule == "distilled") != distilled:
        raise UserError(
            f"{folder / SAMPLER_FILE}: schedule is {sampler.schedule!r} while {CONFIG_FILE} says distilled={distilled};"
            f" set schedule to {'distilled' if distilled else 'shifted'!r}"
        )
    return sampler


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of an export folder.

    Raises:
        UserError: missing, not JSON, or not an object.
    """
    file = folder / name
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{file}: not found; write an export folder with `kairos-train export`") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: is not JSON ({one_line(error)}); export anew") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds a {type(value).__name__}, must be an object; export anew")
    return value


def _first_difference(found: Any, expected: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Dotted path and both values of the first leaf in which two plain trees differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            if difference := _first_difference(found.get(key), expected.get(key), f"{path}.{key}"):
                return difference
        return None
    return None if found == expected else (path, found, expected)


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks."""
    return " ".join(str(error).split())
