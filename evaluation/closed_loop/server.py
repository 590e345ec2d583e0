"""The policy server of an evaluation: the export's own as a child process, or one that runs already."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kairos_train.basics.errors import RunStopped, UserError
from kairos_train.basics.files import read_json
from kairos_train.inference.export_files import CONFIG_FILE, EXPORT, STATISTICS_FILE
from kairos_train.serving.client import PolicyClient, PolicyLost

GREET_SECONDS = 10.0  # in which a server must answer
END_SECONDS = 60


@contextmanager
def served(
    export: Path, *, log: Path, camera: str, max_batch: int, steps: int | None = None, device: str = "auto"
) -> Iterator[str]:
    """`kairos-train serve EXPORT` on a free port, ended at the end; its URL.

    Args:
        log: file for what the server has to say.
        camera: told to the server where the export names no cameras.
        max_batch: requests computed together at most.
        steps: of the sampler; None: as the export says.
        device: where it is computed.

    Raises:
        UserError: the export cannot be served.
        RunStopped: the server does not start, for another reason.
    """
    command = [sys.executable, "-m", "kairos_train.cli", "serve", str(export), "--port", "0", "--device", device]
    command += ["--max-batch", str(max_batch)]
    if steps is not None:
        command += ["--steps", str(steps)]
    if not names_cameras(export):
        command += ["--cameras", camera]
    with open(log, "w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        try:
            line = process.stdout.readline()
            if (found := re.search(r" at (ws://\S+:\d+) ", line)) is None:
                code = process.wait()
                said.seek(0)
                last = (said.read().strip().splitlines() or ["it said nothing"])[-1]
                raise (UserError if code == 2 else RunStopped)(f"{export}: cannot be served: {last}")
            yield found[1]
        finally:
            process.send_signal(signal.SIGTERM)  # harmless where it has ended
            try:
                process.wait(timeout=END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def names_cameras(export: Path) -> bool:
    """Whether the server knows an export's cameras without being told. UserError for a folder that is no export."""
    described = read_json(Path(export) / CONFIG_FILE, remedy=EXPORT)
    try:
        return bool((described.get("robot") or described["run"]["data"]["window"])["cameras"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{Path(export) / CONFIG_FILE}: describes no run; export again, standalone") from error


def picture_side(export: Path) -> int:
    """Pixels of the square pictures that an export was trained on."""
    window = read_json(Path(export) / CONFIG_FILE, remedy=EXPORT)["run"]["data"]["window"]
    return max(window["height"], window["width"])


def ask_metadata(url: str, token: str | None) -> dict[str, Any]:
    """What a server says of its policy. UserError when there is none, or another kind of server."""
    try:
        with PolicyClient(url, token=token, connect_timeout=GREET_SECONDS) as client:
            metadata = client.metadata
    except PolicyLost as error:
        raise UserError(f"server={url}: {error}; start one with `kairos-train serve`") from error
    wanted = ("horizon", "cameras", "action_dim", "state_dim", "observation_keys", "given_frames", "model")
    if missing := [key for key in wanted if key not in metadata]:
        raise UserError(f"server={url}: does not tell {', '.join(missing)}; start one with `kairos-train serve`")
    return metadata


def check_same(metadata: dict[str, Any], export: Path) -> None:
    """UserError unless a server serves this export."""
    described = read_json(Path(export) / CONFIG_FILE, remedy=EXPORT)
    pairs = {key: (value, described.get(key)) for key, value in metadata["model"].items()}
    pairs[STATISTICS_FILE] = (metadata.get("statistics_sha256"), described.get("statistics_sha256"))
    for name, (there, here) in pairs.items():
        if there != here:
            raise UserError(
                f"server: serves another policy than {export} ({name} is {there}, not {here}); leave it out"
            )
