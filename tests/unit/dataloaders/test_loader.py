"""Shards -> batches: order, resumption, content. Shards are written here, small, without a dataset behind them."""

import io
import json
import os

import numpy as np
import pytest
import torch
from support.toy_shards import assert_same, npy, take, toy_key, toy_loader, toy_members, write_clips, write_folder

from dataloaders.files.video_encoder import encode_mp4
from dataloaders.loading.loader import fixed_batches
from dataloaders.shards import INDEX, read_index
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import write_json


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "shards", [7, 5, 6, 7, 6, 4])  # 35 samples


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resumed_batches_are_bit_identical_to_uninterrupted_ones(folder, workers):
    whole = toy_loader(folder, workers=workers)
    wanted, states = [], []
    for _ in range(26):  # nearly three epochs
        states.append(json.loads(json.dumps(whole.state_dict())))
        wanted.append(next(whole))
    for cut in (0, 1, 2, 7, 8, 9, 17, 25) if workers else range(26):
        resumed = toy_loader(folder, workers=workers)
        resumed.load_state_dict(states[cut])
        assert_same(take(resumed, min(6, 26 - cut)), wanted[cut : cut + 6])
    # a resumed loader's own state is that of the uninterrupted one, so that a second interruption is exact too
    resumed = toy_loader(folder, workers=workers)
    resumed.load_state_dict(states[5])
    take(resumed, 8)
    assert resumed.state_dict() == states[13]


def test_state_of_a_running_loader_can_be_loaded_back(folder):
    loader = toy_loader(folder, workers=2)
    take(loader, 3)
    state = loader.state_dict()
    wanted = take(loader, 4)
    loader.load_state_dict(state)
    assert_same(take(loader, 4), wanted)


def test_epochs_and_seeds_have_different_orders(folder):
    def order(seed, skip):
        loader = toy_loader(folder, batch_size=1, seed=seed)
        take(loader, skip)
        return [b.keys[0] for b in take(loader, 35)]

    first, second, other = order(1, 0), order(1, 35), order(2, 0)
    assert sorted(first) == sorted(second) == sorted(other)
    assert first != second
    assert first != other
    assert order(1, 0) == first


def test_batches_run_across_the_border_of_epochs(folder):
    keys = [key for batch in take(toy_loader(folder, batch_size=4), 35) for key in batch.keys]  # 140 = 4 epochs
    assert all(keys.count(key) == 4 for key in set(keys))
    assert len(set(keys)) == 35


