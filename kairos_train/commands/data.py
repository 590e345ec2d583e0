"""Datasets: `data simulate`, `prepare`, `pack`, `inspect`, `verify`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataloaders.config import READING
from kairos_train.commands.parsing import command, config_of, count, group, location, print_json, with_overrides


def run_data_simulate(args: argparse.Namespace) -> int:
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
    return print_json(summary)


def run_data_prepare(args: argparse.Namespace) -> int:
    from kairos_train.launch.prepare import prepare

    prepare(config_of(args, sections=()).prepare)
    return 0


def run_data_pack(args: argparse.Namespace) -> int:
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
    for line in announced(args.out):
        print(line)
    print(f"{args.out}: {index['samples']} samples in {len(index['shards'])} shards")
    for note in index["source"].get("notes", []):
        print(f"note: {note}", file=sys.stderr)
    return 0


def run_data_inspect(args: argparse.Namespace) -> int:
    from dataloaders.packing.inspection import inspect

    config = config_of(args, sections=READING)
    lines = inspect(args.source, args.out, data=config.data, samples=args.samples)
    print("\n".join([*lines, f"page: {args.out / 'index.html'}"]))
    return 0


def run_data_verify(args: argparse.Namespace) -> int:
    from dataloaders.packing.verification import verify
    from dataloaders.sources.open import is_source

    progress = _show_progress if sys.stderr.isatty() else None
    if is_source(args.shards):
        return _verify_source(args, progress)
    verdict = verify(args.shards, decode=not args.no_decode, processes=args.processes, progress=progress)
    for fault in verdict.faults:
        print(f"{fault.name}: {fault.reason}")
    for note in verdict.notes:
        print(f"its dataset: {note}")
    state = f"{len(verdict.faults)} faults" if verdict.faults else "ok"
    counts = f"{verdict.samples} samples in {verdict.shards} shards, {verdict.bytes / 1e6:.1f} MB"
    print(f"{args.shards}: {counts}: {state}" if verdict.faults else f"{args.shards}: ok: {counts}")
    return 1 if verdict.faults else 0


def _verify_source(args: argparse.Namespace, progress: Callable[[int, int], None] | None) -> int:
    from dataloaders.packing.dataset_check import check_dataset

    data = config_of(args, sections=READING).data
    found = check_dataset(args.shards, data, processes=args.processes, progress=progress)
    for name, reason in found.faults:
        print(f"{name}: {reason}")
    for contradiction in found.contradictions:
        print(contradiction)
    told = len(found.contradictions)
    counts = f"{told} contradictions, {found.unresolved} of them unresolved, {len(found.faults)} faults"
    good = not told and not found.faults
    print(f"{args.shards}: {'ok: no contradictions' if good else counts} in {found.units} units")
    return 0 if good else 1


def _show_progress(done: int, total: int) -> None:
    print(f"\rpacked {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


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
