"""Shards and samples that cannot be read: an error, or a stand-in, a name and a count; never a hang, never silence."""

import json
import os
import signal
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.toy_shards import assert_same, keys_of, npy, take, toy_key, toy_loader, toy_members, write_folder

from dataloaders.loading.loader import fixed_batches
from dataloaders.shards import read_index, verify
from kairos_train.basics.errors import MachineFault, RunStopped, UserError


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "shards", [7, 5, 6, 7, 6, 4])  # 35 samples; shard 2 holds 12 to 17


def _truncate(path):
    path.write_bytes(path.read_bytes()[:3000])


def _offsets(path):
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


def _damage_header(path):
    """Same size, but the header of the third sample's first member is noise."""
    data = bytearray(path.read_bytes())
    at = _offsets(path)[12]
    data[at : at + 300] = b"\xa5" * 300
    path.write_bytes(bytes(data))


def _zero_tail(path):
    """Same size, but from the middle on zeros: to tar a regular end."""
    data = path.read_bytes()
    at = _offsets(path)[18]
    path.write_bytes(data[:at] + bytes(len(data) - at))


DAMAGE = {  # reason -> what does it, samples lost
    "is missing": (Path.unlink, 6),
    "truncated": (_truncate, 6),
    "holds 2 samples, the index says 6 (a member's header is damaged)": (_damage_header, 4),
    "holds 3 samples, the index says 6": (_zero_tail, 3),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("reason", DAMAGE)
def test_damaged_shard_stops_with_its_name_in_one_line(folder, reason, workers):
    DAMAGE[reason][0](folder / "shard-000002.tar")
    with pytest.raises(UserError, match=r"shard-000002\.tar: ") as error:
        take(toy_loader(folder, workers=workers), 12)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert type(error.value) is UserError
    assert verify(folder)[0][0] == "shard-000002.tar"


@pytest.mark.parametrize("reason", DAMAGE)
def test_places_of_a_damaged_shard_go_to_stand_ins_and_are_counted(folder, reason):
    damage, lost = DAMAGE[reason]
    damage(folder / "shard-000002.tar")
    loader = toy_loader(folder, batch_size=5, on_corrupt="skip")
    for epoch in (1, 2):
        batches = take(loader, 7)
        assert loader.skipped["shard-000002.tar"]["count"] == epoch * lost
        assert reason in loader.skipped["shard-000002.tar"]["reason"]
        assert loader.skipped["shard-000002.tar"]["samples"] == lost
        own = [key for b in batches for key, meta in zip(b.keys, b.meta) if "stands_in_for" not in meta]
        assert sorted(own) == [toy_key(n) for n in range(35) if not 18 - lost <= n < 18], "sound samples come once"
        assert len(keys_of(batches)) == 35


def test_stand_ins_are_the_same_in_every_layout(folder):
    _damage_header(folder / "shard-000002.tar")
    (folder / "shard-000004.tar").unlink()

    def step_keys(world_size, **changes):
        ranks = [
            toy_loader(folder, batch_size=8 // world_size, rank=r, world_size=world_size, on_corrupt="skip", **changes)
            for r in range(world_size)
        ]
        return [Counter(keys_of(next(rank) for rank in ranks)) for _ in range(10)]

    wanted = step_keys(1)
    assert step_keys(4) == wanted
    assert step_keys(2, workers=2) == wanted


@pytest.mark.parametrize("workers", [0, 2])
def test_resumption_counts_what_is_skipped_exactly_once(folder, workers):
    _damage_header(folder / "shard-000002.tar")
    (folder / "shard-000004.tar").unlink()
    whole = toy_loader(folder, workers=workers, on_corrupt="skip")
    wanted, states = [], []
    for _ in range(24):
        states.append(json.loads(json.dumps(whole.state_dict())))
        wanted.append(next(whole))
    for cut in (1, 5, 9, 14):
        resumed = toy_loader(folder, workers=workers, on_corrupt="skip")
        resumed.load_state_dict(states[cut])
        assert_same(take(resumed, 24 - cut), wanted[cut:])
        assert resumed.skipped == whole.skipped


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("action.npy", b"\x93NUMPY garbage"),
        ("action.npy", npy(np.full((4, 2), 1.0, np.float32))),
        ("latents.npy", npy(np.full((16, 2, 4, 4), np.nan, np.float16))),
        ("latents.npy", npy(np.full((16, 2, 4, 4), -np.inf, np.float16))),
        ("latents.npy", npy(np.full((16, 2, 4, 4), 1.0, np.float16))[:-100]),
        ("state.npy", npy(np.array([{}], dtype=object))),
        ("json", b"{"),
        ("json", None),
    ],
    ids=["not npy", "shape", "nan", "-inf", "short", "pickle", "json", "absent"],
)
def test_undecodable_sample_is_named(tmp_path, member, content):
    def members(n):
        out = toy_members(n)
        if n == 5:
            out.pop(member)
            if content is not None:
                out[member] = content
        return out

    folder = write_folder(tmp_path / "bad", [4, 4], members)
    with pytest.raises(UserError, match=r"shard-000001\.tar/toy-000005-000000: "):
        take(toy_loader(folder), 3)
    loader = toy_loader(folder, batch_size=4, on_corrupt="skip")
    seen = Counter(keys_of(take(loader, 4)))
    assert toy_key(5) not in seen
    assert all(seen[toy_key(n)] >= 2 for n in range(8) if n != 5)
    assert [(name, e["count"]) for name, e in loader.skipped.items()] == [("shard-000001.tar/toy-000005-000000", 2)]


