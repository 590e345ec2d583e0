"""`data verify`: every kind of damage to a shard folder is found and named."""

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from support.http_server import Habits, serving
from support.terminal import on_a_terminal
from support.toy_datasets import WINDOW, toy_encoder, write_dataset

from dataloaders.config import DataConfig
from dataloaders.packing.inspection import inspect
from dataloaders.packing.pack import pack
from dataloaders.packing.verification import verify
from dataloaders.shards import INDEX, STATISTICS, read_index
from kairos_train import cli
from kairos_train.basics.errors import UserError


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    out = folder / "shards"
    pack(
        write_dataset(folder / "set", 4),
        out,
        window=WINDOW,
        encoder=encoder,
        prompt_template="Do: {task}",
        shard_samples=9,
    )
    return out


def encoder(worker: int):
    return toy_encoder(worker, sees=True)


@pytest.fixture
def shards(packed, tmp_path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "shards"))


def rewrite(folder: Path, change, shard: int = 1) -> None:
    """Write a shard again with its members changed: change([(name, bytes)]) -> the same."""
    path = folder / read_index(folder).shards[shard].name
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def edit_index(folder: Path, **values) -> None:
    path = folder / INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def second_sample(folder: Path, shard: int = 1) -> str:
    with tarfile.open(folder / read_index(folder).shards[shard].name) as tar:
        return list(dict.fromkeys(name.split(".")[0] for name in tar.getnames()))[1]


def test_an_undamaged_folder_is_good(packed):
    verdict, index = verify(packed), read_index(packed)
    assert verdict.faults == []
    assert (verdict.samples, verdict.shards) == (index.samples, len(index.shards))
    assert verdict.bytes == sum(shard.bytes for shard in index.shards)


def test_a_folder_is_verified_and_inspected_by_url(packed, tmp_path):
    index = read_index(packed)
    with serving(packed, Habits(drop_after=20_000, drops=2)) as (address, habits):
        verdict = verify(address)
        habits.drops = 2
        facts = inspect(address, tmp_path / "page", data=DataConfig(), samples=2)
    assert habits.drops == 0
    assert (verdict.faults, verdict.samples) == ([], index.samples)
    assert facts[0].startswith(f"samples: {index.samples} in {len(index.shards)} shards")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def replaced(extension: str, new):
    """A change of the second sample's member; new None: the member is left out."""

    def change(members):
        key = list(dict.fromkeys(name.split(".")[0] for name, _ in members))[1]
        out = []
        for name, data in members:
            if name == f"{key}.{extension}":
                data = new(data) if new else None
            if data is not None:
                out.append((name, data))
        return out

    return change


def npy_of(value) -> bytes:
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


