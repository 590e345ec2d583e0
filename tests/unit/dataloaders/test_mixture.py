"""Several sources in one run: shares, repeat limits, one order for all layouts."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toy_shards import WINDOW, keys_of, npy, take, toy_key, toy_loader, toy_members, write_folder

from dataloaders.config import DataConfig, SourceConfig
from dataloaders.loading.loader import sources_of
from dataloaders.loading.mixture import Exhausted, Mixture
from kairos_train.basics.errors import UserError


def _mixture(samples, weights=None, max_epochs=None, temperature=1.0, seed=0):
    weights, max_epochs = weights or [None] * len(samples), max_epochs or [None] * len(samples)
    return Mixture(samples, weights, max_epochs, temperature=temperature, seed=seed)


def _shares(mixture, count=20_000):
    taken = Counter(source for source, _ in mixture.take(count))
    return [taken[i] / count for i in range(len(mixture.state_dict()["taken"]))]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"samples": [30, 10]}, [0.75, 0.25]),
        ({"samples": [30, 10], "weights": [1, 4]}, [0.2, 0.8]),
        ({"samples": [30, 10], "weights": [None, 90]}, [0.25, 0.75]),
        ({"samples": [30, 10, 5], "weights": [8, 1, 0], "temperature": 3}, [2 / 3, 1 / 3, 0]),
        ({"samples": [5, 5], "weights": [0, 0.1]}, [0, 1]),
    ],
)
def test_shares_are_the_weights_to_the_power_of_one_over_temperature(settings, wanted):
    assert _shares(_mixture(**settings)) == pytest.approx(wanted, abs=0.015)


def test_every_source_goes_through_its_own_order():
    mixture = _mixture([7, 5], weights=[2, 1])
    places = {0: [], 1: []}
    for source, place in mixture.take(500):
        places[source].append(place)
    assert all(found == list(range(len(found))) for found in places.values())
    assert mixture.state_dict() == {"samples": 500, "taken": [len(places[0]), len(places[1])]}


def test_a_source_is_repeated_no_more_often_than_it_may():
    mixture = _mixture([10, 4, 6], weights=[1, 1, 1], max_epochs=[None, 2, 1])
    drawn = Counter(source for source, _ in mixture.take(1000))
    assert (drawn[1], drawn[2]) == (8, 6)
    only = _mixture([10, 4], max_epochs=[2, 3])
    assert len(only.take(32)) == 32
    with pytest.raises(Exhausted):
        only.next()
    with pytest.raises(Exhausted):
        _mixture([10, 4], max_epochs=[2, 3]).take(33)


SOURCES = st.integers(1, 4).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 9), min_size=n, max_size=n),
        st.lists(st.sampled_from([None, 0.5, 1, 3]), min_size=n, max_size=n),
        st.lists(st.sampled_from([None, 1, 2, 5]), min_size=n, max_size=n),
    )
)


@settings(max_examples=60, deadline=None)
@given(SOURCES, st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 4))
def test_pieces_strides_and_resumption_give_the_same_sequence(sources, pieces, stride):
    samples, weights, limits = sources
    reference, wanted = _mixture(samples, weights, limits), []
    for _ in range(sum(pieces)):
        try:
            wanted.append(reference.next())
        except Exhausted:
            break
    mixture, got = _mixture(samples, weights, limits), 0
    for count in pieces:
        state = json.loads(json.dumps(mixture.state_dict()))
        mixture = _mixture(samples, weights, limits)
        mixture.load_state_dict(state)
        if got + count > len(wanted):
            with pytest.raises(Exhausted):
                mixture.take(count)
            return
        for first in range(1, min(stride, count)):
            again = _mixture(samples, weights, limits)
            again.load_state_dict(state)
            assert again.take(count, first=first, stride=stride) == wanted[got : got + count][first::stride]
        assert mixture.take(count, stride=stride) == wanted[got : got + count : stride]
        got += count


def test_the_choice_is_the_same_in_every_version():
    assert "".join(str(s) for s, _ in _mixture([3, 5, 4], seed=1).take(30)) == EXPECTED


EXPECTED = "221111210202222222112101220211"


# --- through the loader ---


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    write_folder(root / "a", [7, 5, 6], name="a")
    write_folder(root / "b", [4, 3], name="b")
    return [SourceConfig(str(root / "a"), weight=2.0), SourceConfig(str(root / "b"), weight=1.0, max_epochs=2)]


def _steps(sources, layout, steps, state=None, **changes):
    micro_batch, accumulation, world_size = layout
    ranks = []
    for rank in range(world_size):
        size = {"batch_size": micro_batch, "accumulation": accumulation, "rank": rank, "world_size": world_size}
        ranks.append(toy_loader(sources, **size, **changes))
        if state is not None:
            ranks[-1].load_state_dict(state)
    found = [Counter(key for rank in ranks for key in keys_of(take(rank, accumulation))) for _ in range(steps)]
    states = {json.dumps(rank.state_dict()) for rank in ranks}
    assert len(states) == 1
    return found, json.loads(states.pop())


def test_every_layout_trains_on_the_same_mixture(sources):
    wanted, _ = _steps(sources, (8, 1, 1), 12)
    for layout in ((1, 8, 1), (2, 2, 2), (1, 1, 8), (4, 1, 2)):
        assert _steps(sources, layout, 12)[0] == wanted
    assert _steps(sources, (4, 1, 2), 6, workers=2)[0] == wanted[:6]
    drawn = sum(wanted, Counter())
    assert all(count == 2 for key, count in drawn.items() if key.startswith("b-")), "two epochs of b and no more"
    assert {drawn[toy_key(n, "a")] for n in range(18)} <= {82 // 18, 82 // 18 + 1}, "whole epochs of a"


def test_a_mixture_resumes_in_another_world(sources):
    wanted, _ = _steps(sources, (6, 1, 1), 12)
    first, state = _steps(sources, (3, 1, 2), 5)
    second, state = _steps(sources, (1, 2, 3), 4, state)
    third, _ = _steps(sources, (6, 1, 1), 3, state)
    assert first + second + third == wanted


def test_sources_that_are_used_up_end_with_their_names(sources):
    limited = [SourceConfig(source.shards, max_epochs=1) for source in sources]
    loader = toy_loader(limited, batch_size=4, workers=1)
    assert len(set(keys_of(take(loader, 6)))) == 24
    with pytest.raises(UserError, match=r"data\.sources: .*/a, .*/b are used up"):
        next(loader)


def test_changed_weights_go_on_and_changed_sources_do_not(sources):
    state = _steps(sources, (6, 1, 1), 4)[1]
    other = [SourceConfig(source.shards, weight=5.0) for source in sources]
    toy_loader(other).load_state_dict(state)
    with pytest.raises(UserError, match=r"data\.streams|content of data\.shards"):
        toy_loader(sources[::-1]).load_state_dict(state)


def test_sources_of_the_configuration():
    assert sources_of(DataConfig(shards="x")) == [SourceConfig("x")]
    several = [SourceConfig("a"), SourceConfig("b", weight=2.0)]
    assert sources_of(DataConfig(shards="x", sources=several)) == several


def test_embodiments_of_other_sizes_are_padded_and_masked(tmp_path):
    def members(n):
        return toy_members(n) | {"action.npy": npy(np.full((4, 5), n, np.float32)), "state.npy": npy(np.ones((1, 4)))}

    write_folder(tmp_path / "small", [6])
    write_folder(tmp_path / "large", [6], members, name="large", action_dim=5, state_dim=4)
    loader = toy_loader([SourceConfig(str(tmp_path / name)) for name in ("small", "large")], batch_size=12)
    batch = next(loader)
    assert batch.actions.shape == (12, 4, 5)
    assert batch.state.shape == (12, 1, 4)
    for i, source in enumerate(batch.source):
        size = (3, 5)[source]
        assert batch.keys[i].startswith(("toy", "large")[source])
        assert batch.action_dim_mask[i].tolist() == [d < size for d in range(5)]
        assert torch.equal(batch.actions[i, :, :size], torch.full((4, size), float(batch.meta[i]["task"])))
        assert not batch.actions[i, :, size:].any()


def test_sources_of_other_encoders_are_refused(tmp_path):
    for name, width in (("one", 1), ("two", 2)):
        write_folder(tmp_path / name, [6], encoders={"text": {"kind": "hashed_ngrams", "width": width}})
    with pytest.raises(UserError, match=r"data\.sources: .*/two was encoded with .*'width': 2"):
        toy_loader([SourceConfig(str(tmp_path / name)) for name in ("one", "two")])


def test_other_caption_variants_come_with_their_masks(tmp_path):
    def members(n):
        more = {"context_detailed.npy": npy(np.full((2, 6), n, np.float16))} if n % 2 else {}
        return toy_members(n) | more | {"context_text.npy": npy(np.full((5, 6), n + 1, np.float16))}

    batch = next(toy_loader(write_folder(tmp_path / "captions", [6], members), batch_size=6))
    assert set(batch.contexts) == {"detailed", "text"}
    context, mask = batch.contexts["detailed"]
    for i, meta in enumerate(batch.meta):
        assert mask[i].tolist() == [int(meta["task"]) % 2 == 1] * 2
        assert (batch.contexts["text"][0][i] == int(meta["task"]) + 1).all()
        assert (context[i] == (int(meta["task"]) if mask[i].any() else 0)).all()
    digest = batch.digest()
    context[-1, -1, -1] += 1
    assert batch.digest() != digest


def test_sources_of_other_windows_share_a_batch_only_where_they_fit(tmp_path):
    from dataclasses import replace

    write_folder(tmp_path / "toy", [6])
    write_folder(tmp_path / "long", [6], name="long", window=replace(WINDOW, frames=9))
    with pytest.raises(UserError, match=r"train\.micro_batch=4: .* 2 shapes \(5x32x32 to 9x32x32\)"):
        toy_loader([SourceConfig(str(tmp_path / name)) for name in ("toy", "long")])
