"""A training run of four processes through random faults, beside the same run without: same losses, weights, samples?

    python benchmarks/chaos.py [--faults 100] [--seed 0] [--part runs|packing] [--quick]

The faults: benchmarks/chaos_parts/faults.py, and SIGKILL of `kairos-train data pack`, which is started again and must
leave the same shards. Each run of 30 steps has a few of them; every run is compared with one that was left alone.
Without the right to mount a small file system, full disks are left out and it is said. The last line is one JSON
object: machine, `faults`, `identical` (runs and packings all equal to the undisturbed ones, bit for bit),
`samples_lost`, `samples_repeated`, `leftovers`, `unnamed` (lost ranks that a survivor did not name),
`slowest_detection_s`, and by kind: how many, median and longest seconds of detection and recovery.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from chaos_parts.attempt import STEPS, Attempt, finish
from chaos_parts.compare import compare_runs
from chaos_parts.faults import KINDS, FaultOutcome, run_with_faults, small_disk
from chaos_parts.pack import EPISODES, make_shards, pack_through_kills

FAULTS_PER_RUN = 5
QUICK_STEPS = 8
PACK_SHARE = 10
"""Of this many faults, one is in packing."""


def plan_faults(faults: int, kinds: list[str], rng: random.Random) -> tuple[list[list[str]], int]:
    """Kinds of the faults of each run, and how many are left for packing: every kind as often as the others."""
    packing = faults // PACK_SHARE
    rest = [kinds[i % len(kinds)] for i in range(faults - packing)]
    rng.shuffle(rest)
    return [rest[i : i + FAULTS_PER_RUN] for i in range(0, len(rest), FAULTS_PER_RUN)], packing


def table(outcomes: list[FaultOutcome]) -> list[str]:
    """Markdown, a row per kind."""
    by_kind: dict[str, list[FaultOutcome]] = defaultdict(list)
    for outcome in outcomes:
        by_kind[outcome.kind].append(outcome)
    lines = [
        "| fault | times | noticed after (median, longest) | next step after (median, longest) |",
        "|---|---|---|---|",
    ]
    for kind, members in by_kind.items():
        cells = [
            _seconds([m.detected for m in members if m.detected is not None]),
            _seconds([m.recovered for m in members if m.recovered is not None]),
        ]
        lines.append(f"| {kind} | {len(members)} | {' | '.join(cells)} |")
    return lines


def _seconds(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} s, {max(values):.1f} s" if values else "–"


def main() -> int:
    """Run, print, and say by the exit code whether all is equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100, help="in all")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, steps and ranks")
    parser.add_argument("--part", choices=("all", "runs", "packing"), default="all", help="of the faults, this part")
    parser.add_argument("--quick", action="store_true", help="one fault in a run of 8 steps")
    parser.add_argument("--verbose", action="store_true", help="a line for every fault")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    machine = f"{platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}, gloo"
    print(machine)
    outcomes: list[FaultOutcome] = []
    differing, lost, repeated, leftovers = [], 0, 0, 0
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        home = Path(folder)
        shards = make_shards(home, episodes=1 if args.quick else EPISODES)
        steps = QUICK_STEPS if args.quick else STEPS
        settings = [f"data.shards={shards}", f"train.steps={steps}"]
        if args.part != "packing":
            finish(Attempt(home / "reference", settings))
        with small_disk(home / "disk") as mounted:
            kinds = [kind for kind in KINDS if mounted or kind != "disk_full"]
            if not mounted:
                print("no small file system can be mounted here: disk_full is left out")
            runs, packing = plan_faults(1 if args.quick else args.faults, kinds, rng)
            for number, wanted in enumerate(runs if args.part != "packing" else []):
                run_dir = home / "disk" / f"run-{number}"
                found = run_with_faults(Attempt(run_dir, settings), wanted, rng, steps=steps)
                compared = compare_runs(run_dir, home / "reference")
                outcomes += found
                if not compared.identical:
                    differing.append(f"run {number}: {', '.join(compared.differing)}")
                lost, repeated = lost + compared.lost, repeated + compared.repeated
                leftovers += len(compared.leftovers)
                if args.verbose:
                    for outcome in found:
                        print(f"  run {number}, {outcome}", flush=True)
                samples = f"{compared.lost} samples lost, {compared.repeated} repeated"
                equal = "equal" if compared.identical else "DIFFERS"
                print(f"run {number}: {', '.join(wanted)}: {equal}, {samples}", flush=True)
                _clear(home / "disk")
        for number in range(packing if args.part != "runs" else 0):
            outcome, same = pack_through_kills(home, shards, rng)
            outcomes.append(outcome)
            if not same:
                differing.append(f"packing {number}")
    print("\n".join(table(outcomes)))
    for difference in differing:
        print(f"differs: {difference}")
    figures = {
        "machine": machine,
        "faults": len(outcomes),
        "seed": args.seed,
        "identical": not differing,
        "samples_lost": lost,
        "samples_repeated": repeated,
        "leftovers": leftovers,
        "unnamed": sum(outcome.named is False for outcome in outcomes),
        "slowest_detection_s": round(max((o.detected or 0.0 for o in outcomes), default=0.0), 2),
        "minutes": round((time.monotonic() - begin) / 60, 1),
    }
    print(json.dumps(figures))
    good = figures["identical"] and not (lost or repeated or leftovers or figures["unnamed"])
    return 0 if good else 1


def _clear(folder: Path) -> None:
    """Make room on the small disk for the next run."""
    for path in folder.iterdir():
        shutil.rmtree(path)


if __name__ == "__main__":
    sys.exit(main())