@pytest.mark.parametrize(
    ("extension", "new", "reason"),
    [
        ("mp4", lambda d: d[: len(d) // 2], "cannot be decoded"),
        ("mp4", lambda d: flipped(d, len(d) // 2), "cannot be decoded|sha256"),
        ("mp4", None, "lacks mp4"),
        ("json", None, "lacks json"),
        ("json", lambda d: d[:-4], "cannot be decoded"),
        ("json", lambda d: json.dumps(json.loads(d) | {"scores": {"a": "high"}}).encode(), "scores of a wrong type"),
        ("json", lambda d: json.dumps(json.loads(d) | {"captions": ["a"]}).encode(), "captions of a wrong type"),
        ("json", lambda d: json.dumps(json.loads(d) | {"valid_actions": 99}).encode(), "valid_actions"),
        ("action.npy", lambda d: npy_of(np.full((4, 2), np.nan, np.float32)), "not finite"),
        ("action.npy", lambda d: npy_of(np.zeros((4, 3), np.float32)), r"shape \(4, 3\), expected \(4, 2\)"),
        ("state.npy", None, "lacks state.npy"),
        ("latents.npy", lambda d: npy_of(np.zeros((16, 3, 4, 4), np.float16)), "shape"),
        ("context.npy", lambda d: npy_of(np.array([{}])), "cannot be decoded"),
    ],
)
def test_a_damaged_sample_is_named(shards, extension, new, reason):
    rewrite(shards, replaced(extension, new))
    key = second_sample(shards)
    faults = {fault.name: fault.reason for fault in verify(shards).faults}
    named = faults.get(f"shard-000001.tar/{key}", "") + faults["shard-000001.tar"]
    assert re.search(reason, named), faults
    assert set(faults) <= {"shard-000001.tar", f"shard-000001.tar/{key}"}


def test_a_truncated_shard_names_where_it_breaks_and_how_many_are_lost(shards):
    info = read_index(shards).shards[0]
    path = shards / info.name
    path.write_bytes(path.read_bytes()[: info.bytes // 2])
    faults = verify(shards).faults
    assert any("index says" in f.reason and f.name == info.name for f in faults)
    assert any("this and what follows cannot be read" in f.reason for f in faults)
    assert any(f"samples, the index says {info.samples}" in f.reason for f in faults)


def test_a_damaged_header_hides_nothing(shards):
    """tarfile itself takes such a header for the end of the archive, without a word."""
    info = read_index(shards).shards[0]
    path = shards / info.name
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[12].offset
    path.write_bytes(flipped(path.read_bytes(), offset + 20))
    faults = verify(shards).faults
    assert any("what follows cannot be read" in f.reason for f in faults)
    assert any("samples, the index says" in f.reason for f in faults)


def test_a_size_that_leads_back_ends_the_reading(shards):
    """tarfile itself would read the same member again and again."""
    info = read_index(shards).shards[0]
    path = shards / info.name
    with tarfile.open(path) as tar:
        at = tar.getmembers()[12].offset
    data = bytearray(path.read_bytes())
    header = data[at : at + 512]
    header[124:136] = b"-0000001000\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[at : at + 512] = header
    path.write_bytes(data)
    assert any("has -512 bytes" in fault.reason for fault in verify(shards).faults)


def test_files_that_are_missing_strange_or_foreign_are_named(shards):
    index = read_index(shards)
    (shards / index.shards[0].name).unlink()
    shutil.copy(shards / index.shards[1].name, shards / "shard-000099.tar")
    (shards / "empty_context.npy").unlink()
    statistics = json.loads((shards / STATISTICS).read_text())
    statistics["action"]["action"]["global_min"] = [0, 0, 0]
    (shards / STATISTICS).write_text(json.dumps(statistics))
    faults = {fault.name: fault.reason for fault in verify(shards).faults}
    assert faults["shard-000000.tar"] == "is missing"
    assert faults["shard-000099.tar"] == "is not in the index"
    assert faults["empty_context.npy"].startswith("is missing")
    assert "statistics of another dataset" in faults[STATISTICS]
    edit_index(shards, statistics_sha256=None)
    faults = {fault.name: fault.reason for fault in verify(shards).faults}
    assert faults[STATISTICS] == "action/action: global_min is not of 2 dimensions"


def test_a_key_in_two_shards_is_named(shards):
    first = read_index(shards).shards[0]
    with tarfile.open(shards / first.name) as tar:
        key = tar.getnames()[0].split(".")[0]

    def rename(members):
        other = members[0][0].split(".")[0]
        return [(name.replace(other, key), data) for name, data in members]

    rewrite(shards, rename)
    assert any(
        f.name.endswith(key) and "has the key of a sample of shard-000000.tar" in f.reason
        for f in verify(shards).faults
    )


def test_without_decoding_the_clips_are_not_looked_into(shards):
    rewrite(shards, replaced("mp4", lambda d: d[: len(d) // 2]))
    names = [fault.name for fault in verify(shards, decode=False).faults]
    assert names == ["shard-000001.tar"]


def test_what_the_commands_say_and_return(shards, tmp_path, capsys, monkeypatch):
    assert cli.main(["data", "verify", str(shards)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["samples"], found["faults"]) == (True, read_index(shards).samples, [])
    rewrite(shards, replaced("state.npy", None))
    key = second_sample(shards)
    assert cli.main(["data", "verify", str(shards), "--processes", "2"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert {"name": f"shard-000001.tar/{key}", "reason": "lacks state.npy"} in found["faults"]
    screen = on_a_terminal(monkeypatch, "data", "verify", shards, code=1)
    assert f"shard-000001.tar/{key}: lacks state.npy\n" in screen
    assert screen.endswith(f"{len(found['faults'])} faults")
    assert cli.main(["data", "verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_without_an_index_is_one_error(tmp_path):
    with pytest.raises(UserError, match=r"index\.json: does not exist"):
        verify(tmp_path)
