"""fla's kernels under Triton's interpreter, on a CPU: how far they depart from the rule in plain torch in float64.

    TRITON_INTERPRET=1 python -m support.fla_interpreter        with fla and Triton on the path; prints one JSON line

The interpreter takes float32 (its bfloat16 is wrong by itself). Errors are relative: L2 norms, of shards the largest
element. Shapes: B batch, T tokens, H heads, K key width, V value width.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from support.pool import Pool
from support.state_passing_ranks import NAMES, Case, departures
from torch import Tensor

from kairos_train.model.kernels import fla_hopper
from kairos_train.model.kernels.delta_rule import gated_delta_rule

CASES = {
    "two chunks, the second ragged, batch 2": (2, 70, 2, 16, 16),
    "whole chunks, batch 2": (2, 128, 2, 16, 16),
    "values three times as wide as keys": (2, 64, 2, 16, 48),
    "one token": (2, 1, 2, 16, 16),
    "widths that are no powers of two": (1, 33, 3, 6, 5),
}
"""B, T, H, K, V."""

SHARDS = Case((70, 9), "slow", "all_gather", batch=2, dtype=torch.float32, backend="fla")


def main() -> None:
    found = {}
    for kernels in ("fla", "replaced"):
        prepare(replaced=kernels == "replaced")
        with mock.patch.object(fla_hopper, "chunk_gradients", wraps=fla_hopper.chunk_gradients) as replacement:
            errors: dict[str, Any] = {name: kernel_departures(*sizes) for name, sizes in CASES.items()}
        pool = Pool(2)
        errors["two shards"] = pool.run(shard_departures, kernels == "replaced")
        pool.close()
        found[kernels] = {"calls": replacement.call_count, "errors": errors}
    print(json.dumps(found))


def prepare(*, replaced: bool) -> None:
    """Let fla's kernels run in this process, with our step for Hopper GPUs among them or without."""
    from triton.runtime.autotuner import Autotuner

    # There is nothing to time, and no driver to do it.
    Autotuner._bench = lambda *args, **options: [1.0] * 3
    torch.cuda.get_device_capability = lambda *args: (9, 0)
    fla_hopper.miscompiled = lambda capability, triton: replaced
    fla_hopper.replace_miscompiled_kernel.cache_clear()


def kernel_departures(batch: int, tokens: int, heads: int, keys: int, values: int) -> dict[str, float]:
    """Outputs, state and six gradients by name."""
    generator = torch.Generator().manual_seed(tokens)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k = (torch.nn.functional.normalize(randn(batch, tokens, heads, keys), dim=-1) for _ in range(2))
    g = -0.1 * torch.rand(batch, tokens, heads, generator=generator)
    beta = torch.rand(batch, tokens, heads, generator=generator)
    state = randn(batch, heads, keys, values)
    inputs = (q, k, randn(batch, tokens, heads, values), g, beta, state)
    cotangents = randn(batch, tokens, heads, values), randn(batch, heads, keys, values)

    def run(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        results = gated_delta_rule(*leaves, backend=backend)
        return *results, *torch.autograd.grad(results, leaves, [x.to(dtype) for x in cotangents])

    names = ("output", "state", *(f"gradient of {name}" for name in NAMES))
    pairs = zip(names, run(torch.float32, "fla"), run(torch.float64, "torch"), strict=True)
    return {name: float((got - want).norm() / want.norm()) for name, got, want in pairs}


def shard_departures(replaced: bool) -> list[dict[str, float]]:
    """On a rank: of fla's kernels over its shard from the whole sequence in plain torch, for each way of exchange."""
    prepare(replaced=replaced)
    return [departures(replace(SHARDS, method=method)) for method in ("serial", "ring", "all_gather")]


if __name__ == "__main__":
    main()
