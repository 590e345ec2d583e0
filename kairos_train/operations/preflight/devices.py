"""GPUs as the driver sees them, before this process takes one: who else uses them, and is their memory sound."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from kairos_train.basics.errors import MachineFault

FIELDS = (
    *("index", "uuid", "name", "memory.used", "memory.total", "utilization.gpu"),
    *("ecc.errors.uncorrected.volatile.total", "driver_version"),
)
"""What `nvidia-smi` is asked for; in MiB and percent."""

OWN_MEMORY = 2**30  # bytes that the driver itself may hold on an idle GPU
LITTLE_USE = 5  # percent
PATIENCE = 30.0  # seconds; a GPU that hangs makes nvidia-smi hang


@dataclass(frozen=True)
class Gpu:
    """A GPU at one moment."""

    index: int
    uuid: str
    name: str
    used: int  # bytes
    total: int  # bytes
    utilisation: int | None  # percent of the last moment
    ecc_errors: int | None  # memory errors since the driver was loaded that were not corrected; None: not counted
    driver: str

    def problems(self) -> list[str]:
        """Why it should not be trained on, as it was found before this process touched it."""
        found = []
        if self.used > OWN_MEMORY:
            found.append(f"others use {self.used / 1e9:.1f} GB of its memory; end them")
        if self.utilisation is not None and self.utilisation > LITTLE_USE:
            found.append(f"it is busy ({self.utilisation} %) with the work of others; end it")
        if self.ecc_errors:
            found.append(f"{self.ecc_errors} uncorrected memory errors; drain the node and reset the GPU")
        return found


def list_gpus() -> list[Gpu]:
    """The GPUs of this machine, by nvidia-smi.

    Raises:
        MachineFault: nvidia-smi is not there, fails, or does not answer.
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        raise MachineFault("nvidia-smi is not installed; install it with the driver")
    arguments = [command, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise MachineFault(f"nvidia-smi did not answer in {PATIENCE:g} s; the driver or a GPU hangs") from None
    if answer.returncode:
        said = " ".join((answer.stdout + answer.stderr).split())
        raise MachineFault(f"nvidia-smi failed (exit code {answer.returncode}): {said}")
    return parse_gpus(answer.stdout)


def parse_gpus(text: str) -> list[Gpu]:
    """What nvidia-smi printed for FIELDS.

    Raises:
        MachineFault: something else.
    """
    gpus = []
    for line in filter(str.strip, text.splitlines()):
        values = [value.strip() for value in line.split(",")]
        try:
            index, uuid, name, used, total, utilisation, errors, driver = values
            gpus.append(
                Gpu(
                    index=int(index),
                    uuid=uuid,
                    name=name,
                    used=int(used) * 2**20,
                    total=int(total) * 2**20,
                    utilisation=_number(utilisation),
                    ecc_errors=_number(errors),
                    driver=driver,
                )
            )
        except ValueError:
            raise MachineFault(
                f"nvidia-smi printed {line.strip()!r} where {', '.join(FIELDS)} were asked for"
            ) from None
    return gpus


def _number(text: str) -> int | None:
    """None for "[N/A]" and its kin: not every GPU counts everything."""
    return int(text) if text.isdecimal() else None
