"""Optimisers: which parameters decay, the learning rate of a step, float32 masters where DeepSpeed keeps none."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kairos_train.basics.errors import UserError
from kairos_train.config.schema import OptimizerConfig

NEVER_DECAYED = ("bias", "A_log", "dt_bias", "modulation")  # last part of a parameter's name


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to norms, biases, `A_log`, `dt_bias` and modulations (*ours*).

    Weight decay pulls towards zero, which is no neutral value for a gain, a decay rate or a modulation.

    Args:
        name: the parameter's public name.
        parameter: with its full shape; vectors and scalars never decay.
    """
    *modules, last = name.split(".")
    return parameter.ndim >= 2 and last not in NEVER_DECAYED and not any("norm" in part for part in modules)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in at most two groups, with and without decay, each in the model's order.

    Raises:
        UserError: nothing is trainable.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise UserError("stage: every parameter is frozen; train at least one stream")
    groups = [
        {"params": [p for name, p in trainable if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if not decays(name, p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig, *, masters: bool) -> torch.optim.Optimizer:
    """The optimiser over `groups`; with `masters` it keeps float32 copies of low-precision parameters itself.

    Raises:
        UserError: an optimiser that does not exist.
    """
    if config.name == "adamw":
        kind = MasterAdamW if masters else torch.optim.AdamW
        return kind(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps)
    if config.name == "sgd":
        return (MasterSGD if masters else torch.optim.SGD)(groups, lr=config.lr)
    raise UserError(f"optimizer.name={config.name!r}: must be 'adamw' or 'sgd'")


class Masters(torch.optim.Optimizer):
    """Float32 masters of bfloat16 parameters: a mixin before an optimiser, for ZeRO stage 0.

    DeepSpeed's own stage 0 wrapper accumulates gradients in bfloat16 and refuses float32. With this class each
    parameter's `.grad` is float32 (`Tensor.grad_dtype`), and the optimiser updates the masters.

    Costs per parameter, on every process: 2 bytes of weight, 4 of gradient, 4 of master, and 8 of AdamW's moments.
    """

    def __init__(self, groups: list[dict[str, Any]], **kwargs: Any) -> None:
        self.low_precision: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.masters: list[Tensor] = []
        of_masters = []
        for group in groups:
            masters = [p.detach().float().clone().requires_grad_() for p in group["params"]]
            self.masters += masters
            of_masters.append({**group, "params": masters})
        for p in self.low_precision:
            p.grad_dtype = torch.float32
        super().__init__(of_masters, **kwargs)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the masters from the parameters' gradients, then the parameters from the masters."""
        for low, master in zip(self.low_precision, self.masters):
            master.grad = low.grad
        super().step(closure)
        for master in self.masters:
            master.grad = None
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters into the parameters."""
        for low, master in zip(self.low_precision, self.masters):
            low.copy_(master)


class MasterAdamW(Masters, torch.optim.AdamW):
    """AdamW on masters."""


class MasterSGD(Masters, torch.optim.SGD):
    """Plain gradient descent on masters, to compare parallel layouts: AdamW's division would enlarge their rounding."""


def lr_at(step: int, config: OptimizerConfig, total_steps: float) -> float:
    """Learning rate of the update that follows `step` finished ones.

    Linear warm-up: lr·(step+1)/warmup_steps, up to lr at the `warmup_steps`-th update. Then constant, or a half cosine
    that ends at lr·min_lr_ratio with the last update. A function of the counter alone: a resumed run restores nothing.

    Raises:
        UserError: a schedule that does not exist.
    """
    if config.schedule not in ("constant", "cosine"):
        raise UserError(f"optimizer.schedule={config.schedule!r}: must be 'constant' or 'cosine'")
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step + 1 - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate `lr`; the groups of DeepSpeed's wrappers are these same objects."""
    for group in optimizer.param_groups:
        group["lr"] = lr
