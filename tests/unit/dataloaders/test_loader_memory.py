"""Memory that is used again: never while anybody can still see it."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toy_shards import take, toy_loader, toy_members, write_clips, write_folder

from dataloaders.loading.memory import KEPT, Blocks, Buffers, Rows

SIGHTS = {  # what somebody may keep of a tensor over a block
    "tensor": lambda whole: whole,
    "row": lambda whole: whole[1:],
    "other type": lambda whole: whole.view(torch.int16),
    "array": lambda whole: whole.numpy(),
    "row of the array": lambda whole: whole.numpy()[-1],
    "buffer": lambda whole: memoryview(whole.numpy()[0]),
    "tensor of the array": lambda whole: torch.from_numpy(whole.numpy()[1:]),
    "detached row": lambda whole: whole.detach()[0],
}


def _bytes_of(sight) -> bytes:
    return sight.numpy().tobytes() if isinstance(sight, torch.Tensor) else bytes(sight)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([8, 24]), st.sampled_from([None, *SIGHTS]), st.integers(0, 9)), max_size=40))
def test_no_block_is_handed_out_while_any_sight_of_it_is_held(steps):
    """Each step: the width of a batch, what is kept of it, and which of those kept before is dropped."""
    blocks, kept = Blocks(), []
    for number, (width, sight, dropped) in enumerate(steps):
        whole = Rows((3, width), np.dtype(np.float16), blocks).whole
        whole.fill_(number)
        if sight is not None:
            view = SIGHTS[sight](whole)
            kept.append((view, _bytes_of(view)))
        del whole
        if dropped < len(kept):
            kept.pop(dropped)
        assert all(_bytes_of(view) == content for view, content in kept)


@pytest.mark.parametrize("sight", SIGHTS)
def test_a_block_is_free_when_the_last_sight_of_it_is_gone(sight):
    blocks = Blocks()
    whole = Rows((3, 8), np.dtype(np.float16), blocks).whole
    address, held = whole.data_ptr(), SIGHTS[sight](whole)
    del whole
    other = Rows((3, 8), np.dtype(np.float16), blocks).whole
    assert other.data_ptr() != address
    del held
    gc.collect()
    assert Rows((3, 8), np.dtype(np.float16), blocks).whole.data_ptr() == address


def test_only_some_blocks_are_kept():
    blocks = Blocks()
    held = [blocks.take(64) for _ in range(3 * KEPT)]
    assert len({array.ctypes.data for array in held}) == 3 * KEPT
    addresses = {array.ctypes.data for array in held[-KEPT:]}
    del held
    assert {array.ctypes.data for array in [blocks.take(64) for _ in range(KEPT)]} == addresses


def test_rows_know_what_lies_in_them():
    rows = Rows((2, 3, 4), np.dtype(np.float16), Blocks())
    rows.whole.zero_()
    memory = rows.bytes_of(1)
    memory[:] = np.full((3, 4), 7, np.float16).tobytes()
    assert (rows.whole[1] == 7).all()
    assert (rows.whole[0] == 0).all()
    there = [rows.rows[0], np.frombuffer(memory, np.float16).reshape(3, 4)]
    assert rows.hold(there)
    for wrong in (
        [there[1], there[0]],
        [there[0], there[1].copy()],
        [there[0], there[1].reshape(4, 3)],
        [there[0], there[1].view(np.int16)],
        [there[0], there[1].reshape(4, 3, order="F").T],
        [there[0], None],
    ):
        assert not rows.hold(wrong)


def test_scratch_memory_grows_and_keeps_its_numbers_apart():
    buffers = Buffers()
    first, second = buffers.take(0, 8), buffers.take(1, 8)
    first[:], second[:] = 1, 2
    assert (first == 1).all()
    assert len(buffers.take(0, 100)) == 100
    again = buffers.take(0, 50)
    assert len(again) == 50
    assert np.shares_memory(again, buffers.take(0, 100))
    assert (second == 2).all()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """With clips that are decoded; of several shapes; with samples that cannot be read."""
    root = tmp_path_factory.mktemp("memory")

    def damaged(number):
        return toy_members(number) | ({"latents.npy": b"\x93NUMPY no"} if number % 4 == 1 else {})

    runs = [[(5, 32, 32, 7), (1, 32, 64, 4)], [(5, 32, 32, 3), (1, 32, 64, 6)]]
    return {
        "clips": (write_clips(root / "clips", runs, frames=True), {"tokens_per_micro_batch": 16, "with_frames": True}),
        "stand-ins": (write_folder(root / "damaged", [9, 8, 7], damaged), {"batch_size": 3, "on_corrupt": "skip"}),
    }


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["clips", "stand-ins"])
def test_a_batch_stays_what_it_was_while_later_ones_come(folders, kind, workers):
    """Of every second batch one tensor alone is kept, of the others nothing."""
    folder, changes = folders[kind]
    loader = toy_loader(folder, workers=workers, **changes)
    names = [name for name, value in vars(next(loader)).items() if isinstance(value, torch.Tensor)]
    assert set(names) >= {"latents", "context", "context_mask", *(["frames"] if kind == "clips" else ["actions"])}
    kept = []
    for number in range(24):
        batch = next(loader)
        digest = batch.digest()
        if number % 2 == 0:
            view = getattr(batch, names[number // 2 % len(names)])[-1:]
            kept.append((view, view.clone()))
        elif number % 5 == 0:
            kept.append((batch, digest))
    del batch
    take(loader, 12)
    assert all(sight.digest() == was if isinstance(was, str) else torch.equal(sight, was) for sight, was in kept)
    loader.close()
