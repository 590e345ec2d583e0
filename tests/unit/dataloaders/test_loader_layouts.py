"""The order of samples does not know who reads it: layouts, workers, resumption in another world."""

import json
from collections import Counter
from functools import cache, partial
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.toy_shards import keys_of, take, toy_key, toy_loader, write_clips, write_folder

from dataloaders.config import SourceConfig
from dataloaders.loading.streams import SourceOrder, default_streams
from dataloaders.shards import read_index

COUNTS = [7, 5, 1, 6, 7, 6, 4, 2]  # 38 samples
LAYOUTS = [  # micro-batch, accumulation, data ranks: 12 samples per step
    (12, 1, 1),
    (1, 12, 1),
    (3, 4, 1),
    (2, 1, 6),
    (1, 4, 3),
    (3, 2, 2),
    (1, 1, 12),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("layouts") / "shards", COUNTS)


def _ranks(folder, layout, **changes):
    micro_batch, accumulation, world_size = layout
    return [
        toy_loader(
            folder, batch_size=micro_batch, accumulation=accumulation, rank=rank, world_size=world_size, **changes
        )
        for rank in range(world_size)
    ]


def _steps(ranks, steps):
    """Sorted keys of each global step."""
    accumulation = ranks[0].share.accumulation
    return [sorted(key for rank in ranks for key in keys_of(take(rank, accumulation))) for _ in range(steps)]


def test_every_layout_trains_on_the_same_samples_at_every_step(folder):
    wanted = _steps(_ranks(folder, LAYOUTS[0]), 12)
    for layout in LAYOUTS[1:]:
        assert _steps(_ranks(folder, layout), 12) == wanted, layout


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder, workers):
    wanted = keys_of(take(toy_loader(folder, accumulation=3), 24))
    loader = toy_loader(folder, accumulation=3, workers=workers)
    assert keys_of(take(loader, 24)) == wanted
    loader.close()


def test_peers_of_a_rank_get_the_same_batches(folder):
    a, b = (toy_loader(folder, rank=1, world_size=3) for _ in range(2))
    assert keys_of(take(a, 9)) == keys_of(take(b, 9))


@cache
def _order(folder) -> list[str]:
    return keys_of(take(toy_loader(folder, batch_size=1), 5 * sum(COUNTS)))


def test_every_sample_comes_once_per_epoch(folder):
    order, size = _order(folder), sum(COUNTS)
    for epoch in range(5):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == [toy_key(n) for n in range(size)]
    assert order[:size] != order[size : 2 * size]


# --- stopped and resumed ---


@pytest.fixture(scope="module")
def kinds(folder, tmp_path_factory):
    """Name -> sources and settings of the loader."""
    root = tmp_path_factory.mktemp("kinds")
    write_folder(root / "other", [4, 3], name="other")
    write_clips(root / "clips", [[(1, 32, 64, 9), (5, 32, 32, 4)], [(9, 64, 32, 3), (1, 32, 64, 2)], [(5, 32, 32, 6)]])
    other = SourceConfig(str(root / "other"), weight=1.0, max_epochs=2)
    return {
        "one source": ([SourceConfig(str(folder))], {}),
        "several sources": ([SourceConfig(str(folder), weight=2.0), other], {}),
        "token budget": ([SourceConfig(str(root / "clips"), weight=2.0), other], {"tokens_per_micro_batch": 40}),
    }


def _assert_each_sample_came_once_per_epoch(seen: Counter[str], state: dict, sources: list[SourceConfig]) -> None:
    """What has been given and what waits in buckets is, of every source, whole epochs and a part of one."""
    waiting = state["position"].get("waiting", [])
    assert seen.total() + len(waiting) == state["position"]["samples"]
    for number, source in enumerate(sources):
        counts = [shard.samples for shard in read_index(source.shards).shards]
        first, name = list(accumulate(counts, initial=0)), {"other": "other", "clips": "clip"}
        key_of = partial(toy_key, name=name.get(Path(source.shards).name, "toy"))
        settings = {"streams": state["streams"][number], "shuffle": state["shuffle_buffer"]}
        order = SourceOrder(counts, label=(state["seed"], number), **settings)
        waits = (order.sample(place) for s, place in waiting if s == number)
        held = Counter(key_of(first[shard] + row) for _, shard, row in waits)
        found = [seen[key_of(i)] + held[key_of(i)] for i in range(order.samples)]
        epochs, more = divmod(state["position"]["taken"][number], order.samples)
        assert sorted(found) == [epochs] * (order.samples - more) + [epochs + 1] * more, source.shards


