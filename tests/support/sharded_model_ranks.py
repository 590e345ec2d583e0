"""One rank of the sharded-model tests: the same numbers computed whole and in a layout, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from support.model_factory import make_config, make_inputs, make_model
from torch import Tensor

from kairos_train.config.schema import Config, StageConfig
from kairos_train.model import WorldActionModel
from kairos_train.model.layout import empty_model, model_table
from parallel.config import ParallelConfig
from parallel.gradient_sync import sum_partial_gradients
from parallel.topology import Degrees, Topology


@dataclass(frozen=True)
class Case:
    """A layout and what is computed in it. What is left of the world is data-parallel, one sample after the other."""

    tensor: int = 1
    context: int = 1
    sequence: bool = False
    frames: int = 5
    history: tuple[int, ...] = (1, 2)
    streams: str = "joint"
    recompute: str = "none"
    frame_layout: str = "auto"
    state_exchange: str = "auto"
    actions: bool = True
    video: tuple[tuple[str, Any], ...] = field(default=())

    def config(self) -> Config:
        config = Config(model=make_config(**dict(self.video)), stage=StageConfig(streams=self.streams))
        config.parallel = ParallelConfig(
            self.tensor, self.context, self.sequence, self.state_exchange, self.frame_layout
        )
        config.train.recompute = self.recompute
        return config


UNSHARDED = ("frames", "history", "streams", "actions", "video")
"""What of a case the whole model knows."""


@cache
def topology(tensor: int, context: int) -> Topology:
    size = dist.get_world_size()
    return Topology.build(Degrees(tensor, context, size // tensor // context), torch.device("cpu"))


def shard(whole: WorldActionModel, config: Config, place: Topology) -> WorldActionModel:
    """`whole`'s weights in the layout."""
    model = empty_model(config, place).to_empty(device="cpu").double()
    table, values = model_table(config, model), dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name][table.slices(name, values[name].shape, place.tensor_rank)])
    sum_partial_gradients(model, table, place)
    return model


def loss_of(model: WorldActionModel, inputs: dict[str, Any], samples: list[int], context: int) -> Tensor:
    """A loss in which every output counts differently; this rank's share of it, of some samples."""
    mine = {k: [v[i] for i in samples] if k == "history_frames" else v[samples] for k, v in inputs.items()}
    frames = model.local_frames(inputs["latents"].shape[2])
    output = model(**mine)
    target = noise_like(inputs["latents"], 1)[samples][:, :, frames.start : frames.stop]
    loss = (output.video - target).pow(2).sum()
    if "action" in inputs:
        loss = loss + (output.action - noise_like(inputs["action"], 2)[samples]).pow(2).sum() / context
    elif output.action is not None:
        loss = loss + 0.0 * output.action.sum()
    return loss


def noise_like(x: Tensor, seed: int) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


@cache
def computed_whole(case: Case) -> tuple[WorldActionModel, dict[str, Any], Tensor]:
    """The whole model with its gradients, what it was given and its loss; the same for all layouts of a case."""
    config = case.config().model
    whole = make_model(replace(config, action=config.action if case.streams == "joint" else None))
    inputs = make_inputs(case.frames, case.history, actions=case.actions and case.streams == "joint")
    loss = loss_of(whole, inputs, list(range(len(case.history))), 1)
    loss.backward()
    return whole, inputs, loss.detach()


def deviations(case: Case) -> dict[str, float]:
    """Relative deviation of the loss and of every gradient from the whole model's, worst over tensor slices here."""
    config, place = case.config(), topology(case.tensor, case.context)
    whole, inputs, expected = computed_whole(Case(**{name: getattr(case, name) for name in UNSHARDED}))
    model = shard(whole, config, place)
    samples = list(range(place.data_rank, len(case.history), place.degrees.data))
    loss = loss_of(model, inputs, samples, case.context)
    loss.backward()
    parts = [loss.detach(), *(p.grad for p in model.parameters())]
    flat = torch.cat([part.flatten() for part in parts])
    if place.gradient_group is not None:
        dist.all_reduce(flat, group=place.gradient_group)
    summed = [x.view_as(part) for x, part in zip(flat.split([part.numel() for part in parts]), parts)]
    total, gradients = summed[0], dict(zip((name for name, _ in model.named_parameters()), summed[1:]))

    table, out = model_table(config, model), {"loss": abs(float(total / expected) - 1)}
    largest = max(float(p.grad.abs().max()) for p in whole.parameters())
    for name, p in whole.named_parameters():
        want = p.grad[table.slices(name, p.shape, place.tensor_rank)]
        scale = max(float(p.grad.abs().max()), 1e-6 * largest)
        out[name] = float((gradients[name] - want).abs().max()) / scale
    return out


def run_cases(cases: list[Case]) -> list[dict[str, float]]:
    return [deviations(case) for case in cases]


def cached_mode(case: Case) -> float:
    """Worst deviation of actions computed from a history cache that the layout encoded."""
    config, place = case.config(), topology(case.tensor, case.context)
    whole = make_model(config.model).eval()
    model = shard(whole, config, place).eval()
    inputs = make_inputs(case.frames, (case.frames,) * 2)
    text = [inputs["context"], inputs["context_mask"]]
    actions = [inputs["action"], inputs["action_timestep"], *text]
    rest = {"state": inputs["state"], "action_mask": inputs["action_mask"]}
    with torch.no_grad():
        outputs = [
            m.forward_action(m.encode_history(inputs["latents"], *text, state=inputs["state"]), *actions, **rest)
            for m in (whole, model)
        ]
    return float((outputs[0] - outputs[1]).abs().max())
