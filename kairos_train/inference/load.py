"""Reading an export folder: weights, configuration, sampler settings and statistics that belong together, or an error.

What an export folder holds, and how its files are held to each other: `kairos_train.inference.export_files`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from kairos_train.basics.errors import UserError
from kairos_train.basics.files import read_json, sha256_of
from kairos_train.basics.geometry import latent_frames
from kairos_train.basics.log import logger
from kairos_train.basics.plain import from_dict
from kairos_train.config.schema import Config
from kairos_train.config.validate import validate_model
from kairos_train.inference.export_files import (
    CONFIG_FILE,
    EXPORT,
    INDEX_FILE,
    MANIFEST_FILE,
    SAMPLER_FILE,
    STATISTICS_FILE,
    check_bytes,
    check_fingerprint,
    check_fit,
    read_described,
    read_header,
    read_index,
)
from kairos_train.inference.quantized import METHODS, replace_large
from kairos_train.inference.robots import ROBOTS_FILE, Robot, named, robots_in
from kairos_train.inference.sampler import SamplerConfig
from kairos_train.model import WorldActionModel
from kairos_train.model.public_keys import refuse_larger

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
        robots: of a run of several; `config.data.window`, `statistics` and the sizes are then those of `robot`.
        robot: the one that it is loaded for; None of a run that had one alone.
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
    robots: list[Robot] = field(default_factory=list)
    robot: Robot | None = None

    @property
    def action_dim(self) -> int:
        """Dimensions of its robot's actions; the model's may be more."""
        return self.config.model.action.action_dim if self.robot is None else self.robot.action_dim

    @property
    def state_dim(self) -> int:
        """Dimensions of its robot's state; the model's may be more."""
        return self.config.model.action.state_dim if self.robot is None else self.robot.state_dim

    @property
    def acts(self) -> bool:
        """Whether the run trained an action stream."""
        return self.config.model.action is not None and self.config.stage.streams == "joint"

    @property
    def cameras(self) -> tuple[str, ...]:
        """The robot's camera keys in the order of the frames' parts; empty where the checkpoint recorded none."""
        return _cameras(self.config, self.about)

    @property
    def horizon(self) -> int:
        """Actions of one chunk, A."""
        window = self.config.data.window
        return (window.frames - 1) * window.action_video_freq_ratio

    @property
    def latent_frames(self) -> int:
        """Latent frames of one window, F = (frames − 1)/4 + 1, history included."""
        return latent_frames(self.config.data.window.frames)

    @property
    def history_frames(self) -> int:
        """K, the latent frames that are given; 0 when the stage trained no condition that gives frames."""
        stage = self.config.stage
        return stage.history_frames if any(stage.conditions.get(name, 0) > 0 for name in ("ti2v", "i2v")) else 0


def load(
    folder: Path,
    device: str | torch.device = "cpu",
    dtype: str | None = None,
    *,
    robot: str | None = None,
    verify: bool = True,
) -> Policy:
    """Load an export folder.

    Args:
        folder: written by `kairos-train export`.
        device: where the model goes.
        dtype: "bf16" or "fp32"; None: float32 on a CPU, where bfloat16 is slow, else the file's own precision.
        robot: name of one of several that it was trained on; None: the run's own, its first.
        verify: compare the SHA-256 of every file that is read with `manifest.json`, which is reported where it is left
            out: damaged weights are loaded then.

    Raises:
        UserError: a file is missing, damaged or not the one that was exported; weights, configuration and sampler do
            not belong together, or there is no such robot.
    """
    folder, device = Path(folder), torch.device(device)
    described = read_described(folder)
    config = from_dict(Config, described["run"])
    name = dtype or ("fp32" if device.type == "cpu" else described["dtype"])
    if name not in DTYPES:
        raise UserError(f"dtype={name!r}: must be one of {', '.join(DTYPES)}")
    acts = config.model.action is not None and config.stage.streams == "joint"
    if verify:
        files = {CONFIG_FILE, SAMPLER_FILE, INDEX_FILE, *read_index(folder).values()}
        files |= {STATISTICS_FILE} if acts else set()
        check_bytes(folder, files | ({ROBOTS_FILE} if acts and described.get("robots_sha256") else set()))
    else:
        logger.warning(f"{folder}: verify=False: its files are not compared with {MANIFEST_FILE}")
    sampler = read_sampler(folder, described)
    trained, configured = _cameras(config, described), _cameras(config, {})
    if configured and trained != configured:
        raise UserError(
            f"{folder / CONFIG_FILE}: robot.cameras is {','.join(trained)}, run.data.window.cameras "
            f"{','.join(configured)}; which order was trained is not known: train again with the cameras of "
            "the shards"
        )
    statistics = read_statistics(folder, described) if acts else {}
    model = load_model(folder, config, described, device=device, dtype=DTYPES[name])
    about = {k: v for k, v in described.items() if k not in ("run", "encoders")}
    robots = read_robots(folder, described) if acts else []
    policy = Policy(
        folder=folder,
        model=model,
        config=config,
        sampler=sampler,
        statistics=statistics,
        encoders=described.get("encoders"),
        about=about,
        device=device,
        dtype=DTYPES[name],
        robots=robots,
    )
    return for_robot(policy, named(robots, robot, str(folder))) if robots or robot is not None else policy


def for_robot(policy: Policy, robot: Robot) -> Policy:
    """The same model for one of its robots."""
    data, about = policy.config.data, {"fps": robot.fps, "cameras": robot.cameras}
    if robot == policy.robots[0]:
        about = (policy.about.get("robot") or {}) | about
    window = dataclasses.replace(data.window, **robot.window, cameras=list(robot.cameras))
    return dataclasses.replace(
        policy,
        config=dataclasses.replace(policy.config, data=dataclasses.replace(data, window=window)),
        statistics=robot.statistics,
        about=policy.about | {"robot": about},
        robot=robot,
    )


def _cameras(config: Config, described: Mapping[str, Any]) -> tuple[str, ...]:
    """Those that an export says of its robot, else those of its run."""
    configured = config.data.window.cameras
    told = (described.get("robot") or {}).get("cameras")
    return tuple(told or (configured if isinstance(configured, list | tuple) else ()))


def load_model(
    folder: Path, config: Config, described: Mapping[str, Any], *, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """The model of `config` with an export's weights, in evaluation mode; quantised layers stay so.

    Args:
        folder: of the export.
        described: content of its config.json.
        device: where the model goes.
        dtype: of what is not quantised.

    Raises:
        UserError: a file is missing or damaged, or keys, shapes or what the headers record differ from `described`.
    """
    files = [folder / name for name in sorted(set(read_index(folder).values()))]
    tables = {file: read_header(file) for file in files}
    shapes = {key: shape for table in tables.values() for key, (_, shape) in table.tensors.items()}
    refuse_larger(config.model, shapes, f"{folder / CONFIG_FILE}: run")
    validate_model(config)
    # Built without storage and given the files' tensors: no time for initial values, one copy in memory.
    with torch.device("meta"):
        model = WorldActionModel(config.model, config.kernels)
    if described["quantization"] is not None:
        method = described["quantization"].get("method")
        if method not in METHODS:
            raise UserError(f"{folder / CONFIG_FILE}: quantization.method is {method!r}, must be one of {METHODS}")
        model = replace_large(model, method)
    check_fit(folder, tables, model, config.model, described)
    packed = {name for name, _ in model.named_buffers()}  # codes and scales of quantised layers keep their types
    tensors = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            for key in tables[file].tensors:
                tensor = weights.get_tensor(key)
                tensors[key] = tensor.to(device) if key in packed else tensor.to(device, dtype)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def read_sampler(folder: Path, described: Mapping[str, Any]) -> SamplerConfig:
    """Sampler settings of an export.

    Raises:
        UserError: unreadable, of another export, or a distilled schedule for a model that is not distilled, or the
            other way round.
    """
    values, distilled = read_json(folder / SAMPLER_FILE, remedy=EXPORT), described["distilled"]
    whose = values.pop("fingerprint", None)
    sampler = from_dict(SamplerConfig, values)
    if (sampler.schedule == "distilled") != distilled:
        raise UserError(
            f"{folder / SAMPLER_FILE}: schedule is {sampler.schedule!r} while {CONFIG_FILE} says distilled={distilled};"
            f" set schedule to {'distilled' if distilled else 'shifted'!r}"
        )
    check_fingerprint(folder / SAMPLER_FILE, whose, described)
    return sampler.check()


def read_statistics(folder: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """The dataset statistics of an export.

    Raises:
        UserError: unreadable, or not those that it was exported with.
    """
    statistics = read_json(folder / STATISTICS_FILE, remedy=EXPORT)
    digest = sha256_of(folder / STATISTICS_FILE)
    if digest != described.get("statistics_sha256"):
        raise UserError(
            f"{folder / STATISTICS_FILE}: is not the one that was exported (sha256 {digest[:12]}, not"
            f" {str(described.get('statistics_sha256'))[:12]}): actions would be in other units; export again"
        )
    return statistics


def read_robots(folder: Path, described: Mapping[str, Any]) -> list[Robot]:
    """The robots of an export; empty where its run had one alone.

    Raises:
        UserError: unreadable, or not those that it was exported with.
    """
    if described.get("robots_sha256") is None:
        return []
    file = folder / ROBOTS_FILE
    content = read_json(file, remedy=EXPORT)
    if (digest := sha256_of(file)) != described["robots_sha256"]:
        raise UserError(
            f"{file}: is not the one that was exported (sha256 {digest[:12]}, not {described['robots_sha256'][:12]}): "
            "actions would be in other units; export again"
        )
    return robots_in(content, str(file))