def _run_phases(kind, phases) -> None:
    """Each phase: a layout, worker processes, steps up to the checkpoint, batches that a rank takes after it.

    Those are lost with the processes, which end wherever they are.
    """
    (sources, changes), seen, state = kind, Counter(), None
    for layout, workers, steps, lost in phases:
        ranks = _ranks(sources, layout, workers=workers, **changes)
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(json.loads(state))
        seen.update(key for keys in _steps(ranks, steps) for key in keys)
        states = {json.dumps(rank.state_dict()) for rank in ranks}
        assert len(states) == 1, "the state is one for all ranks"
        state = states.pop()
        _assert_each_sample_came_once_per_epoch(seen, json.loads(state), sources)
        for number, rank in enumerate(ranks):
            take(rank, lost * (number + 1) % 5)


LAYOUT = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 5))
SMALL_LAYOUT = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2))


@pytest.mark.parametrize("kind", ["one source", "several sources", "token budget"])
@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(LAYOUT, st.just(0), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4))
def test_stopped_anywhere_and_resumed_in_another_world_every_sample_comes_once(kinds, kind, phases):
    _run_phases(kinds[kind], phases)


@pytest.mark.parametrize("kind", ["one source", "several sources", "token budget"])
@settings(max_examples=4, deadline=None)
@given(
    st.lists(st.tuples(SMALL_LAYOUT, st.integers(0, 2), st.integers(1, 4), st.integers(0, 4)), min_size=2, max_size=3)
)
@example([((2, 1, 2), 2, 5, 1), ((1, 2, 1), 0, 5, 1), ((1, 1, 3), 1, 5, 1)])
def test_with_other_workers_too_every_sample_comes_once(kinds, kind, phases):
    _run_phases(kinds[kind], phases)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(LAYOUT, st.integers(0, 4)), min_size=1, max_size=4))
def test_resumed_in_another_world_the_order_goes_on(folder, phases):
    order, position, state = _order(folder), 0, None
    for layout, steps in phases:
        ranks = _ranks(folder, layout)
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        for keys in _steps(ranks, steps):
            if position + len(keys) <= len(order):
                assert keys == sorted(order[position : position + len(keys)])
            position += len(keys)
        state = ranks[-1].state_dict()
        assert state["position"]["samples"] == position


# --- the order itself ---


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    st.integers(1, 16),
    st.integers(0, 40),
    st.integers(0, 3),
)
def test_an_epoch_is_a_permutation_for_any_shards_streams_and_shuffle(counts, streams, shuffle, epoch):
    order = SourceOrder(counts, label=(0, 0), streams=streams, shuffle=shuffle)
    first = epoch * order.samples
    drawn = [order.sample(first + i) for i in range(order.samples)]
    assert {e for e, _, _ in drawn} == {epoch}
    assert sorted((s, r) for _, s, r in drawn) == [(s, r) for s, n in enumerate(counts) for r in range(n)]


def test_shuffling_moves_samples_but_not_far():
    order = SourceOrder([100] * 40, label=(0, 0), streams=4, shuffle=30)
    for stream in range(4):
        line = order._stream(0, stream).tolist()
        moved = [abs(at - (position - min(line))) for at, position in enumerate(line)]
        assert 15 < max(moved) <= 30
        assert sum(m > 0 for m in moved) > 0.9 * len(moved)
    unshuffled = SourceOrder([100] * 40, label=(0, 0), streams=4, shuffle=0)
    rows = [unshuffled.sample(4 * i)[2] for i in range(100)]
    assert rows == list(range(100))


def test_ranks_that_divide_the_streams_read_shards_of_their_own():
    order = SourceOrder([50] * 64, label=(0, 0), streams=16, shuffle=20)
    used = [{order.sample(place)[1] for place in range(rank, order.samples, 8)} for rank in range(8)]
    assert [len(shards) for shards in used] == [8] * 8


def test_a_place_is_found_without_going_through_those_before_it():
    order, fresh = (SourceOrder([50] * 8, label=(3, 0), streams=8, shuffle=20) for _ in range(2))
    walked = [order.sample(place) for place in range(1000)]
    assert fresh.sample(777) == walked[777]
    assert fresh.sample(10**9)[0] == 10**9 // 400


def test_the_order_is_the_same_in_every_version():
    """Constants: a run of years resumes with another numpy and Python."""
    order = SourceOrder([3, 4, 2, 5], label=(7, 0), streams=2, shuffle=4)
    assert [order.sample(place) for place in (0, 1, 2, 13, 14, 15)] == EXPECTED


EXPECTED = [(0, 0, 1), (0, 3, 4), (0, 0, 0), (0, 1, 2), (1, 0, 1), (1, 2, 0)]


@pytest.mark.parametrize(("shards", "streams"), [(1, 1), (2, 2), (3, 2), (8, 8), (63, 32), (64, 64), (10_000, 64)])
def test_default_streams_are_a_power_of_two_with_a_shard_each(shards, streams):
    assert default_streams(shards) == streams
