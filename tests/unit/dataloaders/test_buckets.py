"""Micro-batches of one shape each under a token budget: composition, order, resumption."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toy_shards import keys_of, take, toy_key, toy_loader, write_clips, write_folder

from dataloaders.config import SourceConfig
from dataloaders.loading.buckets import Bucket, SourceShapes
from dataloaders.shards import INDEX, read_index
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import write_json

RUNS = [
    [(1, 32, 64, 9), (5, 32, 32, 4)],
    [(9, 64, 32, 3), (1, 32, 64, 2), (1, 64, 64, 1)],
    [(5, 32, 32, 8)],
    [(13, 32, 32, 2), (1, 32, 64, 5)],
]  # 34 samples
BUDGET = 40


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips") / "shards", RUNS)


def _loader(sources, **changes):
    return toy_loader(sources, **{"tokens_per_micro_batch": BUDGET} | changes)


def _bucket_of(batch, i=0):
    meta = batch.meta[i]
    return Bucket(meta["frames"], meta["height"], meta["width"], batch.actions is not None)


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [((81, 480, 832), 32760), ((1, 256, 256), 256), ((9, 224, 448), 1176), ((241, 704, 1280), 214720)],
)
def test_tokens_are_those_of_the_model(shape, tokens):
    assert Bucket(*shape, has_actions=False).tokens == tokens


def test_a_micro_batch_is_of_one_shape_and_fills_the_budget(clips):
    sizes = Counter()
    for batch in take(_loader(clips), 60):
        buckets = {_bucket_of(batch, i) for i in range(len(batch.keys))}
        assert len(buckets) == 1
        (bucket,) = buckets
        assert len(batch.keys) == BUDGET // bucket.tokens
        assert batch.latents.shape[2:] == ((bucket.frames - 1) // 4 + 1, bucket.height // 8, bucket.width // 8)
        assert batch.actions is None
        assert batch.action_mask is None
        sizes[bucket] += 1
    assert len(sizes) == 5


def test_nothing_is_lost_or_repeated_in_the_waiting_room(clips):
    loader = _loader(clips, accumulation=3)
    seen = Counter()
    for _ in range(20):
        seen.update(keys_of(take(loader, 3)))
        position = loader.state_dict()["position"]
        assert seen.total() + len(position["waiting"]) == position["samples"]
        epochs = position["samples"] // 34
        assert all(epochs - 1 <= seen[toy_key(n, "clip")] <= epochs + 1 for n in range(34))


def _steps(sources, accumulation, world_size, steps, state=None, **changes):
    """Keys of every micro-batch of each step, in the order of the queue."""
    ranks = [
        _loader(sources, accumulation=accumulation, rank=rank, world_size=world_size, **changes)
        for rank in range(world_size)
    ]
    for rank in ranks:
        if state is not None:
            rank.load_state_dict(state)
    found = []
    for _ in range(steps):
        taken = [take(rank, accumulation) for rank in ranks]
        found.append([taken[u % world_size][u // world_size].keys for u in range(accumulation * world_size)])
    states = {json.dumps(rank.state_dict()) for rank in ranks}
    assert len(states) == 1
    return found, json.loads(states.pop())


def test_every_layout_of_as_many_micro_batches_takes_the_same_ones(clips):
    wanted, _ = _steps(clips, 6, 1, 8)
    for accumulation, world_size in ((3, 2), (2, 3), (1, 6)):
        assert _steps(clips, accumulation, world_size, 8)[0] == wanted
    assert _steps(clips, 3, 2, 4, workers=2)[0] == wanted[:4]
    assert len({len(keys) for step in wanted for keys in step}) > 2, "ranks have different buckets at the same time"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 4)), min_size=2, max_size=4))
def test_stopped_anywhere_and_resumed_in_another_world_the_sequence_goes_on(clips, phases):
    total = sum(accumulation * world * steps for accumulation, world, steps in phases)
    wanted = [batch.keys for batch in take(_loader(clips), total)]
    got, state = [], None
    for accumulation, world, steps in phases:
        found, state = _steps(clips, accumulation, world, steps, state)
        got += [keys for step in found for keys in step]
    assert got == wanted


def test_another_budget_goes_on_without_loss(clips):
    loader = _loader(clips, accumulation=2)
    seen = Counter(keys_of(take(loader, 10)))
    state = loader.state_dict()
    for budget in (24, 80):
        other = _loader(clips, tokens_per_micro_batch=budget)
        other.load_state_dict(state)
        total = seen + Counter(keys_of(take(other, 12)))
        position = other.state_dict()["position"]
        assert total.total() + len(position["waiting"]) == position["samples"]


def test_samples_that_wait_in_buckets_are_not_dropped_without_a_word(clips):
    loader = _loader(clips)
    take(loader, 5)
    with pytest.raises(UserError, match=r"tokens_per_micro_batch=null: \d+ samples wait"):
        toy_loader(clips, batch_size=1).load_state_dict(loader.state_dict())


def test_labelled_and_unlabelled_clips_of_one_shape_are_kept_apart(tmp_path):
    write_clips(tmp_path / "clips", [[(5, 32, 32, 8)]])
    write_folder(tmp_path / "robot", [8])
    sources = [SourceConfig(str(tmp_path / name)) for name in ("clips", "robot")]
    batches = take(_loader(sources), 12)
    assert {len(set(batch.source)) for batch in batches} == {1}
    assert {batch.actions is None for batch in batches} == {True, False}
    assert all((batch.source[0] == 0) == (batch.actions is None) for batch in batches)


def test_a_budget_below_one_sample_and_shapes_without_a_budget_are_refused(clips):
    with pytest.raises(UserError, match=r"tokens_per_micro_batch=15: a sample of 9x64x32 alone has 24 tokens"):
        _loader(clips, tokens_per_micro_batch=15)
    with pytest.raises(UserError, match=r"train\.micro_batch=4: the samples have 5 shapes .*tokens_per_micro_batch"):
        toy_loader(clips)
    assert len(next(toy_loader(clips, batch_size=1)).keys) == 1


def test_shapes_that_are_not_those_of_the_shard_are_refused(clips, tmp_path):
    content = json.loads((clips / INDEX).read_text())
    content["shards"][1]["shapes"][0][3] += 1
    (tmp_path / "wrong").mkdir()
    write_json(tmp_path / "wrong" / INDEX, content)
    with pytest.raises(UserError, match=r"the shapes of shard-000001\.tar are not those of 6 samples"):
        _loader(tmp_path / "wrong")


def test_a_clip_of_another_shape_than_the_index_says_is_corrupt(clips, tmp_path):
    for shard in clips.glob("*.tar"):
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    content = json.loads((clips / INDEX).read_text())
    content["shards"][0]["shapes"][0][0] = 5
    write_json(tmp_path / INDEX, content)
    with pytest.raises(UserError, match=r"shard-000000\.tar/clip-00000\d-000000: .*latents\.npy has shape"):
        take(_loader(tmp_path), 20)


def test_stand_ins_have_the_shape_of_what_they_stand_for(clips, tmp_path):
    for shard in clips.glob("*"):
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    (tmp_path / "shard-000002.tar").unlink()
    loader = _loader(tmp_path, on_corrupt="skip")
    batches = take(loader, 40)
    replaced = [(b, i) for b in batches for i, meta in enumerate(b.meta) if "stands_in_for" in meta]
    assert len(replaced) >= 8
    assert {_bucket_of(b, i)[:3] for b, i in replaced} == {(5, 32, 32)}


def test_every_row_of_a_bucket_is_found_by_its_share(clips):
    shapes = SourceShapes(read_index(clips))
    assert shapes.buckets == sorted({Bucket(*run[:3], False) for shard in RUNS for run in shard})
    for bucket in shapes.buckets:
        rows = [(s, r) for s, shard in enumerate(RUNS) for r in range(sum(run[3] for run in shard))]
        rows = [(s, r) for s, r in rows if shapes.bucket(s, r) == bucket]
        assert [shapes.sample(bucket, (i + 0.5) / len(rows)) for i in range(len(rows))] == rows


def test_a_digest_tells_batches_apart(clips):
    a, b = (next(_loader(clips, workers=workers)) for workers in (0, 1))
    assert a.digest() == b.digest() == a.to("cpu").digest()
    other = next(_loader(clips, seed=2))
    assert other.digest() != a.digest()
    a.latents[-1, -1, -1, -1, -1] += 1
    assert a.digest() != b.digest()
    changed = replace(b, meta=[*b.meta[:-1], b.meta[-1] | {"captions": {"short": "x"}}])
    assert changed.digest() != b.digest()
    b.context_mask[0, 0] ^= True
    assert len({a.digest(), b.digest(), other.digest()}) == 3
    assert isinstance(b.latents, torch.Tensor)
