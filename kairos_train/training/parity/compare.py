"""Is a layout the same training as one process? A few optimiser steps of both on the same synthetic samples.

The samples of a step are micro-batches numbered over ranks and accumulation, each a function of (seed, step, number)
alone; every process makes the same tensors of one number. They are as mixed as data is: per-sample conditions and
noise, padded actions, a micro-batch without actions and states, one of single images (fewer frames than context ranks).
Weights are perturbed so that nothing hides: heads that are not zero, decays that remember.

Compared are the losses and the gradient norm of every step, each tensor's gradient after the first (AdamW's first
moment, which is (1 − β₁)·clipped gradient), each tensor's weights after the last.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kairos_train.basics.geometry import LATENT_CHANNELS, latent_frames, latent_sides
from kairos_train.config.schema import Config
from kairos_train.model.initialise import generator
from kairos_train.model.layout import full_shapes, model_table
from kairos_train.objective.flow_matching import ConditionedBatch, FlowMatching
from kairos_train.training.engine.deepspeed_engine import build_engine, start_processes
from kairos_train.training.engine.engine_state import gather_full_state
from kairos_train.training.engine.initial_weights import build_model
from kairos_train.training.engine.optimizer import lr_at
from kairos_train.training.step import train_step
from parallel.config import ParallelConfig
from parallel.sharding import ShardingTable
from parallel.topology import Topology

TEXT_TOKENS, EMPTY_TOKENS = 8, 3
SLACK = 6.0
"""A layout in low precision may be this many times as far from one process as that is from its own float32: it rounds
at other places, partial sums among them. 2.6 times is the most that was seen of gradients."""
ROUNDOFF = 2.0**-9
"""Of bfloat16: a few scalars may agree better by chance."""
SCALARS = ("loss", "video_loss", "action_loss", "grad_norm")


@dataclass(frozen=True)
class Trace:
    """What a few steps did.

    Attributes:
        scalars: (steps, len(SCALARS)) float64.
        gradients, weights: full tensors by name, float32 on the CPU.
    """

    scalars: Tensor
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        sections = {"gradient": self.gradients, "weight": self.weights}
        tensors = {f"{section}/{name}": t for section, named in sections.items() for name, t in named.items()}
        save_file(tensors, path, {"scalars": json.dumps(self.scalars.tolist())})

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read what `save` wrote."""
        sections: dict[str, dict[str, Tensor]] = {"gradient": {}, "weight": {}}
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                section, name = key.split("/", 1)
                sections[section][name] = file.get_tensor(key)
            scalars = torch.tensor(json.loads(file.metadata()["scalars"]), dtype=torch.float64)
        return cls(scalars, sections["gradient"], sections["weight"])


def reference_config(config: Config, ranks: int) -> Config:
    """The same training in one process: all micro-batches one after the other, no ZeRO."""
    data = ranks // config.parallel.tensor // config.parallel.context
    train = replace(config.train, accumulation=config.train.accumulation * data, zero_stage=0, recompute="none")
    return replace(config, parallel=ParallelConfig(), train=replace(train, offload_activations=False))


def exact_config(config: Config, ranks: int) -> Config:
    """`reference_config` in float32."""
    alone = reference_config(config, ranks)
    precision = replace(alone.precision, fp8=replace(alone.precision.fp8, recipe=None))
    return replace(alone, train=replace(alone.train, precision="fp32"), precision=precision)


def run_steps(config: Config, steps: int, topology: Topology | None = None) -> Trace | None:
    """Train `steps` steps in the layout of `config.parallel` over the processes there are. Collective.

    Returns:
        The trace on rank 0, None elsewhere.
    """
    topology = topology or start_processes(config.train.device, config.parallel)
    model = build_model(config, topology=topology)
    table = model_table(config, model)
    perturb(model, table, topology, config.seed)
    shapes = full_shapes(config)
    engine = build_engine(model, config.train, config.optimizer, topology=topology, table=table, full_shapes=shapes)
    objective = FlowMatching(config.stage, seed=config.seed, patch=tuple(config.model.video.patch_size[1:]))
    scalars, gradients = [], {}
    for step in range(steps):
        engine.set_lr(lr_at(step, config.optimizer, steps))
        report = train_step(engine, objective, config.stage, make_batches(config, objective, step, topology))
        scalars.append([getattr(report, name) or 0.0 for name in SCALARS])
        if step == 0 and config.optimizer.name == "adamw":
            sections, _ = gather_full_state(engine)
            gradients = {k: v / (1 - config.optimizer.betas[0]) for k, v in sections.get("exp_avg", {}).items()}
    sections, _ = gather_full_state(engine)
    engine.close()
    if topology.rank:
        return None
    return Trace(torch.tensor(scalars, dtype=torch.float64), gradients, sections["model"])


