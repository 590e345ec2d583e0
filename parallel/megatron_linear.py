"""Megatron-core's column and row parallel linear layers as plain modules: tensor in, tensor out, `weight` and `bias`.

    column   y_r = x W_rᵀ + b_r          rank r has rows W_r of the weight and b_r of the bias; no communication
    row      y   = Σ_r x_r W_rᵀ + b      rank r has columns W_r of the weight and the whole bias

What differs from Megatron-core 0.16.1:
- These layers read no global state: they take the group as an argument, and do without gradient accumulation fusion,
  which would write to `main_grad`, where DeepSpeed does not look.
- Parameters are allocated on the current device (the meta device too) and not initialised.
- State dicts hold no `_extra_state` beside the parameters.
- The row layer sums by `parallel.collectives`. Megatron's own reduce-scatter works on the first dimension and allocates
  on `torch.cuda.current_device()`, which a machine without CUDA does not have.

Shapes: B batch, F frames, L tokens per frame, l = L/ranks of them, D width, W full hidden width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from parallel.collectives import reduce_from, scatter_sums


def _config(group: dist.ProcessGroup) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=group.size(),
        use_cpu_initialization=True,  # allocates without naming a device
        perform_initialization=False,
        params_dtype=torch.get_default_dtype(),
        gradient_accumulation_fusion=False,
    )


def _unset(weight: Tensor) -> None:
    """The `init_method` that Megatron requires, and does not call with these settings."""
    raise AssertionError("the model initialises its parameters")


class _ShardedLinear(nn.Module):
    """The differences from Megatron-core. It removes the empty `_extra_state` entry of state dicts."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def _forget_extra_state(self) -> None:
        self._load_state_dict_pre_hooks.clear()  # Megatron's only one puts the entry into what is loaded

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (…, in) Wᵀ + b of this rank's shards, before any sum over ranks.

        Megatron's autograd function computes it, for inputs of three dimensions only.
        """
        out = self._forward_impl(
            input=x.reshape(1, -1, x.shape[-1]),
            weight=self.weight,
            bias=bias,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=False,
            sequence_parallel=False,
            grad_output_buffer=None,
            wgrad_deferral_limit=None,
            tp_group=self.tp_group,
        )
        return out.view(*x.shape[:-1], out.shape[-1])


class ColumnLinear(_ShardedLinear, ColumnParallelLinear):
    """A shard of the output features. The caller enters by `copy_to` or `gather_tokens`."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, group: dist.ProcessGroup) -> None:
        super().__init__(
            in_features,
            out_features,
            bias=bias,
            config=_config(group),
            init_method=_unset,
            gather_output=False,
            disable_grad_reduce=True,
            tp_group=group,
        )
        self._forget_extra_state()

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D), whole on every rank → (…, W/ranks)."""
        return self.product(x, self.bias)


class RowLinear(_ShardedLinear, RowParallelLinear):
    """A shard of the input features; it sums the outputs over the group and adds the bias once.

    Args:
        tokens_dim: dimension of the tokens, of which each rank gets the sums of its own (sequence parallelism); None:
            every rank gets all of them.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, group: dist.ProcessGroup, tokens_dim: int | None
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias=bias,
            config=_config(group),
            init_method=_unset,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=group,
        )
        self.tokens_dim = tokens_dim
        self._forget_extra_state()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, F, L, W/ranks) → (B, F, l, D), or (…, W/ranks) → (…, D) without `tokens_dim`."""
        partial = self.product(x, None)
        if self.tokens_dim is None:
            out = reduce_from(partial, self.tp_group)
        else:
            out = scatter_sums(partial, self.tokens_dim, self.tp_group)
        return out if self.bias is None else out + self.bias
