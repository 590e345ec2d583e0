"""`kairos-train verify parallel`: the asked layout beside one process, in processes of their own.

Alone, the command starts the layout's processes itself; under torchrun or srun it is one of them. The reference runs in
a process of its own in either case. Traces travel as files.

    python -m kairos_train.training.parity.verify CONFIG STEPS OUT      one process of either
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from kairos_train.basics.errors import UserError
from kairos_train.basics.files import replacing
from kairos_train.config.compose import load_saved, save_config
from kairos_train.config.schema import Config
from kairos_train.model.layout import check_layers
from kairos_train.training.describe import chosen_kernels
from kairos_train.training.engine.deepspeed_engine import device_kind, stop_processes
from kairos_train.training.parity.compare import (
    Deviation,
    Trace,
    compare,
    exact_config,
    low_precision,
    reference_config,
    run_steps,
)
from parallel.topology import Degrees

SECTIONS = (
    *("model", "kernels", "stage", "optimizer", "parallel", "precision", "train", "data.clips"),
    *(f"data.window.{key}" for key in ("frames", "height", "width", "action_video_freq_ratio")),
)
"""What of a configuration is used, and must have a value."""

ERROR = re.compile(r"^(?:\[\w+\]: ?)?(?:\w+\.)*(\w*(?:Error|Fault|Exception): .+)$", re.M)
"""The last line of a traceback, behind the rank that torchrun puts before it; not the line that raises."""

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher leaves in the environment of its processes and the reference must not see."""


def verify_parallel(config: Config, *, steps: int, ranks: int | None) -> list[Deviation] | None:
    """Train `steps` steps in one process and in `config.parallel`, and compare.

    Args:
        ranks: processes to start, a multiple of tensor × context; None: that product. Ignored under a launcher.

    Returns:
        The deviations; None on the ranks of a launcher that do not report.

    Raises:
        UserError: the processes do not divide, this machine cannot do what the configuration asks for, or one of the
            processes failed.
    """
    check_layers(config)
    chosen_kernels(config.kernels, torch.device(device_kind(config.train.device)), precision=config.train.precision)
    with tempfile.TemporaryDirectory(prefix="verify-parallel-") as folder:
        expected, exact, got = (Path(folder) / f"{name}.safetensors" for name in ("one_process", "float32", "layout"))
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            ranks = int(os.environ["WORLD_SIZE"])
            Degrees.of(config.parallel, ranks)
            trace = run_steps(config, steps)
            stop_processes()
            if trace is None:
                return None
            trace.save(got)
        else:
            ranks = ranks or config.parallel.tensor * config.parallel.context
            Degrees.of(config.parallel, ranks)
            _run(config, steps, got, ranks=ranks)
        _run(reference_config(config, ranks), steps, expected, ranks=1)
        if low_precision(config):
            _run(exact_config(config, ranks), steps, exact, ranks=1)
        return compare(
            Trace.load(expected), Trace.load(got), config, exact=Trace.load(exact) if low_precision(config) else None
        )


def report(deviations: list[Deviation], ranks: str) -> str:
    """A table; the last line says which tensor departs first, if one does."""
    lines = [f"{ranks} beside one process:", f"  {'':14} {'worst':>9}  {'allowed':>9}"]
    for d in deviations:
        word = "worst" if d.ok else "first beyond"
        lines.append(f"  {d.what:14} {d.value:9.2e}  {d.allowed:9.0e}  {'ok  ' if d.ok else 'FAIL'}  {word}: {d.first}")
    broken = [d for d in deviations if not d.ok]
    lines.append("equal" if not broken else f"departs first in {broken[0].what}: {broken[0].first}")
    return "\n".join(lines)


def _run(config: Config, steps: int, out: Path, *, ranks: int) -> None:
    """`ranks` processes that train `config` and leave the trace in `out`."""
    saved = out.with_suffix(".yaml")
    save_config(config, saved, secrets=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", __spec__.name, str(saved), str(steps), str(out)]
    clean = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    clean.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: ranks share the cores
    done = subprocess.run(command, env=clean, capture_output=True, text=True)
    if done.returncode:
        story = re.search(ERROR, done.stderr)
        said = story[1] if story else (done.stderr.splitlines() or ["no word"])[-1].strip()
        raise UserError(f"verify parallel: {ranks} process(es) ended with {done.returncode}: {said}")


def main() -> None:
    """One process of a layout or the reference."""
    config, steps, out = sys.argv[1:]
    trace = run_steps(load_saved(config, sections=SECTIONS), int(steps))
    if trace is not None:
        with replacing(out) as temporary:
            trace.save(temporary)
    stop_processes()


if __name__ == "__main__":
    main()
