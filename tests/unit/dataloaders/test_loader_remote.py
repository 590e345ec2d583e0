"""Shard folders by URL, from a server of the test's own that drops connections and answers late."""

import os
import threading

import pytest
from support.http_server import Habits, serving
from support.toy_shards import assert_same, keys_of, take, toy_key, toy_loader, write_folder

from dataloaders.loading.cache import ShardCache
from dataloaders.loading.loader import check_shards, fixed_batches
from dataloaders.shards import EMPTY_CONTEXT, read_index, verify
from kairos_train.basics.errors import UserError

COUNTS = [5, 6, 4, 7]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "served" / "shards", COUNTS)


def _remote(address, tmp_path, **changes):
    return toy_loader(f"{address}/shards", cache_dir=tmp_path / "cache", **changes)


def _fetched(habits):
    return sorted(name for name, _ in habits.requests if name.endswith(".tar"))


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_give_the_batches_of_local_ones_and_are_fetched_once(folder, tmp_path, workers):
    wanted = take(toy_loader(folder), 12)
    with serving(folder.parent) as (address, habits):
        loader = _remote(address, tmp_path, workers=workers)
        assert_same(take(loader, 12), wanted)
        loader.close()
    assert _fetched(habits) == [f"shards/shard-{i:06d}.tar" for i in range(4)]


def test_dropped_connections_and_slow_answers_change_nothing(folder, tmp_path):
    wanted = take(toy_loader(folder), 6)
    habits = Habits(drop_after=9000, drops=4, silent=2, silence_s=0.2, refuse=1)
    with serving(folder.parent, habits) as (address, _):
        assert_same(take(_remote(address, tmp_path), 6), wanted)
    assert len(_fetched(habits)) > 6


def test_a_state_of_local_shards_goes_on_with_remote_ones(folder, tmp_path):
    local = toy_loader(folder)
    take(local, 3)
    with serving(folder.parent) as (address, _):
        remote = _remote(address, tmp_path, batch_size=2)
        remote.load_state_dict(local.state_dict())
        assert keys_of(take(remote, 6)) == keys_of(take(local, 3))


def test_copies_beyond_the_limit_go_oldest_first(folder, tmp_path):
    index = read_index(folder)
    with serving(folder.parent) as (address, _):
        remote = read_index(f"{address}/shards")
        cache = ShardCache(tmp_path / "cache", limit=index.shards[0].bytes + index.shards[1].bytes)
        for number in (0, 1, 0, 2):
            os.close(cache.open(remote, remote.shards[number]))
        kept = {path.name for path in (tmp_path / "cache").rglob("*.tar")}
        assert kept == {"shard-000000.tar", "shard-000002.tar"}
        loader = _remote(address, tmp_path, cache_gb=1e-6)
        assert sorted(keys_of(take(loader, 11)))[::2] == [toy_key(n) for n in range(22)]
        assert len(list((tmp_path / "cache").rglob("*.tar"))) == 1, "what is open is read on"


def test_several_at_once_download_a_shard_once(folder, tmp_path):
    with serving(folder.parent, Habits(silent=1, silence_s=0.3)) as (address, habits):
        remote = read_index(f"{address}/shards")
        cache = ShardCache(tmp_path / "cache", limit=10**9)
        threads = [threading.Thread(target=lambda: os.close(cache.open(remote, remote.shards[2]))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert _fetched(habits) == ["shards/shard-000002.tar"]


def test_what_is_missing_or_another_file_is_named(folder, tmp_path):
    (folder / "shard-000001.tar").unlink()
    path = folder / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[:-9] + b"something")
    with serving(folder.parent) as (address, _):
        with pytest.raises(UserError, match=r"shards/shard-00000[12]\.tar: (is missing|has sha256)"):
            take(_remote(address, tmp_path), 9)
        loader = _remote(address, tmp_path, on_corrupt="skip")
        take(loader, 11)
        assert {name: entry["samples"] for name, entry in loader.skipped.items()} == {
            "shard-000001.tar": 6,
            "shard-000002.tar": 4,
        }
        check_shards(read_index(f"{address}/shards"))  # asks for nothing: a request per shard would take long
        assert [name for name, _ in verify(f"{address}/shards")] == ["shard-000001.tar", "shard-000002.tar"]
        with pytest.raises(UserError, match=r"nowhere/index\.json: does not exist"):
            read_index(f"{address}/nowhere")


def test_validation_reads_remote_shards_in_their_order(folder, tmp_path):
    with serving(folder.parent) as (address, _):
        batches = fixed_batches(f"{address}/shards", batch_size=4, count=3, with_frames=False)
        assert keys_of(batches) == [toy_key(n) for n in range(12)]
        assert read_index(f"{address}/shards").empty_context() is None
    assert not (folder / EMPTY_CONTEXT).exists()
