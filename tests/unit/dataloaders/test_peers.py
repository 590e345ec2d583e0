"""Ranks that share a sample compare what they have read."""

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support.toy_shards import keys_of, npy, take, toy_loader, toy_members, write_clips, write_folder

from dataloaders.loading.peers import check_same
from kairos_train.basics.errors import RunStopped

DATA_RANKS = [0, 0, 1, 1]
"""Of four processes: two peers each."""


class Meeting:
    """A gather over threads: everybody waits until all have brought their value."""

    def __init__(self, size: int) -> None:
        self._values: list = [None] * size
        self._barrier = threading.Barrier(size, timeout=30)
        self.held = 0

    def of(self, process: int) -> Callable[[object], list]:
        def gather(value: object) -> list:
            self._values[process] = value
            self._barrier.wait()
            values = list(self._values)
            if self._barrier.wait() == 0:
                self.held += 1
            return values

        return gather


def _train(folders, steps, accumulation=2, **changes):
    """Per process: the keys of `steps` global steps, or what it was stopped by; and how often all met."""
    meeting = Meeting(len(folders))

    def process(number: int):
        loader = toy_loader(
            folders[number],
            rank=DATA_RANKS[number],
            world_size=2,
            accumulation=accumulation,
            gather=meeting.of(number),
            **{"check_peers": True, "batch_size": 2} | changes,
        )
        try:
            return [keys_of(take(loader, accumulation)) for _ in range(steps)]
        except RunStopped as error:
            return error

    with ThreadPoolExecutor(len(folders)) as pool:
        return list(pool.map(process, range(len(folders)))), meeting.held


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("peers") / "shards", [7, 5, 6])


def test_peers_that_agree_train_on_and_meet_once_per_step(folder):
    found, met = _train([folder] * 4, steps=9)
    assert found[0] == found[1] != found[2] == found[3]
    assert met == 9


def test_without_the_flag_nobody_waits_for_anybody(folder):
    _, met = _train([folder] * 4, steps=3, check_peers=False)
    assert met == 0


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("latents.npy", np.full((16, 2, 4, 4), 7.5, np.float16)),
        ("action.npy", np.full((4, 3), 7.5, np.float32)),
        ("context.npy", np.full((3, 6), 7.5, np.float16)),
        ("context_long.npy", np.full((3, 6), 7.5, np.float16)),
    ],
)
def test_a_single_number_that_differs_stops_every_rank_with_the_names_of_all_concerned(tmp_path, member, value):
    """A copy of the shards on one machine that is not the same."""

    def members(number, other):
        changed = value.copy()
        changed[..., -1] += number == 10 and other
        return toy_members(number) | {member: npy(changed)}

    folders = [write_folder(tmp_path / str(i), [7, 5, 6], lambda n, other=i == 2: members(n, other)) for i in range(4)]
    found, met = _train(folders, steps=9, accumulation=1)
    assert len({str(error) for error in found}) == 1
    assert all(type(error) is RunStopped for error in found)
    text = str(found[0])
    pattern = r"data\.check_peers=true: .*of data rank 1 ([0-9a-f]{16}) on rank 2, ([0-9a-f]{16}) on rank 3; compare"
    assert re.match(pattern, text), text
    assert "data rank 0" not in text
    assert "\n" not in text
    assert 1 < met < 9, "in the step that has the sample"


def test_batches_of_other_shapes_and_stand_ins_differ_too(tmp_path):
    runs = [[(1, 32, 64, 9), (5, 32, 32, 8)]]
    one, two = (write_clips(tmp_path / name, runs) for name in ("one", "two"))
    settings = {"tokens_per_micro_batch": 32, "on_corrupt": "skip"}
    found, _ = _train([one] * 4, steps=3, **settings)
    assert all(isinstance(keys, list) for keys in found)
    path = two / "shard-000000.tar"
    path.write_bytes(path.read_bytes().replace(b'{"text": "clip 3"', b'["text": "clip 3"'))  # no JSON: a stand-in
    found, _ = _train([one, one, one, two], steps=9, **settings)
    assert all("of data rank 1 " in str(error) for error in found)


def test_several_processes_of_several_data_ranks_are_named():
    same = [(0, ["a", "b"]), (1, ["c", "d"]), (0, ["a", "b"])]
    check_same(same)
    check_same([])
    with pytest.raises(RunStopped, match=r"of data rank 0 a\+b on ranks 0, 2, a\+x on rank 4; of data rank 1 c\+d on "):
        check_same([*same, (1, ["c", "e"]), (0, ["a", "x"])])


def test_a_step_that_was_broken_off_is_compared_as_a_whole_when_it_comes_again(folder):
    """Digests of batches taken before a state was loaded do not count."""
    seen = []
    loader = toy_loader(folder, accumulation=2, check_peers=True, gather=lambda value: seen.append(value) or [value])
    state = loader.state_dict()
    take(loader, 1)
    loader.load_state_dict(state)
    first = [batch.digest() for batch in take(loader, 2)]
    assert seen == [(0, first)]
    assert isinstance(next(loader).latents, torch.Tensor)
