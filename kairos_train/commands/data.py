"""Datasets: `data simulate`, `prepare`, `pack`, `inspect`, `verify`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from dataloaders.config import READING
from kairos_train.basics.log import logger
from kairos_train.commands.output import Result, Table
from kairos_train.commands.parsing import command, config_of, count, group, location, with_overrides

UNJUDGED = "data.validation_shards=null"
"""For a run without held-out shards."""


def run_data_simulate(args: argparse.Namespace) -> Result:
    from dataloaders.simulators.collect import simulate

    summary = simulate(
        env=args.env,
        tasks=args.tasks or [],
        episodes_per_task=args.episodes,
        out=args.out,
        size=args.size,
        seed_start=args.seed_start,
        noise=args.noise,
        codec=args.codec,
        processes=args.processes,
    )
    experiment = "demo" if args.env == "metaworld" else f"demo_{args.env}"
    return Result(
        {**summary, "out": args.out},
        look={"dataset": args.out},
        then=[
            f"kairos-train data inspect {args.out} --out look experiment={experiment}",
            f"kairos-train data pack {args.out} --out shards --encode experiment={experiment}",
        ],
    )


def run_data_prepare(args: argparse.Namespace) -> Result:
    from kairos_train.launch.prepare import prepare

    folders = prepare(config_of(args, sections=()).prepare)
    table = Table([(folder,) for folder in folders] or [("nothing to make: the experiment lists no commands",)])
    return Result({"folders": folders}, table, then=[f"kairos-train train {shlex.join(args.overrides)}"])


def run_data_pack(args: argparse.Namespace) -> Result:
    from dataloaders.consistency.report import announced
    from kairos_train import api

    index = api.pack(
        args.source,
        args.out,
        args.overrides,
        encode=args.encode,
        only_episodes=args.only_episodes,
        captions=args.captions,
        on_bad=args.on_bad,
        shard_samples=args.shard_samples,
        processes=args.processes,
        config_dirs=args.config_dir,
    )
    contradictions, notes = announced(args.out), index["source"].get("notes", [])
    for line in [*contradictions, *(f"note: {note}" for note in notes)]:
        logger.info(line)
    names = ("samples", "action_dim", "state_dim", "fps")
    found = {"out": args.out, "shards": len(index["shards"]), **{name: index[name] for name in names}}
    table = Table(list(found.items()))
    return Result(
        {**found, "contradictions": contradictions, "notes": notes},
        table,
        look={"shards": args.out},
        then=[
            f"kairos-train data verify {args.out}",
            f"kairos-train train {shlex.join([*args.overrides, f'data.shards={args.out}', UNJUDGED])}",
        ],
    )


def run_data_inspect(args: argparse.Namespace) -> Result:
    from dataloaders.packing.inspection import inspect

    config = config_of(args, sections=READING)
    facts = inspect(args.source, args.out, data=config.data, samples=args.samples)
    page = args.out / "index.html"
    then = [f"kairos-train data verify {args.source}"]
    return Result({"page": page, "facts": facts}, "\n".join(facts), look={"page": page}, then=then)


def run_data_verify(args: argparse.Namespace) -> Result:
    from dataloaders.packing.verification import verify
    from dataloaders.sources.open import is_source

    if is_source(args.shards):
        return _verify_source(args)
    verdict = verify(args.shards, decode=not args.no_decode, processes=args.processes)
    faults = [{"name": fault.name, "reason": fault.reason} for fault in verdict.faults]
    counts = {"samples": verdict.samples, "shards": verdict.shards, "bytes": verdict.bytes}
    found = {"location": args.shards, "ok": not faults, **counts, "faults": faults, "notes": verdict.notes}
    said = f"{verdict.samples} samples in {verdict.shards} shards, {verdict.bytes / 1e6:.1f} MB"
    lines = [f"{fault['name']}: {fault['reason']}" for fault in faults]
    lines += [f"its dataset: {note}" for note in verdict.notes]
    state = f"{said}: {len(faults)} faults" if faults else f"ok: {said}"
    then = [] if faults else [f"kairos-train train {shlex.join([*args.overrides, f'data.shards={args.shards}'])}"]
    return Result(found, "\n".join([*lines, f"{args.shards}: {state}"]), then=then, code=1 if faults else 0)


def _verify_source(args: argparse.Namespace) -> Result:
    from dataloaders.packing.dataset_check import check_dataset

    data = config_of(args, sections=READING).data
    checked = check_dataset(args.shards, data, processes=args.processes)
    faults = [{"name": name, "reason": reason} for name, reason in checked.faults]
    contradictions = [str(contradiction) for contradiction in checked.contradictions]
    good = not contradictions and not faults
    found = {"location": args.shards, "ok": good, "units": checked.units, "faults": faults}
    found |= {"contradictions": contradictions, "unresolved": checked.unresolved}
    counts = f"{len(contradictions)} contradictions, {checked.unresolved} of them unresolved, {len(faults)} faults"
    lines = [*(f"{fault['name']}: {fault['reason']}" for fault in faults), *contradictions]
    last = f"{args.shards}: {'ok: no contradictions' if good else counts} in {checked.units} units"
    then = [f"kairos-train data pack {shlex.join([args.shards, '--out', 'shards', *args.overrides])}"] if good else []
    return Result(found, "\n".join([*lines, last]), then=then, code=0 if good else 1)


def add(commands: Any) -> None:
    """Add the subcommands."""
    data = group(commands, "data", "make, pack and check datasets")
    _add_makers(data)
    _add_checks(data)


def _add_makers(data: Any) -> None:
    simulate = command(data, "simulate", run_data_simulate, "record a scripted expert as a LeRobot dataset")
    simulate.add_argument("--env", choices=("metaworld", "push2d"), required=True, help="the simulator")
    simulate.add_argument("--tasks", nargs="+", default=None, metavar="TASK", help="none: the demo's tasks")
    simulate.add_argument("--episodes", type=count, default=40, help="successful episodes per task")
    simulate.add_argument("--out", type=Path, required=True, metavar="DIR", help="the dataset; must not exist")
    simulate.add_argument("--size", type=count, default=128, help="side of the picture in pixels")
    simulate.add_argument("--seed-start", type=int, default=0, help="seed of the first episode")
    simulate.add_argument(
        "--noise", type=float, default=0.2, help="added to the executed action of every other episode"
    )
    simulate.add_argument("--codec", choices=("h264", "av1"), default="h264", help="of the video files")
    simulate.add_argument("--processes", type=count, default=2, help="simulators at the same time")

    made = command(data, "prepare", run_data_prepare, "make an experiment's data where it is missing")
    with_overrides(made)

    pack = command(data, "pack", run_data_pack, "cut a dataset into training samples; goes on where it was stopped")
    pack.add_argument(
        "source",
        type=location,
        metavar="SOURCE",
        help="a LeRobot dataset, a manifest .jsonl or .csv of videos, WebDataset tars",
    )
    pack.add_argument("--out", type=Path, required=True, metavar="DIR", help="the shards")
    pack.add_argument("--encode", action="store_true", help="store latents and contexts of the configured encoders too")
    pack.add_argument("--captions", type=Path, metavar="FILE", help="LeRobot: JSON lines with captions of episodes")
    pack.add_argument(
        "--only-episodes",
        default=None,
        metavar="RANGES",
        help="LeRobot: as 0-89 or 0-9,12; none: the split train of meta/info.json, where it has splits",
    )
    pack.add_argument(
        "--on-bad", choices=("stop", "skip"), default="stop", help="what cannot be used: stop, or list it"
    )
    pack.add_argument("--shard-samples", type=count, default=256, help="most samples of a shard")
    pack.add_argument("--processes", type=count, default=1, help="at the same time; each with encoders of its own")
    with_overrides(pack)


def _add_checks(data: Any) -> None:
    inspect = command(data, "inspect", run_data_inspect, "counts, ranges and pictures of a dataset or of shards")
    inspect.add_argument("source", type=location, metavar="DATASET|SHARDS", help="what pack takes, or what it wrote")
    inspect.add_argument("--out", type=Path, required=True, metavar="DIR", help="page and pictures; must not exist")
    inspect.add_argument("--samples", type=count, default=12, help="rows of the contact sheet")
    with_overrides(inspect)

    verify = command(
        data,
        "verify",
        run_data_verify,
        "read every byte of packed shards, or all of a dataset; exit code 1 for a fault",
    )
    verify.add_argument("shards", type=location, metavar="DATASET|SHARDS", help="what pack takes, or what it wrote")
    verify.add_argument("--no-decode", action="store_true", help="do not decode the clips")
    verify.add_argument("--processes", type=count, default=1, help="shards or episodes at the same time")
    with_overrides(verify)
