"""What weight-only quantization does to a model's outputs, and what they take on the disk.

For each model and each of int8, fp8 and int4: the relative L2 distance of both streams' outputs to the unquantised
model's, on the random inputs that `kairos-train export --quantize` uses, and bytes by the model's shapes against
bfloat16. Weights are the initial ones; the last layers, which start at zero, are drawn like the other linear layers.

    python benchmarks/quantization.py [--models tiny small kairos_4b] [--layers 32] [--methods int8 fp8 int4] [--quick]

`--layers N` also takes `small` with N layers, 0 does not. kairos_4b takes 14 GB of memory and has not been timed;
--quick takes `tiny`, and `small` with 4 layers. The last line is one JSON object: machine, and by model and method
`video`, `action` (relative L2) and `size_ratio` (bytes over those of bfloat16); `within` says of each method whether
all models stay within its limit of 1 %, 4 % or 12 %. Exit code 1 when one does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time

import torch
from torch import Tensor

from kairos_train.config.compose import load_config
from kairos_train.config.schema import ModelConfig
from kairos_train.inference.quantized import METHODS, dequantize, is_large
from kairos_train.model.initialise import LAST_LAYERS, initial_value
from kairos_train.model.public_keys import public_keys
from kairos_train.weights.export_tensors import computed_bytes
from kairos_train.weights.quantize import encode, find_scales, output_error

ROBOT = ["model.action.action_dim=7", "model.action.state_dim=8"]
LIMITS = {"int8": 0.01, "fp8": 0.04, "int4": 0.12}


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter's initial value in bfloat16, as exports store it; a head's weight that of a linear layer."""
    if name.startswith(LAST_LAYERS) and name.endswith(".weight"):
        name = f"drawn.{name.replace('head', 'linear')}"
    return initial_value(name, torch.Size(shape), seed=0).bfloat16()


def measure(config: ModelConfig, methods: list[str]) -> dict[str, dict[str, float]]:
    """By method what the docstring says of it."""
    shapes = public_keys(config)
    weights = {name: drawn(name, shape) for name, shape in shapes.items()}
    whole = computed_bytes(shapes, lambda name: 2, None)

    def rounded(method: str, name: str) -> Tensor:
        weight = weights[name]
        if not is_large(name):
            return weight
        scales = find_scales(method, weight)
        return dequantize(method, {"": encode(method, weight, scales), **scales}, weight.shape[1])

    found = {}
    for method in methods:
        began = time.monotonic()
        errors = output_error(config, weights.__getitem__, lambda name, method=method: rounded(method, name))
        size = computed_bytes(shapes, lambda name: 2, method)
        found[method] = {**errors, "size_ratio": round(size / whole, 4), "gigabytes": round(size / 1e9, 3)}
        said = ", ".join(f"{stream} {error:.2%}" for stream, error in errors.items())
        seconds = time.monotonic() - began
        print(f"  {method}: {said}, {size / 1e9:.3f} GB of {whole / 1e9:.3f}, {seconds:.0f} s", flush=True)
    return found


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "small", "kairos_4b"], help="of configs/model")
    parser.add_argument("--layers", type=int, default=32, help="of a deep `small`; 0: none")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--quick", action="store_true", help="tiny, and small with 4 layers; under 50 s")
    args = parser.parse_args()
    if args.quick:
        args.models, args.layers = ["tiny"], 4
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(machine)
    settings = {name: [f"model={name}", *ROBOT] for name in args.models}
    if args.layers:
        settings[f"small, {args.layers} layers"] = ["model=small", f"model.num_layers={args.layers}", *ROBOT]
    found = {}
    for name, overrides in settings.items():
        print(name, flush=True)
        found[name] = measure(load_config(overrides, sections=("model",)).model, args.methods)
    within = {
        method: all(
            max(errors[method]["video"], errors[method]["action"]) <= LIMITS[method] for errors in found.values()
        )
        for method in args.methods
    }
    print(json.dumps({"machine": machine, "models": found, "within": within}))
    return 0 if all(within.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
