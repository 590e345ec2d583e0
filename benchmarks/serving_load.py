"""Load on a policy server: N clients that ask as fast as they are answered, for a time.

The server runs as `kairos-train serve` in a process of its own on this machine, the clients in threads of this one,
over loopback. Without --export it serves a random `model=tiny` in LIBERO's form: two pictures of 224 × 224, 301 kB a
request. A request is lost when it brings no reply, an error, or actions of a wrong shape or not finite. At the end the
server is stopped by SIGTERM, and must have counted as many requests as the clients.

    python benchmarks/serving_load.py [--export DIR] [--clients 32] [--seconds 60] [--serve OPTIONS] [--quick]

The last line is one JSON object: `requests`, `lost`, `p50_ms`, `p99_ms`, `clients`, details; `beside_model_p50_ms` is
what a reply took beside its batch's time in the model: queue, codec and socket. Exit code 1 when a request is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kairos_train.checkpoint.writing import write_checkpoint
from kairos_train.conditioning.build import build_encoders
from kairos_train.config.compose import load_config, to_yaml
from kairos_train.model import WorldActionModel
from kairos_train.model.initialise import initialise
from kairos_train.serving.client import PolicyClient
from kairos_train.weights.export import export

LIBERO = ("observation.images.image", "observation.images.wrist_image")
SECTIONS = ("model", "encoders", "stage")


def random_export(folder: Path) -> Path:
    """A random tiny model in LIBERO's form, exported in float32."""
    overrides = ["model=tiny", "encoders=weight_free", "data=libero", f"data.window.cameras=[{','.join(LIBERO)}]"]
    sizes = ["model.action.action_dim=7", "model.action.state_dim=8"]
    config = load_config([*overrides, *sizes, "data.shards=unused"], sections=SECTIONS)
    model = WorldActionModel(config.model)
    initialise(model, 0)
    names = ("min", "max", "mean", "std", "q01", "q99")
    statistics = {
        group: {key: {f"global_{name}": [value] * dim for name, value in zip(names, (-1.0, 1.0, 0.0, 1.0, -1.0, 1.0))}}
        for group, key, dim in (
            ("action", config.data.window.action_key, config.model.action.action_dim),
            ("state", config.data.window.state_key, config.model.action.state_dim),
        )
    }
    weights = dict(model.state_dict())
    write_checkpoint(
        folder / "checkpoints",
        0,
        sections={"model": weights},
        state={"encoders": build_encoders(config.encoders).identity},
        files={"config.yaml": to_yaml(config), "dataset_stats.json": json.dumps(statistics)},
    )
    export(folder / "checkpoints", folder / "export", weights="raw", dtype="fp32")
    return folder / "export"