def test_starting_workers_leaves_the_random_state_of_training_alone(folder):
    before = torch.get_rng_state()
    take(toy_loader(folder, workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_contexts_are_padded_on_the_right_and_masked(folder):
    batch = next(toy_loader(folder, batch_size=8))
    lengths = [3 + int(m["task"]) % 4 for m in batch.meta]
    assert batch.context.shape == (8, max(lengths), 6)
    assert batch.context_mask.sum(1).tolist() == lengths
    for row, mask, meta, n in zip(batch.context, batch.context_mask, batch.meta, lengths):
        assert mask[:n].all()
        assert (row[:n] == int(meta["task"])).all()
        assert (row[n:] == 0).all()


def test_batch_holds_what_the_shards_hold(folder):
    batch = next(toy_loader(folder))
    numbers = torch.tensor([float(m["task"]) for m in batch.meta])
    assert batch.frames is None
    assert batch.latents.dtype == batch.context.dtype == torch.float16, "as packed"
    assert batch.latents.shape == (4, 16, 2, 4, 4)
    assert torch.equal(batch.latents[:, 3, 1, 2, 0], numbers)
    assert torch.equal(batch.actions, numbers[:, None, None].expand(4, 4, 3))
    assert torch.equal(batch.state, numbers[:, None, None].expand(4, 1, 2))
    assert batch.action_mask.sum(1).tolist() == [m["valid_actions"] for m in batch.meta]
    assert batch.action_mask[:, 0].all()
    assert batch.text == [f"do {m['task']}" for m in batch.meta]
    assert batch.to("cpu").keys == batch.keys


def test_what_some_samples_lack_is_none_for_the_batch(tmp_path):
    folder = write_folder(tmp_path / "part", [8], lambda n: toy_members(n, encoded=n % 2 == 0))
    batch = next(toy_loader(folder, batch_size=8))
    assert batch.latents is None
    assert batch.context is None
    assert batch.context_mask is None


def test_frames_are_decoded_when_asked_for(tmp_path):
    clip = io.BytesIO()
    frames = np.broadcast_to(np.arange(0, 250, 50, dtype=np.uint8)[:, None, None, None], (5, 32, 64, 3))
    encode_mp4(clip, frames, 10.0)
    folder = write_folder(tmp_path / "clips", [4], lambda n: toy_members(n, clip=clip.getvalue()))
    batch = next(toy_loader(folder, with_frames=True))
    assert batch.frames.dtype == torch.uint8
    assert batch.frames.shape == (4, 5, 32, 64, 3)
    assert (batch.frames[0].float() - torch.from_numpy(frames.copy()).float()).abs().max() < 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_stays_what_it_was_while_later_ones_come(folder, workers):
    """Memory of batches is used again, but not while anybody holds a part of one."""
    loader = toy_loader(folder, workers=workers)
    held, wanted = [], []
    for batch in take(loader, 6):
        held.append((batch.latents[1:, 3], batch.context, batch.latents.numpy()[0]))
        wanted.append([value.copy() if isinstance(value, np.ndarray) else value.clone() for value in held[-1]])
    del batch
    take(loader, 20)
    for values, copies in zip(held, wanted):
        assert all((a == b).all() for a, b in zip(values, copies))


def test_memory_of_a_batch_that_nobody_holds_is_used_again(folder):
    loader = toy_loader(folder, batch_size=5)
    take(loader, 2)
    addresses = {next(loader).latents.data_ptr() for _ in range(20)}
    assert len(addresses) <= 2
    batches = take(loader, 20)
    assert len({batch.latents.data_ptr() for batch in batches}) == 20


def test_latents_of_another_type_or_size_on_the_way_are_read_all_the_same(tmp_path):
    def members(n):
        dtype = np.float32 if n % 5 == 4 else np.float16
        return toy_members(n) | {"latents.npy": npy(np.full((16, 2, 4, 4 + 4 * (n % 7 == 6)), n, dtype))}

    folder = write_folder(tmp_path / "mixed", [14], members)
    for batch in take(toy_loader(folder, batch_size=1), 28):
        number = int(batch.meta[0]["task"])
        assert batch.latents.dtype == (torch.float32 if number % 5 == 4 else torch.float16)
        assert batch.latents.shape[-1] == 4 + 4 * (number % 7 == 6)
        assert (batch.latents == number).all()
    with pytest.raises(
        UserError, match=r"samples .* latents of shapes \(16, 2, 4, [48]\) and .* do not make one batch"
    ):
        take(toy_loader(folder, batch_size=7), 4)


def test_a_closed_loader_leaves_no_file_open(folder):
    def shards_open():
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return [link for link in links if os.path.exists(link) and str(folder) in os.readlink(link)]

    loader = toy_loader(folder)
    take(loader, 9)
    assert len(shards_open()) == 6
    loader.close()
    assert shards_open() == []


def test_members_before_and_behind_a_skipped_clip_are_read(tmp_path):
    """Whatever the order of members in the tar: sorted, `mp4` lies between the latents and the state."""
    folder = write_folder(tmp_path / "clips", [6], lambda n: toy_members(n, clip=bytes(3000 + n)))
    for batch in take(toy_loader(folder, batch_size=2), 6):
        for i, meta in enumerate(batch.meta):
            assert (batch.latents[i] == int(meta["task"])).all()
            assert (batch.state[i] == int(meta["task"])).all()
            assert batch.text[i] == f"do {meta['task']}"


def test_state_of_other_settings_is_refused(folder, tmp_path):
    state = toy_loader(folder).state_dict()
    for changes, name in (
        ({"seed": 5}, "seed"),
        ({"shuffle_buffer": 6}, "shuffle_buffer"),
        ({"streams": 2}, "data.streams"),
    ):
        with pytest.raises(UserError, match=name):
            toy_loader(folder, **changes).load_state_dict(state)
    other = write_folder(tmp_path / "other", [7, 5, 6, 7, 6, 5])
    with pytest.raises(UserError, match=r"data\.shards"):
        toy_loader(other).load_state_dict(state)


def test_no_position_lies_inside_a_step(folder):
    loader = toy_loader(folder, accumulation=2)
    state = loader.state_dict()
    wanted = take(loader, 1)
    with pytest.raises(ValueError, match="1 of 2 batches"):
        loader.state_dict()
    loader.close()
    assert loader.state_dict() == state, "a step that was not completed is read again"
    assert_same(take(loader, 1), wanted)
    take(loader, 1)
    assert loader.state_dict()["position"]["samples"] == 8


def test_fixed_batches_are_the_first_in_order(folder):
    for _ in range(2):
        batches = list(fixed_batches(folder, batch_size=4, count=3, with_frames=False))
        assert [k for b in batches for k in b.keys] == [f"toy-{n:06d}-000000" for n in range(12)]
    sizes = [len(b.keys) for b in fixed_batches(folder, batch_size=10, count=9, with_frames=False)]
    assert sizes == [10, 10, 10, 5]


def test_fixed_batches_of_clips_are_of_one_shape_each(tmp_path):
    folder = write_clips(tmp_path / "clips", [[(1, 32, 64, 5), (5, 32, 32, 3)], [(5, 32, 32, 4)]])
    batches = list(fixed_batches(folder, batch_size=3, count=99, with_frames=False))
    assert [len(batch.keys) for batch in batches] == [3, 2, 3, 3, 1]
    assert [key for batch in batches for key in batch.keys] == [toy_key(n, "clip") for n in range(12)]
    assert len(list(fixed_batches(folder, batch_size=3, count=2, with_frames=False))) == 2


def test_fixed_batches_of_decoded_clips_change_shape_where_the_shards_do_even_around_damage(tmp_path):
    folder = write_clips(tmp_path / "clips", [[(1, 32, 64, 3), (5, 32, 32, 4)], [(5, 32, 32, 2)]], frames=True)
    wanted = [((0, 1), (1, 32, 64)), ((2,), (1, 32, 64)), ((3, 4), (5, 32, 32)), ((5, 6), (5, 32, 32))]
    wanted += [((7, 8), (5, 32, 32))]
    for damaged in (None, 4):
        if damaged is not None:  # its place in the batch goes to the next of its shape
            path = folder / "shard-000000.tar"
            path.write_bytes(path.read_bytes().replace(b'{"text": "clip 4"', b'["text": "clip 4"'))
            wanted[2:] = [((3, 5), (5, 32, 32)), ((6, 7), (5, 32, 32)), ((8,), (5, 32, 32))]
        for with_frames in (True, False):
            batches = list(
                fixed_batches(folder, batch_size=2, count=9, with_frames=with_frames, on_corrupt="skip"),
            )
            assert [batch.keys for batch in batches] == [[toy_key(n, "clip") for n in numbers] for numbers, _ in wanted]
            for batch, (numbers, (frames, height, width)) in zip(batches, wanted):
                assert batch.latents.shape[1:] == (16, (frames - 1) // 4 + 1, height // 8, width // 8)
                assert (batch.frames is None) != with_frames
                if with_frames:
                    assert batch.frames.shape[1:] == (frames, height, width, 3)
                    shades = batch.frames.float().mean(dim=(1, 2, 3, 4))
                    assert shades.tolist() == pytest.approx([10 * n for n in numbers], abs=3)


def test_how_far_each_source_has_come_is_told(folder):
    loader = toy_loader(folder, batch_size=7)
    take(loader, 8)
    assert loader.epochs == [56 / 35]


def test_index_mistakes_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"absent/index\.json: does not exist"):
        toy_loader(tmp_path / "absent")
    content = json.loads((folder / INDEX).read_text())
    for change, match in (
        ({"format": "kairos-shards-9"}, "kairos-shards-9"),
        ({"samples": 3}, "samples=3"),
        ({"fps": None, "colour": 1}, "colour"),
        ({"shards": [content["shards"][0]] * 2, "samples": 14}, "names shard shard-000000.tar twice"),
        ({"shards": [content["shards"][0] | {"samples": -7}], "samples": -7}, "samples=-7"),
        ({"shards": [content["shards"][0] | {"name": "pipe:true.tar"}], "samples": 7}, "plain file name"),
    ):
        write_json(folder / INDEX, content | change)
        with pytest.raises(UserError, match=match):
            read_index(folder)
    write_json(folder / INDEX, content)
    with pytest.raises(UserError, match=r"data\.on_corrupt='ignore'"):
        toy_loader(folder, on_corrupt="ignore")
