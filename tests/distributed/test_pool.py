"""The pool that other tests stand on: results by rank, failures with their traceback, hangs ended."""

import os
import time

import pytest
import torch
import torch.distributed as dist


def rank_sum(x: int) -> tuple[int, int]:
    total = torch.tensor(x * (dist.get_rank() + 1))
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fail_on(rank: int) -> int:
    if dist.get_rank() == rank:
        raise ValueError("broken on purpose")
    return os.getpid()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def test_every_rank_answers(world):
    assert world(2).run(rank_sum, 2) == [(0, 6), (1, 6)]


def test_processes_are_kept_between_calls(world):
    assert world(2).run(fail_on, -1) == world(2).run(fail_on, -1)


def test_a_failing_rank_is_named_with_its_traceback_and_the_next_call_works(world):
    with pytest.raises(AssertionError, match=r"rank 1: (?s:.*)ValueError: broken on purpose"):
        world(2).run(fail_on, 1)
    assert world(2).run(rank_sum, 1) == [(0, 3), (1, 3)]


def test_a_hanging_rank_is_ended(world):
    with pytest.raises(AssertionError, match=r"rank 1: no answer in 1 s"):
        world(2).run(hang_on, 1, timeout=1)