@contextmanager
def served(folder: Path, options: list[str]) -> Iterator[int]:
    """The port of a server; ended by SIGTERM, which must end it with exit code 0."""
    command = [sys.executable, "-m", "kairos_train.cli", "serve", str(folder), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            if not (port := re.search(r"ws://\S+:(\d+) ", line)):
                raise SystemExit("the server did not start")
            yield int(port[1])
            process.send_signal(signal.SIGTERM)
            if code := process.wait(timeout=60):
                raise SystemExit(f"the server ended with exit code {code}")
        finally:
            if process.poll() is None:
                process.kill()


@dataclass
class LoadOutcome:
    """What one client saw: seconds per reply, the part of them outside the model, and what went wrong."""

    seconds: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def observation_for(metadata: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Random pictures of 224 × 224 and a state, under the keys of the model's dataset."""
    pictures = {key: rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for key in metadata["cameras"]}
    (state,) = (key for key in metadata["observation_keys"]["dataset"] if key not in (*pictures, "prompt"))
    return {**pictures, state: rng.uniform(-1, 1, metadata["state_dim"]).astype(np.float32)}


def ask(client: PolicyClient, number: int, ready: threading.Barrier, seconds: float, outcome: LoadOutcome) -> None:
    """One client: request after request until the time is over."""
    metadata, rng = client.metadata, np.random.default_rng(number)
    observation = observation_for(metadata, rng) | {"prompt": f"put the bowl on plate {number}"}
    shape = (metadata["horizon"], metadata["action_dim"])
    ready.wait()
    end = time.monotonic() + seconds
    while (started := time.monotonic()) < end:
        try:
            reply = client.infer(observation)
        except Exception as error:  # whatever it is, the request is lost
            outcome.lost.append(f"{type(error).__name__}: {error}")
            continue
        took = time.monotonic() - started
        outcome.seconds.append(took)
        outcome.beside.append(took - reply["server_timing"]["infer_ms"] / 1000)
        actions = reply["actions"]
        if actions.shape != shape or not np.isfinite(actions).all():
            outcome.lost.append(f"actions of shape {actions.shape}, finite: {np.isfinite(actions).all()}")


def load(port: int, count: int, seconds: float) -> list[LoadOutcome]:
    """All clients at once; one outcome each."""
    outcomes = [LoadOutcome() for _ in range(count)]
    clients = [PolicyClient(f"ws://127.0.0.1:{port}") for _ in outcomes]
    for client in clients:
        assert client.metadata  # connected
    ready = threading.Barrier(count)
    threads = [
        threading.Thread(target=ask, args=(client, number, ready, seconds, outcome))
        for number, (client, outcome) in enumerate(zip(clients, outcomes))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in clients:
        client.close()
    return outcomes


def metrics(port: int) -> dict[str, float]:
    """The server's own counts by name."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, help="what is served; a random tiny model by default")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--serve", default="", metavar="OPTIONS", help="further options of kairos-train serve")
    parser.add_argument("--quick", action="store_true", help="8 clients for 8 s, under 50 s in all")
    args = parser.parse_args()
    clients, seconds = (8, 8.0) if args.quick else (args.clients, args.seconds)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}; torch {torch.__version__}; {clients} clients for {seconds:g} s", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = args.export or random_export(Path(name))
        with served(folder, shlex.split(args.serve)) as port:
            outcomes = load(port, clients, seconds)
            counted = metrics(port)
    result = {"machine": machine, "clients": clients, "seconds": seconds} | summary(outcomes, counted, seconds)
    print(
        f"{result['requests']} requests, {result['lost']} lost; p50 {result['p50_ms']} ms, p99 {result['p99_ms']} ms;"
        f" {result['per_second']} a second in batches of {result['mean_batch']} on average"
    )
    print(json.dumps(result))
    return 1 if result["lost"] else 0


def summary(outcomes: list[LoadOutcome], counted: dict[str, float], seconds: float) -> dict[str, float]:
    """Numbers of all clients together; what was lost is printed by reason."""
    times, beside = (np.array([t for o in outcomes for t in getattr(o, name)]) for name in ("seconds", "beside"))
    lost = [reason for outcome in outcomes for reason in outcome.lost]
    for reason in sorted(set(lost)):
        print(f"lost {lost.count(reason)}: {reason}")
    replies = int(counted["kairos_policy_requests_total"])
    if len(times) != replies:
        print(f"the clients had {len(times)} replies, the server sent {replies}")
    return {
        "requests": max(len(times), replies) + sum(len(outcome.lost) for outcome in outcomes),
        "lost": len(lost) + abs(len(times) - replies),
        "p50_ms": round(float(np.percentile(times, 50)) * 1000, 1),
        "p99_ms": round(float(np.percentile(times, 99)) * 1000, 1),
        "beside_model_p50_ms": round(float(np.percentile(beside, 50)) * 1000, 1),
        "per_second": round(len(times) / seconds, 1),
        "mean_batch": round(counted["kairos_policy_batch_size_sum"] / counted["kairos_policy_batch_size_count"], 2),
        "fewest_of_a_client": min(len(outcome.seconds) for outcome in outcomes),
    }


if __name__ == "__main__":
    sys.exit(main())
