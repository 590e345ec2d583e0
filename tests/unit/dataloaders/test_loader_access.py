"""Samples by their byte ranges: what a direct read gives is what the tar holds, whatever lies around it."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.toy_shards import npy, take, toy_key, toy_loader, toy_members, write_folder

from dataloaders.loading.access import NPY_HEADER, OPEN_SHARDS, Apart, ShardReader
from dataloaders.loading.memory import Buffers
from dataloaders.shards import CorruptData, read_index

COUNTS = [5, 1, 4]
ROWS = [(shard, row) for shard, count in enumerate(COUNTS) for row in range(count)]
LATENTS = 16 * 2 * 4 * 4 * 2  # bytes of the data of a toy's latents


def _members(number):
    """Of sizes below, at and beyond the blocks of a tar; some samples lack what others have."""
    members = toy_members(number, encoded=number % 4 != 3, clip=os.urandom((0, 511, 512, 513, 3000)[number % 5]))
    if number % 3 == 2:
        del members["mp4"]
    return members


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("access") / "shards", COUNTS, _members)


@pytest.fixture(scope="module")
def wanted(folder):
    """(shard, row) -> members by extension, as tarfile reads them."""
    found, number = {}, 0
    for shard, count in enumerate(COUNTS):
        with tarfile.open(folder / f"shard-{shard:06d}.tar") as tar:
            contents = {member.name: tar.extractfile(member).read() for member in tar}
        for row in range(count):
            stem = toy_key(number) + "."
            found[shard, row] = {n.removeprefix(stem): c for n, c in contents.items() if n.startswith(stem)}
            number += 1
    return found


def _whole(member) -> bytes:
    return bytes(member.head) + bytes(member.data) if isinstance(member, Apart) else bytes(member)


def _read(reader, shard, row, **given) -> dict[str, bytes]:
    raw = reader.read(shard, row, Buffers(), **given)
    assert raw.pop("__key__") == toy_key(ROWS.index((shard, row)))
    return {extension: _whole(member) for extension, member in raw.items()}


@pytest.mark.parametrize("skip", [None, "mp4", "action.npy", "state.npy", "nothing"])
@settings(max_examples=15, deadline=None)
@given(order=st.permutations(ROWS))
def test_rows_in_any_order_are_what_the_tar_holds(folder, wanted, skip, order):
    """The skipped member is the first of its sample, the last, or between others."""
    reader = ShardReader(read_index(folder), skip=skip)
    for shard, row in order:
        got = _read(reader, shard, row)
        assert got == {extension: data for extension, data in wanted[shard, row].items() if extension != skip}


@pytest.mark.parametrize("skip", [None, "mp4", "action.npy", "state.npy"])
def test_latents_go_straight_to_where_they_are_wanted(folder, wanted, skip):
    reader = ShardReader(read_index(folder), skip=skip)
    for shard, row in ROWS:
        place = bytearray(LATENTS)
        raw = reader.read(shard, row, Buffers(), into=memoryview(place))
        member = raw.get("latents.npy")
        assert isinstance(member, Apart) == ("latents.npy" in wanted[shard, row])
        if member is not None:
            assert member.data.obj is place
            assert bytes(place) == wanted[shard, row]["latents.npy"][NPY_HEADER:]
        del raw["__key__"]
        got = {extension: _whole(content) for extension, content in raw.items()}
        assert got == {extension: data for extension, data in wanted[shard, row].items() if extension != skip}


@pytest.mark.parametrize("size", [0, LATENTS - 2, LATENTS + 2])
def test_a_place_of_another_size_is_left_alone(folder, wanted, size):
    place = bytearray(b"x" * size)
    got = _read(ShardReader(read_index(folder)), 0, 1, into=memoryview(place))
    assert got == wanted[0, 1]
    assert set(place) <= {ord("x")}


def test_nothing_but_the_row_is_read(tmp_path):
    """Once the headers are known: all other bytes are overwritten, and those of the skipped member."""
    folder = write_folder(tmp_path / "shards", [4], lambda n: toy_members(n, clip=os.urandom(2000)))
    path = folder / "shard-000000.tar"
    reader = ShardReader(read_index(folder), skip="mp4")
    before = _read(reader, 0, 2)
    with tarfile.open(path) as tar:
        own = [m for m in tar if m.name.startswith(toy_key(2)) and not m.name.endswith("mp4")]
    data = bytearray(b"\xa5" * path.stat().st_size)
    content = path.read_bytes()
    for member in own:
        end = member.offset_data + -(-member.size // 512) * 512
        data[member.offset : end] = content[member.offset : end]
    with path.open("r+b") as file:  # in place: the reader has it open
        file.write(data)
    assert _read(reader, 0, 2) == before


def test_one_buffer_serves_one_row_at_a_time(folder, wanted):
    reader, buffers = ShardReader(read_index(folder)), Buffers()
    first, second = (reader.read(shard, row, buffers, number) for number, (shard, row) in enumerate([(0, 4), (2, 1)]))
    assert _whole(first["json"]) == wanted[0, 4]["json"]
    assert _whole(second["json"]) == wanted[2, 1]["json"]
    reader.read(0, 0, buffers, 0)
    assert _whole(first["json"]) != wanted[0, 4]["json"], "number 0 was taken again"
    assert _whole(second["json"]) == wanted[2, 1]["json"]


def test_few_shards_are_open_at_a_time_and_none_travels_to_a_worker(tmp_path):
    count = OPEN_SHARDS + 6
    folder = write_folder(tmp_path / "shards", [1] * count, lambda n: {"json": b"%d" % n})

    def files_open() -> int:
        links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
        return sum(os.path.exists(link) and str(folder) in os.readlink(link) for link in links)

    reader = ShardReader(read_index(folder))
    for shard in [*range(count), *range(count)]:
        assert _whole(reader.read(shard, 0, Buffers())["json"]) == b"%d" % shard
        assert files_open() <= OPEN_SHARDS
    copy = pickle.loads(pickle.dumps(reader))  # what a loader process that is spawned is given; our own bytes
    opened = files_open()
    assert _whole(copy.read(3, 0, Buffers())["json"]) == b"3"
    assert files_open() == opened + 1
    copy.close()
    reader.close()
    assert files_open() == 0


# --- damage ---


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Index and bytes of one shard, and the file to damage."""
    folder = write_folder(tmp_path_factory.mktemp("damage") / "shards", [4], lambda n: toy_members(n, clip=b"x" * 700))
    path = folder / "shard-000000.tar"
    return read_index(folder), path, path.read_bytes()


