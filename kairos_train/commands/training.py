"""Training, and what is known of a run before it starts: `train`, `config`, `model`, `plan`, `verify`."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kairos_train.basics.device import device_of
from kairos_train.basics.errors import UserError
from kairos_train.commands.output import Result, Table
from kairos_train.commands.parsing import command, config_of, count, group, with_overrides
from kairos_train.config.groups import listing


def run_train(args: argparse.Namespace) -> Result:
    from kairos_train import api

    last = api.train(args.overrides, config_dirs=args.config_dir)
    run = last.parents[1]
    return Result(
        {"run_dir": run, "last_checkpoint": last},
        Table([("last checkpoint", last)]),
        look={"losses": run / "losses.jsonl", "curves": f"tensorboard --logdir {run / 'tensorboard'}"},
        then=[f"kairos-train export {run} --out policy", f"kairos-train report {run} --out run.html"],
    )


def run_config(args: argparse.Namespace) -> Result:
    from kairos_train.config import origin, reference
    from kairos_train.config.compose import to_text, to_yaml

    if args.reference:
        sections = {section.key: asdict(section) for section in reference.sections()}
        return Result(sections, document=reference.page())
    config = config_of(args, sections=())
    if args.show is None and not args.origin:
        return Result(asdict(config), document=to_yaml(config))
    found = origin.origins(args.overrides, config_dirs=args.config_dir) if args.origin else None
    columns, rows, settings = ["setting", "value"], [], {}
    columns += ["set by"] if args.origin else []
    columns += ["values", "what it is"] if args.show is not None else []
    for key, value, doc in reference.settings_of(config, args.show):
        where = [] if found is None else [str(origin.origin_of(key, found))]
        rows.append([key, to_text(value), *where, doc.values, doc.about][: len(columns)])
        settings[key] = {"value": value, "values": doc.values, "about": doc.about, "default": doc.default}
        settings[key] |= {"set_by": where[0]} if where else {}
    return Result(settings, Table(rows, columns))


def run_model_summary(args: argparse.Namespace) -> Result:
    from kairos_train.model.summary import numbers, table

    found = numbers(config_of(args, sections=("model",)))
    return Result(found, table(found), then=[f"kairos-train plan model={found['model']}"])


def run_plan(args: argparse.Namespace) -> Result:
    from kairos_train.plan.report import SECTIONS, run

    try:
        config = config_of(args, sections=SECTIONS)
        found, text = run(config, gpus=args.gpus, searching=args.search, context_tokens=args.context_tokens)
    except UserError as error:
        if not args.json:
            raise
        return Result({"legal": False, "reason": str(error)}, code=2)
    return Result(found, text, then=[f"kairos-train submit {shlex.join(args.overrides)} --print"])


def run_verify_golden(args: argparse.Namespace) -> Result:
    import torch

    from kairos_train.model.golden import verify_files

    dtype = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    found = {}
    for result in verify_files(args.files, device=device_of(args.device), dtype=dtype):
        good = result.outputs <= args.tolerance_outputs and result.gradients <= args.tolerance_gradients
        found[str(result.path)] = {**asdict(result), "ok": good}
    rows = [
        (
            "ok" if f["ok"] else "FAIL",
            Path(name).name,
            f["outputs"],
            f["worst_output"],
            f["gradients"],
            f["worst_gradient"],
        )
        for name, f in found.items()
    ]
    table = Table(rows, ("", "file", "outputs", "worst", "gradients", "worst"))
    return Result({"files": found}, table, code=0 if all(f["ok"] for f in found.values()) else 1)


def run_verify_parallel(args: argparse.Namespace) -> Result:
    args.overrides = ["experiment=demo", "train.precision=fp32", "optimizer.warmup_steps=1", *args.overrides]
    from kairos_train.training.parity.verify import SECTIONS, report, verify_parallel

    config = config_of(args, sections=SECTIONS)

    deviations = verify_parallel(config, steps=args.steps, ranks=args.nproc)
    if deviations is None:
        return Result()
    d = config.parallel
    layout = f"tensor {d.tensor}{' with sequence' if d.sequence else ''}, context {d.context}, "
    layout += f"ZeRO {config.train.zero_stage}, {config.train.precision}"
    found = [{**asdict(deviation), "ok": deviation.ok} for deviation in deviations]
    good = all(deviation.ok for deviation in deviations)
    return Result({"layout": layout, "deviations": found}, report(deviations, layout), code=0 if good else 1)


def add(commands: Any) -> None:
    """Add the subcommands."""
    train = command(commands, "train", run_train, "train a stage, or the stages of a curriculum")
    train.more = listing
    with_overrides(train)
    config = command(commands, "config", run_config, "print the resolved configuration, or what is asked of it")
    config.more = listing
    config.add_argument("--show", metavar="SECTION", help="the settings of a section: values and what they are")
    config.add_argument("--origin", action="store_true", help="which file or override set each value")
    config.add_argument("--reference", action="store_true", help="all settings there are, as docs/settings.md")
    with_overrides(config)

    model = group(commands, "model", "what a model configuration comes to")
    with_overrides(command(model, "summary", run_model_summary, "parameters, keys and FLOPs, without allocating"))

    plan = command(commands, "plan", run_plan, "memory, traffic and time on a cluster, without GPUs")
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
