"""A process that writes many files and is killed among them."""

import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def kill_among_files(code: str, folder: Path, *, after: int) -> None:
    """Run Python code that prints "ready" and then writes a checkpoint into `folder`; SIGKILL behind `after` files."""
    writer = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert writer.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 30
        while len(list(folder.glob(".tmp-*/*.safetensors"))) < after:
            assert time.monotonic() < deadline
            assert writer.poll() is None
            time.sleep(0.001)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    assert writer.returncode == -signal.SIGKILL
