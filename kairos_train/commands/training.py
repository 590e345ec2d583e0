"""Training, and what is known of a run before it starts: `train`, `config`, `model`, `plan`, `verify`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kairos_train.basics.device import device_of
from kairos_train.commands.parsing import command, config_of, count, group, with_overrides


def run_train(args: argparse.Namespace) -> int:
    from kairos_train import api

    print(f"last checkpoint: {api.train(args.overrides, config_dirs=args.config_dir)}")
    return 0


def run_config(args: argparse.Namespace) -> int:
    from kairos_train.config.compose import to_yaml

    print(to_yaml(config_of(args, sections=())), end="")
    return 0


def run_model_summary(args: argparse.Namespace) -> int:
    from kairos_train.model.summary import summarize

    print(summarize(config_of(args, sections=("model",))))
    return 0


def run_plan(args: argparse.Namespace) -> int:
    from kairos_train.plan.report import SECTIONS, run

    text, legal = run(
        lambda: config_of(args, sections=SECTIONS),
        gpus=args.gpus,
        searching=args.search,
        context_tokens=args.context_tokens,
        as_json=args.json,
    )
    print(text)
    return 0 if legal else 2


def run_verify_golden(args: argparse.Namespace) -> int:
    import torch

    from kairos_train.model.golden import verify_files

    dtype = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    failed = 0
    for result in verify_files(args.files, device=device_of(args.device), dtype=dtype):
        good = result.outputs <= args.tolerance_outputs and result.gradients <= args.tolerance_gradients
        failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {result.path.name}: ", end="")
        print(f"outputs {result.outputs:.2e} ({result.worst_output}), ", end="")
        print(f"gradients {result.gradients:.2e} ({result.worst_gradient})")
    return 1 if failed else 0


def run_verify_parallel(args: argparse.Namespace) -> int:
    args.overrides = ["experiment=demo", "train.precision=fp32", "optimizer.warmup_steps=1", *args.overrides]
    from kairos_train.training.parity.verify import SECTIONS, report, verify_parallel

    config = config_of(args, sections=SECTIONS)

    deviations = verify_parallel(config, steps=args.steps, ranks=args.nproc)
    if deviations is None:
        return 0
    d = config.parallel
    print(
        report(
            deviations,
            f"tensor {d.tensor}{' with sequence' if d.sequence else ''}, context {d.context}, "
            f"ZeRO {config.train.zero_stage}, {config.train.precision}",
        )
    )
    return 0 if all(deviation.ok for deviation in deviations) else 1


def add(commands: Any) -> None:
    """Add the subcommands."""
    with_overrides(command(commands, "train", run_train, "train a stage, or the stages of a curriculum"))
    with_overrides(command(commands, "config", run_config, "print the resolved configuration"))

    model = group(commands, "model", "what a model configuration comes to")
    with_overrides(command(model, "summary", run_model_summary, "parameters, keys and FLOPs, without allocating"))

    plan = command(commands, "plan", run_plan, "memory, traffic and time on a cluster, without GPUs")
    plan.add_argument("--json", action="store_true", help="one JSON object, also where a layout is not legal")
    plan.add_argument("--gpus", type=count, default=None, metavar="N", help="in all; none: tensor x context")
    plan.add_argument("--search", action="store_true", help="the cheapest layout for --gpus that fits")
    plan.add_argument("--context-tokens", type=count, default=128, metavar="N", help="text tokens of a sample")
    with_overrides(plan)

    verify = group(commands, "verify", "check the implementation")
    golden = command(verify, "golden", run_verify_golden, "compare outputs and gradients with reference files")
    golden.add_argument("files", nargs="+", type=Path, metavar="FILE", help="safetensors with weights, inputs, outputs")
    golden.add_argument("--tolerance-outputs", type=float, default=1e-5, help="largest relative error")
    golden.add_argument("--tolerance-gradients", type=float, default=1e-4, help="largest relative error")
    golden.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="where it is computed")
    golden.add_argument("--dtype", choices=("float64", "float32", "bfloat16"), default="float32", help="of weights")

    parallel = command(verify, "parallel", run_verify_parallel, "a sharded layout beside one process, on a small model")
    parallel.add_argument("--nproc", type=count, default=None, help="processes; none: tensor x context")
    parallel.add_argument("--steps", type=count, default=5, help="optimiser steps")
    with_overrides(parallel)
