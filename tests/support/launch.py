"""Start worker scripts as real processes, as torchrun would."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")


def launch(script: str, arguments: list[object], *, size: int, logs: Path) -> list[subprocess.Popen]:
    """Start the processes of one world; a world of one gets nothing of a launcher's environment."""
    clean = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    clean["PYTHONPATH"] = f"{HERE.parents[1]}:{HERE.parent}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(size)}
    processes = []
    for rank in range(size):
        own = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
        with open(logs / f"{len(list(logs.glob('*.log')))}-{size}-{rank}.log", "w") as log:
            command = [sys.executable, str(HERE / script), *map(str, arguments)]
            processes.append(subprocess.Popen(command, env={**clean, **own}, stdout=log, stderr=subprocess.STDOUT))
    return processes


def finish(processes: list[subprocess.Popen], *, logs: Path) -> None:
    """Wait for all to end well; the first that fails ends the others and shows the logs."""
    deadline = time.monotonic() + 300
    try:
        while any(process.poll() is None for process in processes):
            failed = any(process.poll() not in (None, 0) for process in processes)
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        text = "\n".join(path.read_text()[-3000:] for path in sorted(logs.glob("*.log")))
        assert [process.poll() for process in processes] == [0] * len(processes), text
    finally:
        for process in processes:
            process.kill()
            process.wait()
