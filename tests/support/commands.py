"""`kairos-train` as a user runs it, on settings that take seconds."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TINY = [
    "experiment=demo_push2d",
    "model.video.dim=32",
    "model.video.ffn_dim=64",
    "model.video.gdn_key_dim=8",
    "model.video.gdn_value_dim=16",
    "model.action.dim=32",
    "model.action.ffn_dim=64",
    "model.num_heads=2",
    "data.window.height=32",
    "data.window.width=32",
    "data.window.stride=1",
    "train.micro_batch=4",
    "train.log_every=5",
    "train.sample_every=0",
]
SAMPLED = "train.sample_every=500"
"""Windows are sampled at the end of a run."""

RELEASED = ["train.stage3_param_persistence_threshold=0", "train.stage3_max_live_parameters=0"]
"""ZeRO 3 keeps nothing gathered; weights as small as these would otherwise stay."""

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")


def environment() -> dict[str, str]:
    """Of a new process: one thread (bit-equal sums, and several processes on two cores), no launcher's variables."""
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def command(*args: object) -> list[str]:
    """`kairos-train ARGS` by this interpreter."""
    return [sys.executable, "-m", "kairos_train.cli", *map(str, args)]


def train_command(shards: Path, run_dir: Path, *overrides: str) -> list[str]:
    """`kairos-train train` on the shared shards."""
    return command("train", *train_overrides(shards, run_dir, *overrides))


def train_overrides(shards: Path, run_dir: Path, *overrides: str) -> list[str]:
    """The settings of `train_command`."""
    data = [f"data.shards={shards / 'shards'}", f"data.validation_shards={shards / 'shards_validation'}"]
    return [*TINY, *data, f"run_dir={run_dir}", *overrides]


def run(arguments: list[str], *, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run to its end and check the exit code. One that hangs is killed with all processes that it started."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(arguments, env=environment(), cwd=cwd, start_new_session=True, **pipes)
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # grandchildren too: they hold the pipes open
        out, err = process.communicate()
        pytest.fail(f"no end after 300 s\n{out[-2000:]}\n{err[-4000:]}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, f"exit code {process.returncode}\n{out[-2000:]}\n{err[-4000:]}"
    return subprocess.CompletedProcess(arguments, code, out, err)


def losses(run_dir: Path) -> list[str]:
    """Lines of losses.jsonl."""
    return (run_dir / "losses.jsonl").read_text().splitlines()


def kill_at(arguments: list[str], run_dir: Path, line: int, *, checkpoint: int) -> None:
    """Start a run and SIGKILL it, loader processes included, once it has written `line` losses and a checkpoint."""
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 120
    path = run_dir / "losses.jsonl"
    written = run_dir / "checkpoints" / f"step-{checkpoint:08d}"
    while not (path.exists() and len(path.read_text().splitlines()) >= line and written.exists()):
        assert process.poll() is None, process.stderr.read().decode()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
