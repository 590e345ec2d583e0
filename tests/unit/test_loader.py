"""Shards -> batches: order, resumption, corruption. Shards are written here, small, without a dataset behind them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dataloaders.loader import ShardLoader, fixed_batches
from dataloaders.shards import INDEX, ShardIndex, read_index, sample_block, verify, write_json, write_shard
from dataloaders.video import encode_mp4
from kairos_train.config.schema import WindowConfig
from kairos_train.errors import UserError

WINDOW = WindowConfig(frames=5, action_video_freq_ratio=1, height=32, width=32)


def _npy(value):
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


def _members(number: int, *, encoded: bool = True, clip: bytes = b"no video") -> dict[str, bytes]:
    meta = {"text": f"do {number}", "task": f"{number}", "episode": number, "start": 0, "dataset": "toy", "fps": 10.0}
    meta |= {"valid_actions": 4 - number % 3, "valid_frames": 5}
    members = {
        "json": json.dumps(meta).encode(),
        "action.npy": _npy(np.full((4, 3), number, np.float32)),
        "state.npy": _npy(np.full((1, 2), number, np.float32)),
        "mp4": clip,
    }
    if encoded:
        members["latents.npy"] = _npy(np.full((16, 2, 4, 4), number, np.float16))
        members["context.npy"] = _npy(np.full((3 + number % 4, 6), number, np.float16))
    return members


def _write_folder(folder: Path, counts: list[int], members=_members) -> Path:
    """Shards of the given sample counts, samples numbered through."""
    folder.mkdir(parents=True)
    shards, number = [], 0
    for i, count in enumerate(counts):
        blocks = [sample_block(f"toy-{n:06d}-000000", members(n)) for n in range(number, number + count)]
        shards.append(write_shard(folder / f"shard-{i:06d}.tar", blocks))
        number += count
    index = ShardIndex(
        folder=folder,
        samples=number,
        window=WINDOW,
        prompt_template="{task}",
        action_dim=3,
        state_dim=2,
        fps=10.0,
        encoders=None,
        tasks=[],
        source={},
        shards=tuple(shards),
    )
    write_json(folder / INDEX, index.to_dict())
    return folder


@pytest.fixture
def folder(tmp_path):
    return _write_folder(tmp_path / "shards", [7, 5, 6, 7, 6, 4])  # 35 samples


def _loader(folder, **changes):
    settings = {"batch_size": 4, "seed": 1, "shuffle_buffer": 5, "with_frames": False} | changes
    return ShardLoader(folder, **settings)


def _take(loader, count):
    return [next(loader) for _ in range(count)]


def _same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def _assert_same(got, wanted):
    assert [b.keys for b in got] == [b.keys for b in wanted]
    for g, w in zip(got, wanted):
        assert all(_same(getattr(g, name), getattr(w, name)) for name in vars(w))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resumed_batches_are_bit_identical_to_uninterrupted_ones(folder, workers):
    whole = _loader(folder, workers=workers)
    wanted, states = [], []
    for _ in range(26):  # nearly three epochs
        states.append(json.loads(json.dumps(whole.state_dict())))
        wanted.append(next(whole))
    for cut in (0, 1, 2, 7, 8, 9, 17, 25) if workers else range(26):
        resumed = _loader(folder, workers=workers)
        resumed.load_state_dict(states[cut])
        _assert_same(_take(resumed, min(6, 26 - cut)), wanted[cut : cut + 6])
    # a resumed loader's own state is that of the uninterrupted one, so that a second interruption is exact too
    resumed = _loader(folder, workers=workers)
    resumed.load_state_dict(states[5])
    _take(resumed, 8)
    assert resumed.state_dict() == states[13]


def test_state_of_a_running_loader_can_be_loaded_back(folder):
    loader = _loader(folder, workers=2)
    _take(loader, 3)
    state = loader.state_dict()
    wanted = _take(loader, 4)
    loader.load_state_dict(state)
    _assert_same(_take(loader, 4), wanted)


def test_loading_without_workers_equals_one_worker(folder):
    _assert_same(_take(_loader(folder, workers=0), 12), _take(_loader(folder, workers=1), 12))
    state = _loader(folder, workers=0).state_dict()
    _loader(folder, workers=1).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_ranks_cover_an_epoch_disjointly(tmp_path, workers):
    # equal shards: every stream's epoch has the same number of samples, so that a whole epoch is 8 batches of 1 each
    folder = _write_folder(tmp_path / "even", [4] * 8)
    ranks = [_loader(folder, batch_size=1, rank=r, world_size=2, workers=workers) for r in range(2)]
    for _ in range(2):  # epochs
        keys = [batch.keys[0] for loader in ranks for batch in _take(loader, 16)]
        assert sorted(keys) == [f"toy-{n:06d}-000000" for n in range(32)]


def test_epochs_and_seeds_have_different_orders(folder):
    def order(seed, skip):
        loader = _loader(folder, batch_size=1, seed=seed)
        _take(loader, skip)
        return [b.keys[0] for b in _take(loader, 35)]

    first, second, other = order(1, 0), order(1, 35), order(2, 0)
    assert sorted(first) == sorted(second) == sorted(other)
    assert first != second
    assert first != other
    assert order(1, 0) == first


def test_batches_run_across_the_border_of_epochs(folder):
    keys = [key for batch in _take(_loader(folder, batch_size=4), 35) for key in batch.keys]  # 140 = 4 epochs
    assert all(keys.count(key) == 4 for key in set(keys))
    assert len(set(keys)) == 35


def test_starting_workers_leaves_the_random_state_of_training_alone(folder):
    before = torch.get_rng_state()
    _take(_loader(folder, workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_contexts_are_padded_on_the_right_and_masked(folder):
    batch = next(_loader(folder, batch_size=8))
    lengths = [3 + int(m["task"]) % 4 for m in batch.meta]
    assert batch.context.shape == (8, max(lengths), 6)
    assert batch.context_mask.sum(1).tolist() == lengths
    for row, mask, meta, n in zip(batch.context, batch.context_mask, batch.meta, lengths):
        assert mask[:n].all()
        assert (row[:n] == int(meta["task"])).all()
        assert (row[n:] == 0).all()


def test_batch_holds_what_the_shards_hold(folder):
    batch = next(_loader(folder))
    numbers = torch.tensor([float(m["task"]) for m in batch.meta])
    assert batch.frames is None
    assert batch.latents.dtype == batch.context.dtype == torch.float32
    assert batch.latents.shape == (4, 16, 2, 4, 4)
    assert torch.equal(batch.latents[:, 3, 1, 2, 0], numbers)
    assert torch.equal(batch.actions, numbers[:, None, None].expand(4, 4, 3))
    assert torch.equal(batch.state, numbers[:, None, None].expand(4, 1, 2))
    assert batch.action_mask.sum(1).tolist() == [m["valid_actions"] for m in batch.meta]
    assert batch.action_mask[:, 0].all()
    assert batch.text == [f"do {m['task']}" for m in batch.meta]
    assert batch.to("cpu").keys == batch.keys


def test_what_some_samples_lack_is_none_for_the_batch(tmp_path):
    folder = _write_folder(tmp_path / "part", [8], lambda n: _members(n, encoded=n % 2 == 0))
    batch = next(_loader(folder, batch_size=8))
    assert batch.latents is None
    assert batch.context is None
    assert batch.context_mask is None


def test_frames_are_decoded_when_asked_for(tmp_path):
    clip = io.BytesIO()
    frames = np.broadcast_to(np.arange(0, 250, 50, dtype=np.uint8)[:, None, None, None], (5, 32, 64, 3))
    encode_mp4(clip, frames, 10.0)
    folder = _write_folder(tmp_path / "clips", [4], lambda n: _members(n, clip=clip.getvalue()))
    batch = next(_loader(folder, with_frames=True))
    assert batch.frames.dtype == torch.uint8
    assert batch.frames.shape == (4, 5, 32, 64, 3)
    assert (batch.frames[0].float() - torch.from_numpy(frames.copy()).float()).abs().max() < 4


def test_state_of_other_settings_is_refused(folder, tmp_path):
    state = _loader(folder, workers=2).state_dict()
    for changes, name in (
        ({"workers": 1}, "data.workers"),
        ({"workers": 2, "world_size": 2}, "data-parallel ranks"),
        ({"workers": 2, "seed": 5}, "seed"),
        ({"workers": 2, "shuffle_buffer": 6}, "shuffle_buffer"),
    ):
        with pytest.raises(UserError, match=name):
            _loader(folder, **changes).load_state_dict(state)
    other = _write_folder(tmp_path / "other", [7, 5, 6, 7, 6, 5])
    with pytest.raises(UserError, match=r"data\.shards"):
        _loader(other, workers=2).load_state_dict(state)
    _loader(folder, workers=2, batch_size=2).load_state_dict(state)  # positions are in samples: any batch size goes on


def test_fewer_shards_than_streams_is_refused(folder):
    with pytest.raises(UserError, match=r"6 shards.*2 data-parallel ranks x 4 loader workers.*shard_samples"):
        _loader(folder, world_size=2, workers=4)


def test_fixed_batches_are_the_first_in_order(folder):
    for _ in range(2):
        batches = list(fixed_batches(folder, batch_size=4, count=3, with_frames=False))
        assert [k for b in batches for k in b.keys] == [f"toy-{n:06d}-000000" for n in range(12)]
    sizes = [len(b.keys) for b in fixed_batches(folder, batch_size=10, count=9, with_frames=False)]
    assert sizes == [10, 10, 10, 5]


# --- corruption ---


def _truncate(path):
    path.write_bytes(path.read_bytes()[:3000])


def _offsets(path):
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


def _damage_header(path):
    """Same size, but the header of the third member is noise."""
    data = bytearray(path.read_bytes())
    at = _offsets(path)[8]
    data[at : at + 300] = b"\xa5" * 300
    path.write_bytes(bytes(data))


def _zero_tail(path):
    """Same size, but from the middle on zeros: to tar a regular end."""
    data = path.read_bytes()
    at = _offsets(path)[12]
    path.write_bytes(data[:at] + bytes(len(data) - at))


# to tar, noise in place of a header is an end like any other: only the count betrays it
DAMAGE = {
    "missing": Path.unlink,
    "truncated": _truncate,
    "holds 2 samples": _damage_header,
    "the index says 6": _zero_tail,
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("reason", DAMAGE)
def test_damaged_shard_stops_with_its_name_in_one_line(folder, reason, workers):
    DAMAGE[reason](folder / "shard-000002.tar")
    with pytest.raises(UserError, match=rf"shard-000002\.tar: .*{reason}") as error:
        _take(_loader(folder, workers=workers), 12)
    assert "\n" not in str(error.value)
    assert type(error.value) is UserError
    assert verify(folder)[0][0] == "shard-000002.tar"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("reason", DAMAGE)
def test_damaged_shard_is_skipped_and_counted(folder, reason, workers):
    DAMAGE[reason](folder / "shard-000002.tar")
    loader = _loader(folder, batch_size=1, workers=workers, on_corrupt="skip")
    keys = [b.keys[0] for b in _take(loader, 90)]
    good = {f"toy-{n:06d}-000000" for n in range(35) if not 12 <= n < 18}
    assert good <= set(keys)
    assert reason in loader.skipped["shard-000002.tar"]["reason"]
    assert loader.skipped["shard-000002.tar"]["count"] >= 2
    again = _loader(folder, batch_size=1, workers=workers, on_corrupt="skip")
    assert [b.keys[0] for b in _take(again, 90)] == keys
    assert again.skipped == loader.skipped


@pytest.mark.parametrize("workers", [0, 2])
def test_resumption_counts_what_is_skipped_exactly_once(folder, workers):
    _damage_header(folder / "shard-000002.tar")
    (folder / "shard-000004.tar").unlink()
    whole = _loader(folder, workers=workers, on_corrupt="skip")
    wanted, states = [], []
    for _ in range(24):
        states.append(whole.state_dict())
        wanted.append(next(whole))
    for cut in (1, 5, 9, 14):
        resumed = _loader(folder, workers=workers, on_corrupt="skip")
        resumed.load_state_dict(states[cut])
        _assert_same(_take(resumed, 24 - cut), wanted[cut:])
        assert resumed.skipped == whole.skipped


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("action.npy", b"\x93NUMPY garbage"),
        ("action.npy", _npy(np.full((4, 2), 1.0, np.float32))),
        ("latents.npy", _npy(np.full((16, 2, 4, 4), np.nan, np.float16))),
        ("state.npy", _npy(np.array([{}], dtype=object))),
        ("json", b"{"),
        ("json", None),
    ],
    ids=["not npy", "shape", "nan", "pickle", "json", "absent"],
)
def test_undecodable_sample_is_named(tmp_path, member, content):
    def members(n):
        out = _members(n)
        if n == 5:
            out.pop(member)
            if content is not None:
                out[member] = content
        return out

    folder = _write_folder(tmp_path / "bad", [4, 4], members)
    with pytest.raises(UserError, match=r"shard-000001\.tar/toy-000005-000000: "):
        _take(_loader(folder), 3)
    loader = _loader(folder, batch_size=7, on_corrupt="skip")
    keys = [key for batch in _take(loader, 2) for key in batch.keys]
    assert sorted(keys) == sorted(2 * [f"toy-{n:06d}-000000" for n in range(8) if n != 5])
    assert list(loader.skipped) == ["shard-000001.tar/toy-000005-000000"]
    assert 1 <= loader.skipped["shard-000001.tar/toy-000005-000000"]["count"] <= 2


def test_damaged_clip_is_named_only_when_clips_are_decoded(tmp_path):
    folder = _write_folder(tmp_path / "clips", [4])  # their mp4 members are no videos
    next(_loader(folder))
    with pytest.raises(UserError, match=r"shard-000000\.tar/toy-00000\d-000000: cannot be decoded"):
        next(_loader(folder, with_frames=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_but_damage_is_an_error_not_an_endless_loop(folder, workers):
    for shard in read_index(folder).shards:
        (folder / shard.name).unlink()
    with pytest.raises(UserError, match="no usable sample in epoch 0"):
        next(_loader(folder, workers=workers, on_corrupt="skip"))


def test_member_names_that_lead_out_of_the_folder_are_refused(folder):
    path = folder / "shard-000001.tar"
    size = path.stat().st_size
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("../evil.json")
        tar.addfile(info)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    with pytest.raises(UserError, match=r"shard-000001.tar: .*'\.\./evil\.json' is not plain"):
        _take(_loader(folder), 9)


def test_index_mistakes_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"absent/index\.json: does not exist"):
        ShardLoader(tmp_path / "absent", batch_size=1)
    content = json.loads((folder / INDEX).read_text())
    for change, match in (
        ({"format": "kairos-shards-9"}, "kairos-shards-9"),
        ({"samples": 3}, "samples=3"),
        ({"fps": None, "colour": 1}, "colour"),
        ({"shards": [content["shards"][0] | {"name": "pipe:true.tar"}], "samples": 7}, "plain file name"),
    ):
        write_json(folder / INDEX, content | change)
        with pytest.raises(UserError, match=match):
            read_index(folder)
    write_json(folder / INDEX, content)
    with pytest.raises(UserError, match=r"data\.on_corrupt='ignore'"):
        _loader(folder, on_corrupt="ignore")
