"""A policy server in a thread of this process, or in a process of its own, for tests."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from websockets.sync.client import ClientConnection, connect

from kairos_train.serving.policy import ServedPolicy
from kairos_train.serving.server import PolicyServer, ServerSettings

CAMERA, STATE = "observation.images.top", "observation.state"


@dataclass(frozen=True)
class Running:
    """A server that listens on `port`."""

    port: int

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def get(self, path: str, **headers: str) -> str:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.read().decode()

    def metric(self, name: str, **headers: str) -> float:
        """The value of one sample, as `kairos_policy_requests_total`."""
        return float(re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics", **headers), re.M)[1])


@contextmanager
def in_thread(policy: ServedPolicy, **settings) -> Iterator[Running]:
    """Stopped at the end; raises what the server raised."""
    ready, ports, errors = threading.Event(), [], []
    control: dict = {}

    async def main() -> None:
        control["loop"], control["stop"] = asyncio.get_running_loop(), asyncio.Event()

        def listening(port: int) -> None:
            ports.append(port)
            ready.set()

        await PolicyServer(policy, ServerSettings(port=0, **settings)).run(control["stop"], listening)

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            errors.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        ready.wait()
        if errors:
            raise errors[0]
        yield Running(ports[0])
    finally:
        if not errors:
            control["loop"].call_soon_threadsafe(control["stop"].set)
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def in_process(export: Path, *options: str, prefix: Sequence[str] = ()) -> Iterator[tuple[subprocess.Popen, Running]]:
    """`kairos-train serve`, once it listens; killed at the end if it still runs.

    Args:
        prefix: words in front of the command.
    """
    command = [*prefix, sys.executable, "-m", "kairos_train.cli", "serve", str(export), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield process, Running(int(re.search(r"ws://127.0.0.1:(\d+)", line)[1]))
        finally:
            if process.poll() is None:
                process.kill()


def observation(seed: int) -> dict:
    """For the model of `exported`."""
    rng = np.random.default_rng(seed)
    return {
        CAMERA: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
        STATE: rng.uniform(-1, 1, 2).astype(np.float32),
        "prompt": f"push square {seed % 3}",
        "seed": seed,
    }


def open_socket(server: Running, **options) -> ClientConnection:
    """A bare connection, past the metadata."""
    websocket = connect(server.url, compression=None, max_size=None, **options)
    websocket.recv()
    return websocket


def ask(websocket: ClientConnection, message: bytes | str) -> bytes | str:
    websocket.send(message)
    return websocket.recv(timeout=120)


def accepted(server: Running) -> float:
    """Requests that the server has taken on, answered or not."""
    return server.metric("kairos_policy_waiting") + server.metric("kairos_policy_requests_total")


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)
