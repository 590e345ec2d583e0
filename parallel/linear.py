"""Linear layers whose features tensor ranks split: torch's layer where there is one rank, else Megatron's.

All have the parameters `weight` (out, in) and `bias` (out,), this rank's shards of them, not initialised.
"""

from __future__ import annotations

import warnings
from types import ModuleType

from torch import nn

from parallel.topology import Topology

TOKENS = -2
"""Dimension of the tokens of a frame in activations (B, F, L, D)."""


def column_linear(in_features: int, out_features: int, *, bias: bool, topology: Topology) -> nn.Module:
    """Output features split: x (…, in), whole on every rank, → (…, out/ranks).

    The layer communicates nothing, forward or backward: the caller enters by `parallel.collectives.copy_to` or
    `gather_tokens`, once for all layers that read the same x.

    Raises:
        ValueError: the output features do not divide.
    """
    if topology.tensor_group is None:
        return nn.Linear(in_features, out_features, bias=bias)
    _check(out_features, topology)
    return _megatron().ColumnLinear(in_features, out_features, bias=bias, group=topology.tensor_group)


def row_linear(in_features: int, out_features: int, *, bias: bool, topology: Topology, sequence: bool) -> nn.Module:
    """Input features split: (…, in/ranks) → (…, out), sums over all ranks with the whole bias added once.

    With `sequence` each rank gets the sums of its tokens of each frame: (B, F, L, in/ranks) → (B, F, L/ranks, out). The
    bias then meets the local tokens only, and its gradient has to be summed over the group (`replicated_partial`).

    Raises:
        ValueError: the input features do not divide; at the call, with `sequence`: the tokens do not.
    """
    if topology.tensor_group is None:
        return nn.Linear(in_features, out_features, bias=bias)
    _check(in_features, topology)
    tokens = TOKENS if sequence else None
    group = topology.tensor_group
    return _megatron().RowLinear(in_features, out_features, bias=bias, group=group, tokens_dim=tokens)


def _check(features: int, topology: Topology) -> None:
    if features % topology.degrees.tensor:
        raise ValueError(f"{features} features do not divide over {topology.degrees.tensor} tensor ranks")


def _megatron() -> ModuleType:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        from parallel import megatron_linear
    return megatron_linear
