"""Datasets: `data simulate`, `prepare`, `pack`, `inspect`, `verify`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kairos_train.basics.errors import UserError
from kairos_train.commands.parsing import (
    command,
    config_of,
    count,
    device_of,
    group,
    location,
    print_json,
    split_words,
    with_overrides,
)

READING = ("data.window", "data.clips", "data.prompt_template", "data.believe", "data.timestamp_tolerance")
"""What decides how a source is read."""


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
    prepare(config_of(args, sections=()).prepare)
    return 0


def prepare(commands: Sequence[str]) -> None:
    """Make what is missing of an experiment's data; in the one process that is there before a run begins.

    Args:
        commands: of `kairos-train`, each with `--out DIR`; one whose DIR exists has been done.

    Raises:
        UserError: a command without `--out`, one that fails, or data that is missing in a run of many processes.
    """
    for line in commands:
        words = split_words(line, "prepare")
        if "--out" not in words[:-1]:
            raise UserError(f"prepare: {line!r} has no --out DIR, by which to see whether it is done; add it")
        if Path(words[words.index("--out") + 1]).expanduser().exists():
            continue
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                f"prepare: {line!r} is still to be done; run `kairos-train data prepare` with the same settings"
            )
        print(f"$ kairos-train {line}", file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "kairos_train.cli", *words], stdout=subprocess.DEVNULL, check=False
        )
        if done.returncode:
            raise UserError(f"prepare: {line!r} ended with exit code {done.returncode}; see the line above")


def run_data_pack(args: argparse.Namespace) -> int:
    from dataloaders.consistency.report import announced
    from dataloaders.packing.pack import pack

    config = config_of(args, sections=(*READING, "encoders"))
    index = pack(
        args.source,
        args.out,
        window=config.data.window,
        clips=config.data.clips,
        prompt_template=config.data.prompt_template,
        captions=args.captions,
        only_episodes=args.only_episodes,
        believe=config.data.believe,
        timestamp_tolerance=config.data.timestamp_tolerance,
        encoder=_sample_encoder(config) if args.encode else None,
        processes=args.processes,
        shard_samples=args.shard_samples,
        on_bad=args.on_bad,
        progress=_show_progress if sys.stderr.isatty() else None,
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


def _sample_encoder(config: Any) -> Callable[[int], Any]:
    """What makes the encoders in each process that packs."""
    import functools

    from kairos_train.conditioning.sample_encoder import load_sample_encoder

    return functools.partial(load_sample_encoder, config.encoders, device_of(config.train.device))


def _episodes(text: str) -> list[tuple[int, int]]:
    from dataloaders.lerobot.splits import parse_episodes

    try:
        return parse_episodes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


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
        type=_episodes,
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
