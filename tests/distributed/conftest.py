from collections.abc import Callable, Iterator

import pytest
from pool import Pool


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], Pool]]:
    """`world(n)`: the session's processes for world size n, started at first use."""
    pools: dict[int, Pool] = {}
    yield lambda size: pools.setdefault(size, Pool(size))
    for pool in pools.values():
        pool.close()
