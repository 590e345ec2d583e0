"""Ranks of a small loop of all-reduces under watch, one of which does something in step 3."""

import os
import signal
import sys
import time
from pathlib import Path

from kairos_train.basics.errors import EXIT_CODES, UserError
from kairos_train.config.operation_schema import WatchConfig
from kairos_train.operations.watch.liveness import Liveness, open_liveness

STEPS, STEP = 5, 3


def live(rank: int, size: int, folder: Path, watch: WatchConfig, deed: str, who: int, host: str | None) -> None:
    """One rank, from its start to its end; what it says goes to `rank-N.log`."""
    with (folder / f"rank-{rank}.log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=rank, world_size=size)
    try:
        with open_liveness(watch, stacks=folder / "stacks", host=host) as liveness:
            loop(liveness, rank, deed if rank == who else "", together=not deed.startswith("apart"))
    except tuple(EXIT_CODES) as error:
        print(f"raised: {error}", file=sys.stderr)
        sys.exit(next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind)))
    if deed == "leave last":
        time.sleep(0.1)


def loop(liveness: Liveness, rank: int, deed: str, *, together: bool) -> None:
    import torch
    import torch.distributed as dist

    for step in range(1, STEPS + 1):
        liveness.at(step, "data")
        if step == STEP:
            do(deed, liveness)
        liveness.at(step, "forward")
        if together:
            dist.all_reduce(torch.ones(2))
        elif step == STEP:
            time.sleep(300)  # as a collective that never returns
    if deed == "leave last":
        time.sleep(2)


def do(deed: str, liveness: Liveness) -> None:
    if deed == "stop":
        time.sleep(2)  # until the others have heard of this step
    if deed in ("kill", "apart: kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif deed == "hang":
        dawdle()
    elif deed == "raise":
        raise ValueError("the tape ran out\nof reels")
    elif deed == "bad input":
        raise UserError("data.shards=x has no samples; pack it again")
    elif deed == "pause":
        with liveness.paused("compile"):
            time.sleep(9)


def dawdle() -> None:
    time.sleep(300)
