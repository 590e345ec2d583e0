"""Fixtures shared by all tests."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.pool import Pool

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices: more threads only wait for each other, and for those of the processes that tests start."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference vectors and sample datasets beside the checkout.

    Users do not have it: their tests skip with the reason. With `CI=true` its absence is an error.
    """
    if not SHARED.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{SHARED} is missing: continuous integration needs the reference vectors and samples")
        pytest.skip("needs the reference vectors and samples in ../shared")
    return SHARED


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], Pool]]:
    """`world(n)`: the session's processes for world size n, started at first use."""
    pools: dict[int, Pool] = {}
    yield lambda size: pools.setdefault(size, Pool(size))
    for pool in pools.values():
        pool.close()
