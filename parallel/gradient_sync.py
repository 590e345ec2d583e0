"""Partial gradients of replicated parameters: summed over tensor ranks as they arrive.

A `replicated_partial` parameter (see `parallel.sharding`) is whole on every tensor rank, which applies it to the local
heads or tokens only, so that its gradient is a sum over ranks,

    gradient = Σ_r gradient_r.

DeepSpeed does not take this sum: it averages over the gradient group alone.

A gradient hook on the parameter takes it. The alternative, passing the weight through `copy_to` at each use, would put
the parallel layout into the model's math at every norm, bias and modulation, and sum once per use instead of once per
backward pass. The hook sees what one backward pass adds to the gradient, all uses together, before autograd adds it:

- with gradient accumulation it sums each micro-batch's part, not the running sum again;
- DeepSpeed reads gradients after autograd added them, at every ZeRO stage, so it finds complete ones; hooks belong to
  the parameter itself and survive the partitioning and regathering of its values in stage 3;
- recomputation runs the forward pass again, not the hook; where it makes several backward passes out of one, the hook
  sums their parts one by one.

The sum runs in float32 or wider and returns in the gradient's dtype (bfloat16 for bfloat16 parameters unless their
`grad_dtype` says float32).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from parallel.sharding import ShardingTable
from parallel.topology import Topology


def sum_partial_gradients(model: nn.Module, table: ShardingTable, topology: Topology) -> list[RemovableHandle]:
    """Hook every trainable `replicated_partial` parameter of the model. Once per model, at any time before backward.

    Tensor ranks must run the same layers in the same order, as their sums are collective.

    Returns:
        Handles whose `remove()` removes the hooks; none where there is one tensor rank.
    """
    group = topology.tensor_group
    if group is None:
        return []
    return [
        parameter.register_hook(_summed(group))
        for name, parameter in model.named_parameters()
        if table[name].kind == "replicated_partial" and parameter.requires_grad
    ]


def _summed(group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.to(wide, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.to(gradient.dtype)

    return hook


def gradient_norm(model: nn.Module, topology: Topology) -> Tensor:
    """2-norm of the gradient of the whole model, a float32 scalar or wider, equal on every rank. Collective.

    For gradients that are reduced and complete on every rank (no ZeRO partitions): each parameter counts once, a split
    one by its shards. Parameters have the attributes of `parallel.sharding.set_attributes`.
    """
    counted = [
        p.grad.detach()
        for p in model.parameters()
        if p.grad is not None and (p.tensor_model_parallel or topology.tensor_rank == 0)
    ]
    squares = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) ** 2 for g in counted]
    total = torch.stack(squares).sum() if squares else torch.zeros((), device=topology.device)
    if topology.tensor_group is not None:
        dist.all_reduce(total, group=topology.tensor_group)
    return total.sqrt()
