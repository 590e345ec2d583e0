"""Peak memory of a model's forward and backward pass, as torch's CPU allocator reports it to the profiler."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kairos_train.config.schema import Config
from kairos_train.plan.layout import SampleShape
from kairos_train.training.engine.initial_weights import build_model
from parallel.topology import Topology


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes allocated at once while `run` goes, beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def model_inputs(config: Config, sample: SampleShape, batch: int) -> dict[str, Any]:
    """A micro-batch of `sample`'s shapes."""
    window, time = config.data.window, torch.full((batch,), 500.0)
    inputs: dict[str, Any] = {
        "latents": torch.randn(batch, 16, sample.frames, window.height // 8, window.width // 8),
        "context": torch.randn(batch, sample.context, config.model.text_dim),
        "context_mask": torch.ones(batch, sample.context, dtype=torch.bool),
        "video_timestep": time,
        "history_frames": [sample.history] * batch,
    }
    if sample.actions:
        action = config.model.action
        inputs |= {
            "state": torch.zeros(batch, 1, action.state_dim),
            "action": torch.zeros(batch, sample.actions, action.action_dim),
            "action_timestep": time,
            "action_mask": torch.ones(batch, sample.actions, dtype=torch.bool),
        }
    return inputs


def loss_of(output: tuple[Tensor, Tensor | None]) -> Tensor:
    """A loss of everything that a model gives."""
    return sum(x.float().pow(2).mean() for x in output if x is not None)


def activation_peak(config: Config, sample: SampleShape, batch: int, topology: Topology | None = None) -> int:
    """Peak bytes of forward and backward, gradients not counted: they lie ready, as if from an earlier pass."""
    model = build_model(config, topology=topology or Topology.single(torch.device("cpu")))
    if config.train.precision == "bf16":
        model.bfloat16()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    inputs = model_inputs(config, sample, batch)
    return peak_bytes(lambda: loss_of(model(**inputs)).backward())