@torch.no_grad()
def perturb(model: nn.Module, table: ShardingTable, topology: Topology, seed: int) -> None:
    """Weights under which every part of the model matters, equal in every layout."""
    for name, parameter in model.named_parameters():
        shape = torch.Size(table.full_shape(name, parameter.shape))
        part = table.slices(name, shape, topology.tensor_rank)
        noise = torch.empty(shape).normal_(generator=generator(f"parity/{name}", seed))
        if name.endswith(("A_log", "dt_bias")):
            parameter.copy_((noise * 0.5 - 2)[part])
        else:
            parameter.add_(noise[part].to(parameter.device) * (0.02 if parameter.ndim > 1 else 0.1))


def make_batches(config: Config, objective: FlowMatching, step: int, topology: Topology) -> list[ConditionedBatch]:
    """This data rank's micro-batches of a step."""
    ranks = topology.degrees.data
    numbers = [a * ranks + topology.data_rank for a in range(config.train.accumulation)]
    return [make_batch(config, objective, step, number, topology.device) for number in numbers]


def make_batch(
    config: Config, objective: FlowMatching, step: int, number: int, device: torch.device
) -> ConditionedBatch:
    """Micro-batch `number` of a step: of every four, the second has no actions and the fourth is single images.

    Data of images alone (windows or clips of one frame) give nothing else.
    """
    rng = torch.Generator().manual_seed(config.seed + 7919 * step + number)
    joint, alone = config.stage.streams == "joint", 1 in (config.data.window.frames, config.data.clips.most_frames)
    images = alone or number % 4 == 3
    acting = joint and number % 4 in (0, 2)
    samples, window, text = config.train.micro_batch, config.data.window, config.model.text_dim
    frames = 1 if images else latent_frames(window.frames)
    inputs = {
        "latents": torch.randn(
            samples, LATENT_CHANNELS, frames, *latent_sides(window.height, window.width), generator=rng
        ),
        "context": torch.randn(samples, TEXT_TOKENS, text, generator=rng),
        "context_mask": torch.arange(TEXT_TOKENS) < torch.randint(1, TEXT_TOKENS + 1, (samples, 1), generator=rng),
    }
    if acting:
        count, action = (window.frames - 1) * window.action_video_freq_ratio, config.model.action
        valid = torch.randint(0, count + 1, (samples, 1), generator=rng)
        inputs |= {
            "state": torch.randn(samples, 1, action.state_dim, generator=rng),
            "actions": torch.randn(samples, count, action.action_dim, generator=rng),
            "action_mask": torch.arange(count) < valid,
        }
    prompt = torch.Generator().manual_seed(config.seed)
    inputs["empty_context"] = torch.randn(EMPTY_TOKENS, text, generator=prompt)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    keys = [f"{number}-{i}" for i in range(samples)]
    return objective.condition(keys=keys, step=step, **inputs)


# Comparison


@dataclass(frozen=True)
class Deviation:
    """How far one quantity is from the reference's.

    Attributes:
        what: "losses", "gradient norm", "gradients" or "weights".
        first: the first step or tensor, in the model's order, that is beyond its limit; the nearest to it if none is.
        value, allowed: deviation and limit of that one.
    """

    what: str
    value: float
    allowed: float
    first: str

    @property
    def ok(self) -> bool:
        return self.value <= self.allowed  # NaN is not


