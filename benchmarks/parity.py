"""Every layout beside one process: {TP2×DP2, TP2+SP×DP2, CP2×DP2, CP4×DP2, TP2+SP×CP2×DP2} × ZeRO 0 to 3 × streams ×
optimiser, five steps each on a small model of all kinds of layers.

    python benchmarks/parity.py [--quick] [--steps 5]

What a step holds: `kairos_train.training.parity.compare`. Clipping is active, accumulation is 2, 5 latent frames on 2
and 4 context ranks. Printed: the worst deviation of losses, gradient norms, first gradients and last weights, as a
table. Processes are kept over all cases (gloo, one thread each).

The last line is one JSON object: machine, `cases`, `failed`, `worst_loss`, `worst_norm`, `worst_weights_sgd`,
`worst_weights_adamw`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kairos_train.config.compose import load_config
from kairos_train.config.schema import Config
from kairos_train.training.parity.compare import Deviation, Trace, compare, reference_config, run_steps
from parallel.topology import Degrees, Topology

MODEL = (
    "model.num_layers=4 model.num_heads=4 model.text_dim=12 model.freq_dim=16 encoders.text.text_dim=12 "
    "model.video.dim=24 model.video.ffn_dim=32 model.video.gdn_key_dim=6 model.video.gdn_value_dim=8 "
    "model.video.dilation=2 model.action.dim=16 model.action.ffn_dim=24 model.action.action_dim=3 "
    "model.action.state_dim=5 data.window.frames=17 data.window.height=32 data.window.width=32 "
    "data.window.action_video_freq_ratio=1 train.micro_batch=2 train.accumulation=2 train.precision=fp32 "
    "train.device=cpu optimizer.warmup_steps=1 optimizer.lr=1e-3 optimizer.gradient_clip=0.1"
)
LAYOUTS = {
    "TP2 × DP2": (4, "parallel.tensor=2"),
    "TP2+SP × DP2": (4, "parallel.tensor=2 parallel.sequence=true"),
    "CP2 × DP2": (4, "parallel.context=2"),
    "CP4 × DP2": (8, "parallel.context=4"),
    "TP2+SP × CP2 × DP2": (8, "parallel.tensor=2 parallel.sequence=true parallel.context=2"),
}
DATA = 2
"""Data ranks of every layout: all train on the same global batches, and one reference serves them all."""


@dataclass(frozen=True)
class Case:
    layout: str
    stage: int
    streams: str
    optimizer: str

    @property
    def ranks(self) -> int:
        return LAYOUTS[self.layout][0]

    @property
    def reference(self) -> str:
        return f"{self.streams}-{self.optimizer}"

    @property
    def name(self) -> str:
        return f"{list(LAYOUTS).index(self.layout)}-{self.stage}-{self.reference}"

    def config(self) -> Config:
        video = ["stage=physical", "stage.conditions={t2v: 0.4, ti2v: 0.6}"] if self.streams == "video" else []
        words = [f"train.zero_stage={self.stage}", f"optimizer.name={self.optimizer}", *LAYOUTS[self.layout][1].split()]
        sections = ("model", "stage", "optimizer", "parallel", "precision", "train")
        return load_config(["experiment=demo", *video, *MODEL.split(), *words], sections=sections)


def run_cases(rank: int, ranks: int, cases: list[Case], folder: str, steps: int, alone: bool) -> None:
    """One process of a world that runs all `cases`, in their layouts or alone as the reference."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{ranks}-{alone}", rank=rank, world_size=ranks)
    for case in cases:
        config = reference_config(case.config(), LAYOUTS[case.layout][0]) if alone else case.config()
        topology = Topology.build(Degrees.of(config.parallel, ranks), torch.device("cpu"))
        trace = run_steps(config, steps, topology)
        if trace is not None:
            trace.save(Path(folder) / (case.reference if alone else case.name))
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.1)  # gloo's threads let go of the last tensors


def run_all(cases: list[Case], folder: Path, steps: int) -> dict[Case, list[Deviation]]:
    """Deviations of every case."""
    references = list({case.reference: case for case in cases}.values())
    mp.spawn(run_cases, (1, references, str(folder), steps, True), nprocs=1)
    for ranks in sorted({case.ranks for case in cases}):
        mine = [case for case in cases if case.ranks == ranks]
        mp.spawn(run_cases, (ranks, mine, str(folder), steps, False), nprocs=ranks)
    return {
        case: compare(Trace.load(folder / case.reference), Trace.load(folder / case.name), case.config())
        for case in cases
    }


def table(results: dict[Case, list[Deviation]]) -> list[str]:
    """Markdown, one row per layout, streams and optimiser; the worst over ZeRO stages."""
    lines = [
        "| layout | ZeRO | streams | optimiser | losses | gradient norm | gradients | weights | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows: dict[tuple[str, str, str], list[tuple[Case, list[Deviation]]]] = {}
    for case, found in results.items():
        rows.setdefault((case.layout, case.streams, case.optimizer), []).append((case, found))
    for (layout, streams, optimizer), members in rows.items():
        worst = {what: max(d.value for _, found in members for d in found if d.what == what) for what in whats(members)}
        cells = [f"{worst[what]:.0e}" if what in worst else "–" for what in ("losses", "gradient norm", "gradients")]
        ok = all(d.ok for _, found in members for d in found)
        stages = ", ".join(str(case.stage) for case, _ in members)
        lines.append(
            f"| {layout} | {stages} | {streams} | {optimizer} | {' | '.join(cells)} | {worst['weights']:.0e} "
            f"| {'equal' if ok else 'DIFFERS'} |"
        )
    return lines


def whats(members: list[tuple[Case, list[Deviation]]]) -> list[str]:
    return [d.what for d in members[0][1]]


def main() -> int:
    """Run, print, and say by the exit code whether all agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="optimiser steps")
    parser.add_argument("--quick", action="store_true", help="four ranks, ZeRO 1, joint, AdamW; 2 steps")
    args = parser.parse_args()
    cases = [
        Case(layout, stage, streams, optimizer)
        for optimizer in ("adamw", "sgd")
        for streams in ("joint", "video")
        for layout in LAYOUTS
        for stage in range(4)
    ]
    if args.quick:
        cases = [c for c in cases if (c.ranks, c.stage, c.streams, c.optimizer) == (4, 1, "joint", "adamw")]
    machine = f"{platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}, gloo"
    print(machine)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        results = run_all(cases, Path(folder), 2 if args.quick else args.steps)
    print("\n".join(table(results)))
    failed = [case for case, found in results.items() if not all(d.ok for d in found)]
    for case in failed:
        print(f"differs: {case}: {[d for d in results[case] if not d.ok]}")

    def worst(what: str, optimizer: str | None = None) -> float:
        found = [d for case, ds in results.items() for d in ds if optimizer in (None, case.optimizer)]
        return max((d.value for d in found if d.what == what), default=0.0)

    figures = {
        "machine": machine,
        "cases": len(cases),
        "failed": len(failed),
        "worst_loss": worst("losses"),
        "worst_norm": worst("gradient norm"),
        "worst_weights_sgd": worst("weights", "sgd"),
        "worst_weights_adamw": worst("weights", "adamw"),
    }
    print(json.dumps(figures))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
