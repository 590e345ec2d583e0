"""What FP8 layers do more than once, in numbers: halos are scaled on their own, weights are rounded in every use.

A projection of a Gated DeltaNet layer at full width, by recipe `emulated` on a CPU, on normed tokens whose channels
differ in size as those of trained models do. Printed:

  halo      error of the three tokens that a context rank projects for its convolutions, with a scale of their own and
            with that of the shard that they come from; and how far the convolution's first outputs are then apart
  weights   seconds to round the weight beside those of the whole layer, forward and backward

    python benchmarks/fp8_rounding.py [--tokens 1560 4680] [--repeats 3] [--quick]

The last line is one JSON object: machine, `halo_own`, `halo_shared`, `apart`, `seconds_rounding`, `seconds_layer`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kairos_train.model.gated_delta_net import CausalConvolution
from parallel.fp8_emulated import FORWARD, EmulatedFp8Linear, scale_of, to_fp8

HALO = 3


def tokens_of(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Tokens (1, count, dim): LayerNorm of normal numbers, channels scaled log-normally, one in a hundred ten times."""
    channels = torch.randn(dim, generator=generator).mul(0.5).exp()
    channels[torch.rand(dim, generator=generator) < 0.01] *= 10
    return torch.nn.functional.layer_norm(torch.randn(1, count, dim, generator=generator), (dim,)) * channels


@torch.no_grad()
def halo(layer: EmulatedFp8Linear, before: Tensor, after: Tensor) -> dict[str, float]:
    """Errors of the halo's projection, and how far the first outputs of the convolution are apart, both relative L2."""
    exact = before[:, -HALO:].double() @ layer.weight.double().T
    own, shared = layer(before[:, -HALO:]), layer(before)[:, -HALO:]
    convolution = CausalConvolution(layer.out_features, HALO + 1)
    torch.nn.init.uniform_(convolution.weight, -0.5, 0.5, generator=torch.Generator().manual_seed(2))
    local = layer(after[:, :HALO])
    outputs = [convolution(local, given) for given in (own, shared, exact.float())]
    return {
        "halo_own": distance(own, exact),
        "halo_shared": distance(shared, exact),
        "apart": distance(outputs[0], outputs[1]),
    }


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1560, 4680], help="of a rank")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="an eighth of the widths, one repeat")
    args = parser.parse_args()
    dim, width, repeats = (320, 640, 1) if args.quick else (2560, 5120, args.repeats)
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}, 1 thread; float32 {dim} → {width}")

    generator = torch.Generator().manual_seed(0)
    layer = EmulatedFp8Linear(dim, width, bias=False).requires_grad_(False)
    layer.weight.normal_(std=dim**-0.5, generator=generator)
    found: dict[str, Any] = {"machine": platform.machine(), "seconds_rounding": {}, "seconds_layer": {}}
    errors = [halo(layer, *tokens_of(2 * args.tokens[0], dim, generator).chunk(2, dim=1)) for _ in range(repeats)]
    found |= {name: statistics.mean(error[name] for error in errors) for name in errors[0]}
    print(
        f"halo of {HALO} tokens: {found['halo_own']:.2%} off by a scale of its own, {found['halo_shared']:.2%} by that "
        f"of its {args.tokens[0]:,} tokens; the first {HALO} outputs of the convolution {found['apart']:.2%} apart"
    )
    rounding = seconds(lambda: to_fp8(layer.weight, scale_of(layer.weight, FORWARD), FORWARD), repeats)
    layer.requires_grad_(True)
    for count in args.tokens:
        x = tokens_of(count, dim, generator).requires_grad_()
        whole = seconds(lambda x=x: layer(x).sum().backward(), repeats)
        found["seconds_rounding"][count], found["seconds_layer"][count] = rounding, whole
        print(
            f"{count:6,} tokens: weight rounded in {rounding:.3f} s of {whole:.2f} s, {rounding / whole:.1%} of the "
            "layer forward and backward"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