def test_a_key_that_comes_twice_is_damage(tmp_path):
    folder = write_folder(tmp_path / "twice", [4])
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes().replace(toy_key(2).encode(), toy_key(0).encode()))
    _repair_checksums(path)
    with pytest.raises(UserError, match=r"toy-000000-000000: is in its shard a second time"):
        take(toy_loader(folder), 2)


def test_a_header_that_only_its_checksum_betrays_is_damage(folder):
    path = folder / "shard-000002.tar"
    data = bytearray(path.read_bytes())
    data[_offsets(path)[12] + 5] ^= 1  # a digit of the third sample's key
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"shard-000002\.tar: holds 2 samples, .* \(a member's header is damaged\)"):
        take(toy_loader(folder), 9)


def _repair_checksums(path):
    data = bytearray(path.read_bytes())
    at = 0
    while any(header := data[at : at + 512]):
        header[148:156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(header)
        at += 512 + -(-int(header[124:135], 8) // 512) * 512
    path.write_bytes(bytes(data))


def test_damaged_clip_is_named_only_when_clips_are_decoded(tmp_path):
    folder = write_folder(tmp_path / "clips", [4])  # their mp4 members are no videos
    next(toy_loader(folder))
    with pytest.raises(UserError, match=r"shard-000000\.tar/toy-00000\d-000000: cannot be decoded"):
        next(toy_loader(folder, with_frames=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_but_damage_is_an_error_not_an_endless_loop(folder, workers):
    for shard in read_index(folder).shards:
        (folder / shard.name).unlink()
    with pytest.raises(UserError, match=r"no usable sample .* is missing"):
        next(toy_loader(folder, workers=workers, on_corrupt="skip"))


def test_member_names_that_lead_out_of_the_folder_are_refused(folder):
    path = folder / "shard-000001.tar"
    size = path.stat().st_size
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("../evil.json"))
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    with pytest.raises(UserError, match=r"shard-000001.tar: .*'\.\./evil\.json' is not plain"):
        take(toy_loader(folder), 9)


def test_a_shard_that_is_cut_while_it_is_read_is_named(folder):
    loader = toy_loader(folder, batch_size=1, streams=1, shuffle_buffer=0)
    next(loader)  # one stream, no shuffle: in the middle of a shard now
    for shard in read_index(folder).shards:
        os.truncate(folder / shard.name, 600)
    with pytest.raises(UserError, match="shorter than it was"):
        take(loader, 3)


def test_fixed_batches_name_or_leave_out_what_is_damaged(folder):
    _damage_header(folder / "shard-000002.tar")
    with pytest.raises(UserError, match=r"shard-000002\.tar"):
        list(fixed_batches(folder, batch_size=8, count=9, with_frames=False))
    batches = fixed_batches(folder, batch_size=8, count=9, with_frames=False, on_corrupt="skip")
    assert len(keys_of(batches)) == 31


# --- quarantine ---


def test_the_list_names_everything_and_follows_the_state(folder, tmp_path):
    _damage_header(folder / "shard-000002.tar")
    file = tmp_path / "run" / "quarantine.jsonl"
    loader = toy_loader(folder, batch_size=5, on_corrupt="skip", quarantine=file)
    take(loader, 7)
    (line,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert line == {"name": "shard-000002.tar"} | loader.skipped["shard-000002.tar"]
    state = loader.state_dict()
    take(loader, 7)
    assert json.loads(file.read_text())["count"] == 8
    loader.load_state_dict(state)
    assert json.loads(file.read_text())["count"] == 4, "what came after the checkpoint will come again"


def test_too_much_damage_stops_the_run(folder, tmp_path):
    _damage_header(folder / "shard-000002.tar")
    settings = {"on_corrupt": "skip", "quarantine": tmp_path / "list.jsonl"}
    take(toy_loader(folder, max_corrupt=4 / 35, **settings), 30)
    with pytest.raises(RunStopped, match=r"data\.max_corrupt=0\.1: 4 of 35 .*shard-000002\.tar.*list\.jsonl") as error:
        take(toy_loader(folder, max_corrupt=0.1, **settings), 30)
    assert "\n" not in str(error.value)


class _Ranks:
    """What `gather` gives when every process has been asked: two data ranks, each of two peers."""

    def __init__(self, folder, **changes):
        self.values = []
        self.loaders = [
            toy_loader(folder, rank=rank, world_size=2, gather=self._gather, on_corrupt="skip", **changes)
            for rank in (0, 0, 1, 1)
        ]

    def _gather(self, value):
        return self.values

    def sync(self):
        self.values = [(loader.share.rank, list(loader._findings)) for loader in self.loaders]
        for loader in self.loaders:
            loader.sync()


def test_all_ranks_know_what_any_has_skipped_and_peers_count_once(folder):
    (folder / "shard-000002.tar").unlink()
    ranks = _Ranks(folder, batch_size=1)
    for _ in range(35):
        for loader in ranks.loaders:
            next(loader)
    assert all(not loader.skipped for loader in ranks.loaders), "known to all at `sync` only"
    ranks.sync()
    assert all(loader.skipped["shard-000002.tar"]["count"] == 12 for loader in ranks.loaders)
    assert len({json.dumps(loader.state_dict()) for loader in ranks.loaders}) == 1


# --- workers ---


def _worker_pids(loader):
    return [worker.pid for worker in loader._items._processes()]


def test_a_killed_worker_is_a_clear_error(folder):
    loader = toy_loader(folder, workers=2)
    next(loader)
    for pid in _worker_pids(loader):
        os.kill(pid, signal.SIGKILL)
    sum(range(10**6))  # no signal handler breaks in here
    with pytest.raises(MachineFault, match="a loader worker died") as error:
        take(loader, 9)
    assert "\n" not in str(error.value)


def test_ctrl_c_is_for_the_training_process_whose_workers_go_on(folder):
    loader = toy_loader(folder, workers=1, batch_size=1)
    next(loader)
    for pid in _worker_pids(loader):
        os.kill(pid, signal.SIGINT)
    for _ in range(8):  # more than was read ahead
        next(loader)
    loader.close()


def test_a_hung_worker_is_a_clear_error(folder):
    loader = toy_loader(folder, workers=1, timeout=60)
    next(loader)
    loader._items.timeout = 0.5
    (pid,) = _worker_pids(loader)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(MachineFault, match=r"no batch within 0\.5 s"):
        take(loader, 9)
    assert not os.path.exists(f"/proc/{pid}") or "Z" in Path(f"/proc/{pid}/stat").read_text()
