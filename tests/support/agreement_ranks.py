"""One rank of the tests of what ranks agree on before a run starts, and of the health check."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import kairos_train
from kairos_train.basics.errors import UserError
from kairos_train.config.compose import load_config
from kairos_train.operations.preflight.agreement import agree
from kairos_train.operations.preflight.collective import Collective, try_all_reduce
from kairos_train.operations.preflight.health import check_health
from parallel.consensus import any_rank, first_does
from parallel.topology import Degrees, Topology


def agreed(run_dir: str, overrides: list[list[str]], *, checkpoint_bytes: float, old_rank: int | None = None) -> Any:
    """What `agree` gives or says on this rank with its own overrides; `old_rank` runs another version."""
    rank, size = dist.get_rank(), dist.get_world_size()
    config = load_config([f"run_dir={run_dir}", *overrides[rank]], sections=())
    version = kairos_train.__version__
    if rank == old_rank:
        kairos_train.__version__ = "0.0.0"
    try:
        return agree(config, checkpoint_bytes=checkpoint_bytes, size=size)
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        kairos_train.__version__ = version


def set_on_any_rank(flags: list[list[bool]]) -> list[bool]:
    """What `any_rank` makes of each rank's flags."""
    size = dist.get_world_size()
    return any_rank(flags[dist.get_rank()], Topology.build(Degrees(data=size), torch.device("cpu")))


def first_raises(kind: str) -> tuple[str, str]:
    """What every rank sees of an error of rank 0, and that a collective after it still works."""
    rank, size = dist.get_rank(), dist.get_world_size()

    def fail() -> None:
        raise {"UserError": UserError, "KeyError": KeyError}[kind]("of rank 0")

    try:
        first_does(fail, rank=rank, size=size)
    except Exception as error:
        seen = type(error).__name__, str(error)
    assert first_does(lambda: "done", rank=rank, size=size) == ("done" if rank == 0 else None)
    return seen


def health(folder: str) -> dict[str, Any]:
    return check_health("cpu", Path(folder), disk_bytes=2**23).numbers()


def health_without_the_last(folder: str, patience: float) -> str:
    """What is said when the last rank never comes to the end of its own checks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == size - 1:
        dist.all_gather_object([None] * size, "elsewhere")  # its host, and then nothing more
        time.sleep(3 * patience)
        return ""
    try:
        check_health("cpu", Path(folder), patience=patience, disk_bytes=0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "healthy"


def reduced(claimed: list[int], *, late: int | None = None) -> Collective | None:
    """An all-reduce in which each rank gives the numbers of the rank it claims to be, and one may come late."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == late:
        time.sleep(3)
        dist.all_reduce(torch.zeros(1024))  # the group is good again for others
        return None
    settings = {"nbytes": 4096, "rank": claimed[rank], "size": size, "group": None, "patience": 1.0}
    return try_all_reduce(torch.device("cpu"), **settings)