def _outcomes(index) -> list[dict[str, bytes] | str]:
    """Of each row: its members, or why there are none."""
    out = []
    for row in range(4):
        try:
            raw = ShardReader(index, skip="mp4").read(0, row, Buffers())
            out.append({extension: _whole(member) for extension, member in raw.items() if extension != "__key__"})
        except CorruptData as error:
            out.append(str(error))
    return out


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 11_000), st.binary(min_size=1, max_size=20))
@example(124, b"-0000001000")  # a size that leads back
@example(124, b"77777777777")  # beyond the end
@example(124, b"\x80\x00\x00\x00\x00\x00\x00\x00\x7f\xff\xff\xff")  # sizes of other dialects
@example(156, b"5")
@example(345, b"prefix")
def test_whatever_is_overwritten_a_row_is_refused_or_has_its_own_members(sound, place, noise):
    """Noise in contents is not seen here; noise in headers, with or without a checksum that fits, always ends well."""
    index, path, content = sound
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = [member for member in tar if member.offset <= place]
    for fixed in (False, True):
        data = bytearray(content)
        data[place : place + len(noise)] = noise[: max(len(data) - place, 0)]
        if fixed and members:
            at = members[-1].offset
            header = bytearray(data[at : at + 512])
            header[148:156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(header)
        path.write_bytes(bytes(data))
        for row, got in enumerate(_outcomes(index)):
            if isinstance(got, str):
                assert got.startswith("shard-000000.tar")
                assert "\n" not in got
            else:
                sizes = {name: len(value) for name, value in got.items()}
                assert sum(sizes.values()) < len(data) if fixed else sizes == _sizes(row)
    path.write_bytes(content)
    assert all(isinstance(got, dict) for got in _outcomes(index))


def _sizes(number: int) -> dict[str, int]:
    return {name: len(value) for name, value in toy_members(number).items() if name != "mp4"}


def test_reasons_name_what_is_wrong(sound):
    index, path, content = sound
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        at = [member.offset for member in tar]
    for field, value, reason in (
        (slice(124, 136), b"-0000001000\0", "a member's header is damaged"),
        (slice(124, 136), b"00077777777\0", "ends inside a member"),
        (slice(0, 9), b"/absolute", "is not plain"),
        (slice(156, 157), b"5", "is no file"),
    ):
        data = bytearray(content)
        header = bytearray(data[at[12] : at[12] + 512])
        header[field] = value
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[at[12] : at[12] + 512] = header
        path.write_bytes(bytes(data))
        got = _outcomes(index)
        assert isinstance(got[1], dict)
        assert got[2] == got[3]
        assert got[2].startswith("shard-000000.tar: holds 2 samples, the index says 4 (")
        assert reason in got[2]
    path.write_bytes(content)


@pytest.mark.parametrize("broken", [b"\xa5" * 512, bytes(512)], ids=["noise", "zeros"])
@pytest.mark.parametrize("sample", range(4))
def test_a_sample_of_which_only_the_first_members_can_be_read_is_not_given(sound, sample, broken):
    """Its latents would be missing without a word."""
    index, path, content = sound
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        (at,) = (m.offset for m in tar if m.name == f"{toy_key(sample)}.latents.npy")
    data = bytearray(content)
    data[at:] = broken[0:1] * (len(data) - at)
    path.write_bytes(bytes(data))
    got = _outcomes(index)
    assert [isinstance(outcome, dict) for outcome in got] == [row < sample for row in range(4)]
    assert all(got[row].keys() == _sizes(row).keys() for row in range(sample))
    path.write_bytes(content)


def _npy_with_header(length: int, value: np.ndarray) -> bytes:
    """A .npy file whose header is filled up to another length than numpy's own."""
    text = f"{{'descr': '{value.dtype.str}', 'fortran_order': False, 'shape': {value.shape}, }}"
    text = text.ljust(length - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + (length - 10).to_bytes(2, "little") + text.encode() + value.tobytes()


def test_latents_behind_a_header_of_another_length_are_read_all_the_same(tmp_path):
    def members(number):
        latents = np.full((16, 2, 4, 4), number, np.float16)
        order = np.asfortranarray(latents)
        changed = {1: _npy_with_header(96, latents), 3: npy(order)}
        return toy_members(number) | ({"latents.npy": changed[number % 4]} if number % 4 in changed else {})

    loader = toy_loader(write_folder(tmp_path / "shards", [12], members), batch_size=3)
    for batch in take(loader, 12):
        for row, meta in zip(batch.latents, batch.meta):
            assert (row == int(meta["task"])).all()


def test_a_header_of_another_length_in_a_file_of_the_known_size_is_refused(tmp_path):
    """Its data would lie elsewhere than they are read to."""

    def members(number):
        content = _npy_with_header(96, np.zeros((16, 2, 4, 4), np.float16)) + bytes(32)
        return toy_members(number) | ({"latents.npy": content} if number == 5 else {})

    loader = toy_loader(write_folder(tmp_path / "shards", [8], members), on_corrupt="skip")
    take(loader, 4)
    ((name, entry),) = loader.skipped.items()
    assert name == f"shard-000000.tar/{toy_key(5)}"
    assert "header of another length" in entry["reason"] or "holds 1056 bytes" in entry["reason"]
