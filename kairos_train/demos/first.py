"""The demo: from a simulator to a policy that is judged on episodes it never saw, by the commands a user would type.

simulate → pack → train three stages (the last one killed on purpose and resumed) → export → rollout → evaluate. Every
step that is complete is left alone, so that an interrupted demo continues; `fresh` starts over.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from kairos_train.basics.errors import RunStopped
from kairos_train.demos.steps import UNSEEN_SEEDS, argv, run_command


@dataclass(frozen=True)
class DemoPlan:
    """Sizes of a demo, chosen to finish in six minutes on two cores.

    Attributes:
        experiment: configuration of every training command.
        size: side of the pictures in pixels.
        episodes, unseen: per task.
        steps: optimiser steps of each stage.
    """

    experiment: str
    size: int
    episodes: int
    unseen: int
    steps: dict[str, int]


PLANS = {
    "metaworld": DemoPlan(
        "demo", size=128, episodes=12, unseen=4, steps={"physical": 40, "behaviour": 40, "joint": 300}
    ),
    "push2d": DemoPlan(
        "demo_push2d", size=64, episodes=150, unseen=12, steps={"physical": 20, "behaviour": 20, "joint": 300}
    ),
}


def run(*, env: str, fresh: bool = False, root: Path | None = None) -> dict:
    """Run the demo in `runs/<experiment>` (or `root`) of the working directory.

    Returns:
        "minutes", "open_loop": the evaluation, "places": what is where.

    Raises:
        UserError: a step refuses its input, such as a simulator that cannot render.
        RunStopped: a step fails, or the policy is no better than its baselines.
    """
    plan = PLANS[env]
    root = root or Path("runs") / plan.experiment
    if fresh and root.exists():
        shutil.rmtree(root)
    started = time.monotonic()
    _simulate(env, plan, root)
    _pack(plan, root)
    checkpoint = _train(plan, root)
    _export(checkpoint, root)
    result = _judge(root)
    minutes = (time.monotonic() - started) / 60
    rows = {name: row["mse"] for name, row in result["rows"].items()}
    if rows["model"] >= min(rows[name] for name in ("blind", "mean", "hold")):
        raise RunStopped(f"the policy's error {rows['model']:.3f} does not beat every baseline: {rows}; see {root}")
    return {"minutes": minutes, "open_loop": result, "places": _places(root)}


def _simulate(env: str, plan: DemoPlan, root: Path) -> None:
    for name, episodes, seed in (("dataset", plan.episodes, 0), ("dataset_unseen", plan.unseen, UNSEEN_SEEDS)):
        if not (root / name).exists():
            run_command(
                *("data", "simulate", "--env", env, "--episodes", episodes, "--seed-start", seed, "--size", plan.size),
                *("--processes", 2, "--out", root / name),
            )


def _pack(plan: DemoPlan, root: Path) -> None:
    for source, shards in (("dataset", "shards"), ("dataset_unseen", "shards_validation")):
        if not (root / shards).exists():
            run_command(
                *("data", "pack", root / source, "--out", root / shards, "--encode"),
                f"experiment={plan.experiment}",
            )


def _train(plan: DemoPlan, root: Path) -> Path:
    """The three stages, each from the one before; the last is killed once past a checkpoint and resumed."""
    before = None
    for stage, steps in plan.steps.items():
        run_dir = root / "stages" / stage
        words = [
            "train",
            f"experiment={plan.experiment}",
            f"stage={stage}",
            f"train.steps={steps}",
            f"run_dir={run_dir}",
            f"data.shards={root / 'shards'}",
            f"data.validation_shards={root / 'shards_validation'}",
        ]
        if before is not None:
            words.append(f"stage.init_from={before}")
        if stage == "joint" and not run_dir.exists():
            _kill_once(words, run_dir)
        run_command(*words)
        before = run_dir
    return before


def _kill_once(words: list[str], run_dir: Path) -> None:
    """Start the command and kill it, with its loader processes, a few steps after its first checkpoint."""
    print(f"\n$ kairos-train {shlex.join(words)}    # to be killed", flush=True)
    process = subprocess.Popen(argv(words), start_new_session=True)
    losses = run_dir / "losses.jsonl"
    try:
        while process.poll() is None:
            saved = any((run_dir / "checkpoints").glob("step-*"))
            if saved and len(losses.read_bytes().splitlines()) % 20 >= 5:
                break
            time.sleep(0.2)
        if process.poll() is not None:
            raise RunStopped(f"training ended with exit code {process.returncode} before it could be killed")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    lines = len(losses.read_bytes().splitlines())
    print(f"killed with SIGKILL at step {lines}, on purpose; the same command resumes it:", flush=True)


def _export(checkpoint: Path, root: Path) -> None:
    if not (root / "export").exists():
        run_command("export", checkpoint, "--out", root / "export", "--dtype", "fp32")


def _judge(root: Path) -> dict:
    unseen = root / "shards_validation"
    for name in ("rollout", "evaluation"):
        if (root / name).exists():
            shutil.rmtree(root / name)
    run_command(
        *("rollout", root / "export", "--input", unseen, "--mode", "joint", "--count", 3, "--guidance", 1),
        *("--out", root / "rollout"),
        quiet=True,
    )
    run_command(
        *("evaluate", root / "export", "--input", unseen, "--samples", 192, "--out", root / "evaluation"), quiet=True
    )
    return json.loads((root / "evaluation" / "open_loop.json").read_text())


def _places(root: Path) -> dict[str, Path]:
    return {
        "demonstrations (LeRobot v3.0)": root / "dataset",
        "unseen episodes": root / "dataset_unseen",
        "training shards": root / "shards",
        "runs, losses, TensorBoard": root / "stages",
        "policy": root / "export",
        "rollouts beside ground truth": root / "rollout",
        "evaluation": root / "evaluation",
    }
