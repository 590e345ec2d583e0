"""The dataset of the chaos runs, and SIGKILL of its packing."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from chaos_parts.attempt import SETTINGS
from chaos_parts.faults import FaultOutcome

from kairos_train.basics.files import sha256_of

SHARD_SAMPLES = 16
EPISODES = 4  # of each of the two tasks


def make_shards(home: Path, *, episodes: int = EPISODES) -> Path:
    """A simulated dataset of the pushing task, packed with encodings into many small shards."""
    from dataloaders.simulators.collect import simulate

    simulate(env="push2d", tasks=[], size=32, processes=1, episodes_per_task=episodes, out=home / "dataset")
    out = home / "shards"
    subprocess.run(pack_command(home / "dataset", out), check=True, stdout=subprocess.DEVNULL)
    return out


def pack_command(dataset: Path, out: Path) -> list[str]:
    """`kairos-train data pack` as a process."""
    words = ["data", "pack", dataset, "--out", out, "--encode", "--shard-samples", SHARD_SAMPLES, *SETTINGS]
    return [sys.executable, "-m", "kairos_train.cli", *map(str, words)]


def pack_through_kills(home: Path, expected: Path, rng: random.Random) -> tuple[FaultOutcome, bool]:
    """Pack, SIGKILL once some shards are written, pack again; whether every file is as in `expected`."""
    out = home / "packed"
    shutil.rmtree(out, ignore_errors=True)
    total = len(list(expected.glob("*.tar")))
    wanted = rng.randrange(0, total)
    process = subprocess.Popen(
        pack_command(home / "dataset", out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and _shards_written(home, out.name) < wanted:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.1))
    written = _shards_written(home, out.name)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    begin = time.monotonic()
    subprocess.run(pack_command(home / "dataset", out), check=True, stdout=subprocess.DEVNULL)
    outcome = FaultOutcome("kill_pack", written, f"SIGKILL of packing after {written} of {total} shards")
    outcome.recovered = time.monotonic() - begin
    left = [path for path in home.iterdir() if out.name in path.name and path != out]
    return outcome, _digests(out) == _digests(expected) and not left


def _shards_written(home: Path, name: str) -> int:
    """Shards below all folders whose names have `name` in them; folders that go meanwhile are skipped."""
    found = (files for folder, _, files in os.walk(home) if name in folder)
    return sum(file.endswith(".tar") for files in found for file in files)


def _digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
