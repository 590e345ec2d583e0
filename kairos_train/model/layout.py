"""The model in a parallel layout: hooks for a topology, and this rank's shard of it on the meta device."""

from __future__ import annotations

from functools import partial

import torch

from kairos_train.basics.errors import UserError
from kairos_train.config.schema import Config, ModelConfig, stage_model
from kairos_train.model.activations import ActivationPolicy
from kairos_train.model.hooks import ModelHooks, single_device
from kairos_train.model.lora import adapter_shapes, add_adapters
from kairos_train.model.public_keys import public_keys
from kairos_train.model.sharding_rules import sharding_table
from kairos_train.model.world_action import WorldActionModel
from parallel.fp8 import Fp8Policy, forward_autocast, require, width_fault
from parallel.sharding import ShardingTable
from parallel.topology import Topology
from parallel.traffic import Traffic


def model_hooks(config: Config, topology: Topology, traffic: Traffic | None = None) -> ModelHooks:
    """The parallel hooks of `config` on this rank: plain torch where nothing is split and no layer is in FP8."""
    split = topology.degrees.tensor > 1 or topology.degrees.context > 1
    if not split and config.precision.fp8.recipe is None:
        return single_device()
    from parallel.hooks import action_hooks, video_hooks

    fp8 = Fp8Policy(config.precision.fp8, config.model.num_layers)
    return ModelHooks(
        video=video_hooks(topology, config.parallel, fp8, traffic),
        action=action_hooks(topology, config.parallel, fp8),
        autocast=partial(forward_autocast, fp8, topology.tensor_group),
    )


def empty_model(config: Config, topology: Topology, traffic: Traffic | None = None) -> WorldActionModel:
    """This rank's shard of the model that a stage trains, without storage (meta device)."""
    with torch.device("meta"):
        model = WorldActionModel(
            stage_model(config),
            config.kernels,
            hooks=model_hooks(config, topology, traffic),
            activations=ActivationPolicy(config.train.recompute, config.train.offload_activations),
        )
    if config.stage.lora.rank is not None:
        add_adapters(model, config.stage.lora)
    return model


def model_table(config: Config, model: WorldActionModel) -> ShardingTable:
    """How tensor ranks shard the parameters of `config`'s model."""
    names = [name for name, _ in model.named_parameters()]
    return sharding_table(tensor=config.parallel.tensor, sequence=config.parallel.sequence, names=names)


def full_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape in the unsharded model that a stage trains."""
    with torch.device("meta"):
        model = WorldActionModel(stage_model(config), config.kernels)
    if config.stage.lora.rank is not None:
        add_adapters(model, config.stage.lora)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_layers(config: Config, *, on_this_machine: bool = True) -> None:
    """Raise UserError if this machine or layout cannot do `precision.fp8` or `stage.lora`, before taking any device.

    Args:
        on_this_machine: False leaves out what another machine may have: the run starts there.
    """
    policy = Fp8Policy(config.precision.fp8, config.model.num_layers)
    check_widths(policy, stage_model(config), config.parallel.tensor)
    if on_this_machine:
        require(policy, recompute=config.train.recompute, context=config.parallel.context)
    if config.stage.lora.rank is not None:
        adapter_shapes(public_keys(stage_model(config)), config.stage.lora)


def check_widths(policy: Fp8Policy, model: ModelConfig, tensor: int) -> None:
    """Raise UserError for the first width that the recipe cannot take on one of `tensor` ranks. Allocates nothing."""
    for layer in range(model.num_layers):
        widths = []
        if policy.applies("video", layer):
            video = model.video
            widths += [video.dim, video.dim // tensor, video.ffn_dim // tensor]
            if video.layer_cycle[layer % len(video.layer_cycle)] == "GATED":
                widths += [model.num_heads // tensor * width for width in (video.gdn_key_dim, video.gdn_value_dim)]
        if model.action is not None and policy.applies("action", layer):
            widths += [model.action.dim, model.video.dim // tensor, model.action.ffn_dim // tensor]
        for width in widths:
            if fault := width_fault(policy, width):
                raise UserError(fault)
