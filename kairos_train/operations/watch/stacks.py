"""What every thread of this process is doing, written to files: Python stacks, and torch's record of collectives."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path

from kairos_train.basics.files import replacing, write_whole

RECORD_SECONDS = 10.0  # a record that takes longer is left


def write_stacks(folder: Path, *, rank: int, heading: str) -> list[Path]:
    """Write `rank-00003.txt`, and beside it torch's flight recorder where it has recorded anything.

    The latter are pickles of plain dictionaries, `collectives_3` (gloo) and `nccl_3`: `entries` holds the collectives,
    the newest last, each with its name, sizes, sequence number and state. The text says of each whether there is one.

    Args:
        folder: made when it is not there.
        rank: of this process.
        heading: its first line.

    Returns:
        The files.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{rank:05d}.txt"
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        names = ", ".join(f"{thread.name} 0x{thread.ident:016x}" for thread in threading.enumerate() if thread.ident)
        file.write(f"{heading}\n{time.strftime('%Y-%m-%d %H:%M:%S %z')}, pid {os.getpid()}\nthreads: {names}\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    # Collectives come afterwards: where they hang, the record may hang with them.
    files, lines = [path], []
    for name, dump in (("collectives", "_dump_fr_trace"), ("nccl", "_dump_nccl_trace")):
        content, why = _record(dump)
        if content is None:
            lines.append(f"no record {name}_{rank}: {why}")
            continue
        target = folder / f"{name}_{rank}"
        write_whole(target, content)
        files.append(target)
        lines.append(f"record of collectives: {target.name}")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + "\n".join(lines) + "\n")
    return files


def _record(function: str) -> tuple[bytes | None, str]:
    """A flight recorder as a pickle, or None and why there is none."""
    try:
        from torch._C import _distributed_c10d as c10d
    except ImportError:
        return None, "this build of torch has no distributed package"
    if not hasattr(c10d, function):
        return None, f"this build of torch has no {function}"
    found: list[bytes] = []
    errors: list[str] = []

    def dump() -> None:
        try:
            # With stack traces the call never comes back outside of the main thread; Python's are in the text anyway.
            found.append(getattr(c10d, function)(includeStackTraces=False))
        except Exception as error:
            errors.append(f"{function} failed: {error}".splitlines()[0])

    thread = threading.Thread(target=dump, name="flight-recorder", daemon=True)
    thread.start()
    thread.join(RECORD_SECONDS)
    if found:
        return found[0], ""
    return None, errors[0] if errors else f"{function} did not come back within {RECORD_SECONDS:g} s"