def compare(expected: Trace, got: Trace, config: Config, *, exact: Trace | None = None) -> list[Deviation]:
    """Relative deviations of losses and norms; of gradients and weights per tensor, relative L2.

    In float32 the limits are 1e-5, and 1e-4 for tensors under AdamW, whose first updates are signs: an element without
    gradient moves by rounding alone. Under SGD weights may be 1e-5 off per element.

    Low precision rounds every activation, in an order that the layout decides, and what that does to a tensor depends
    on the model and its weights. So the limits are measured: `SLACK` times the deviation of the same process from
    float32. Of a gradient it is its own, or the median of all where chance made its own small; of weights the largest,
    as an update's sign may turn in any of them.

    A bias of attention keys adds the same to all scores of a query, which its softmax ignores (but for the norm of the
    keys): its gradient is what rounding leaves. It is held to the layer's gradient, and its weights under AdamW to
    nothing.

    Args:
        exact: the trace of `exact_config`; needed in low precision, and no other.
    """
    assert (exact is not None) == low_precision(config), "low precision, and no other, is held to its own float32"
    weights, off = ("weights", 1e-4), _l2
    if sgd := config.optimizer.name == "sgd":
        weights, off = ("weights", 1e-5), _apart
    quantities: list[tuple[str, float, Callable[[Trace, Trace], dict[str, float]]]] = [
        ("losses", 1e-5, lambda a, b: _scalars(a, b, slice(0, 3))),
        ("gradient norm", 1e-5, lambda a, b: _scalars(a, b, slice(3, 4))),
        *([("gradients", 1e-4, lambda a, b: _l2(a.gradients, b.gradients))] if expected.gradients else []),
        (*weights, lambda a, b: off(*({k: t for k, t in x.weights.items() if sgd or not _cancels(k)} for x in (a, b)))),
    ]
    deviations = []
    for what, least, distances in quantities:
        found = distances(expected, got)
        limits = dict.fromkeys(found, 0.0) if exact is None else _measured(what, distances(exact, expected))
        deviations.append(_worst(what, found, {name: max(limit, least) for name, limit in limits.items()}))
    return deviations


def low_precision(config: Config) -> bool:
    """Whether activations are rounded to less than float32."""
    return config.train.precision == "bf16" or config.precision.fp8.recipe is not None


def _measured(what: str, own: dict[str, float]) -> dict[str, float]:
    """Limits from the deviations of one process in low precision from its float32."""
    if what == "gradients":
        usual = statistics.median(own.values())
        return {name: SLACK * max(value, usual) for name, value in own.items()}
    largest = max(own.values())
    return dict.fromkeys(own, SLACK * (largest if what == "weights" else max(largest, ROUNDOFF)))


def _scalars(expected: Trace, got: Trace, columns: slice) -> dict[str, float]:
    """Largest relative deviation of some of the scalars, by step."""
    off = (got.scalars - expected.scalars).abs() / expected.scalars.abs().clamp(min=1e-12)
    return {f"step {i}": float(row[columns].max()) for i, row in enumerate(off)}


def _l2(expected: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, float]:
    """|got − expected| / |expected| per tensor; tensors whose sums cancel are held to 1e-3 of the largest, and those
    that a softmax cancels to their layer's weight."""
    norms = {name: float(t.norm()) for name, t in expected.items()}
    floor = 1e-3 * max(norms.values())
    layer = {k: norms.get(k.removesuffix("bias") + "weight", 0.0) for k in norms if _cancels(k)}
    return {k: float((got[k] - t).norm()) / max(norms[k], layer.get(k, 0.0), floor) for k, t in expected.items()}


def _apart(expected: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute deviation of an element, per tensor."""
    return {name: float((got[name] - t).abs().max()) for name, t in expected.items()}


def _cancels(name: str) -> bool:
    """Whether a parameter is a bias before a softmax over what it is added to."""
    return name.endswith("attn.k.bias")


def _worst(what: str, values: dict[str, float], limits: dict[str, float]) -> Deviation:
    beyond = [name for name, value in values.items() if not value <= limits[name]]
    name = beyond[0] if beyond else max(values, key=lambda name: values[name] / limits[name])
    return Deviation(what, values[name], limits[name], name)
