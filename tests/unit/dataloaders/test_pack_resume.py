"""Packing that is stopped, killed, repeated and spread over processes gives the same bytes, and each sample once."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.packed_samples import folder_bytes, packed_samples
from support.toy_datasets import WINDOW, toy_encoder, write_dataset

from dataloaders.files.workers import spread
from dataloaders.packing import pack as packing
from dataloaders.packing.pack import QUARANTINE, pack
from dataloaders.shards import read_index, verify
from kairos_train.basics.errors import UserError

ARGUMENTS = {"prompt_template": "Do: {task}", "shard_samples": 9}
COMMAND = """
import itertools, sys, time
from dataloaders.packing import pack as packing
from dataloaders.config import WindowConfig
window = WindowConfig(frames=5, action_video_freq_ratio=1, stride=2, height=32, width=32)
source, out, processes, what, halt = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
write, written, spread = packing.write_shard, itertools.count(), packing.spread

def stand_at(here, done):
    if (here, done) == (what, halt):
        time.sleep(600)

def blocks_of(blocks, number):
    for block in blocks:
        yield block
        stand_at("shards", number)

def units_of(make, todo, processes):
    for number, unit in enumerate(spread(make, todo, processes), 1):
        yield unit
        stand_at("units", number)

packing.write_shard = lambda path, blocks: write(path, blocks_of(blocks, next(written)))
packing.spread = units_of
packing.pack(source, out, window=window, prompt_template="Do: {task}", shard_samples=9, processes=processes)
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory) -> dict[str, bytes]:
    """The bytes of an undisturbed packing."""
    out = tmp_path_factory.mktemp("whole") / "shards"
    pack(dataset, out, window=WINDOW, **ARGUMENTS)
    return folder_bytes(out)


def start(dataset: Path, out: Path, processes: int, what: str = "", halt: int = 0) -> subprocess.Popen:
    """A packing of its own; if told so, it stands still after some "units", or in the tar behind some "shards"."""
    command = [sys.executable, "-c", COMMAND, *map(str, (dataset, out, processes, what, halt))]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)


def running(group: int) -> list[int]:
    """Processes of a group. One that has ended is none, though whoever adopted it has not asked for its exit code."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group, *_ = path.read_text().rpartition(")")[2].split()
            if int(its_group) == group and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def wait_for(process: subprocess.Popen, condition) -> bool:
    """Whether the condition came true before the process ended."""
    deadline = time.monotonic() + 60
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return False


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_again_and_again_it_gives_each_sample_once_and_the_same_bytes(dataset, whole, tmp_path, processes):
    out = tmp_path / "shards"

    def done(pattern: str) -> int:
        return len(list(tmp_path.glob(f".shards.*.packing/{pattern}")))

    units, shards = "units/*/*.json", "shards.*/*.json"
    stages = [("units", 2, units, 2), ("units", 7, units, 7), ("shards", 1, shards, 1), ("shards", 2, shards, 3)]
    for what, count, pattern, there in stages if processes == 1 else stages[:3:2]:
        process = start(dataset, out, processes, what, count)
        assert wait_for(process, lambda p=pattern, n=there: done(p) >= n)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(dataset, out, processes).wait() == 0
    assert folder_bytes(out) == whole
    keys = [sample.key for sample in packed_samples(out)]
    assert len(keys) == len(set(keys)) == read_index(out).samples
    assert [p.name for p in tmp_path.iterdir()] == ["shards"]


@pytest.fixture
def packed_units(monkeypatch) -> list[int]:
    """The units that are packed from here on."""
    units, spread = [], packing.spread

    def noted(make, todo, processes):
        for unit, result in spread(make, todo, processes):
            units.append(unit)
            yield unit, result

    monkeypatch.setattr(packing, "spread", noted)
    return units


def test_units_that_are_done_are_not_packed_again(dataset, whole, tmp_path, packed_units):
    out = tmp_path / "shards"
    process = start(dataset, out, 1, "units", 3)
    records = lambda: sorted(tmp_path.glob(".shards.*.packing/units/*/*.json"))  # noqa: E731
    assert wait_for(process, lambda: len(records()) >= 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = len(records())
    pack(dataset, out, window=WINDOW, **ARGUMENTS)
    assert packed_units == list(range(before, 12))
    assert folder_bytes(out) == whole


def test_processes_whose_parent_is_killed_end_by_themselves(dataset, tmp_path):
    process = start(dataset, tmp_path / "shards", 2, "units", 1)
    assert wait_for(process, lambda: list(tmp_path.glob(".shards.*.packing/units/*/*.json")))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while left := running(process.pid):
        assert time.monotonic() < deadline, f"processes {left} outlived their parent"
        time.sleep(0.01)


def test_what_a_kill_after_the_last_rename_left_is_removed_by_the_next_call(dataset, whole, tmp_path):
    out = tmp_path / "shards"
    index = pack(dataset, out, window=WINDOW, **ARGUMENTS)
    left = tmp_path / f".shards.{index['recipe'][:12]}.packing"
    (left / "units").mkdir(parents=True)
    assert pack(dataset, out, window=WINDOW, **ARGUMENTS) == index
    assert [p.name for p in tmp_path.iterdir()] == ["shards"]
    assert folder_bytes(out) == whole


def test_a_finished_folder_is_given_back_and_another_is_not_overwritten(dataset, whole, tmp_path, packed_units):
    out = tmp_path / "shards"
    first = pack(dataset, out, window=WINDOW, **ARGUMENTS)
    assert len(packed_units) == 12
    again = pack(dataset, out, window=WINDOW, **ARGUMENTS)
    assert again == first == json.loads((out / "index.json").read_text())
    assert len(packed_units) == 12
    with pytest.raises(UserError, match="was packed from another source or with other settings; remove it"):
        pack(dataset, out, window=WINDOW, prompt_template="{task}")
    assert folder_bytes(out) == whole


def test_unfinished_work_with_other_settings_is_named(dataset, tmp_path):
    process = start(dataset, tmp_path / "shards", 1, "units", 1)
    assert wait_for(process, lambda: list(tmp_path.glob(".shards.*.packing/units/*/*.json")))
    with pytest.raises(UserError, match="is being packed by another process"):
        pack(dataset, tmp_path / "shards", window=WINDOW, **ARGUMENTS)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(UserError, match=r"\.packing: unfinished packing of shards .* remove the folder"):
        pack(dataset, tmp_path / "shards", window=WINDOW, prompt_template="{task}")


def test_an_episode_that_changed_in_between_is_packed_anew(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    dataset = write_dataset(tmp_path / "set")
    process = start(dataset, tmp_path / "shards", 1, "units", 1)
    assert wait_for(process, lambda: list(tmp_path.glob(".shards.*.packing/units/*/*.json")))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    path = dataset / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    twice = pa.FixedSizeListArray.from_arrays(pa.array(np.stack(table["action"].to_numpy()).ravel() * 2), 2)
    pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", twice), path)
    pack(dataset, tmp_path / "shards", window=WINDOW, **ARGUMENTS)
    pack(dataset, tmp_path / "fresh", window=WINDOW, **ARGUMENTS)
    assert folder_bytes(tmp_path / "shards") == folder_bytes(tmp_path / "fresh")


def test_a_bad_episode_is_left_out_and_listed_when_asked(tmp_path, dataset):
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken = write_dataset(tmp_path / "set")
    path = broken / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    values = np.stack(table["action"].to_numpy())
    values[20] = np.inf  # the first episode has 14 frames, the second 15
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 2)
    pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", column), path)
    out = tmp_path / "shards"
    index = pack(broken, out, window=WINDOW, on_bad="skip", **ARGUMENTS)
    assert index["source"]["quarantined"] == 1
    (line,) = [json.loads(line) for line in (out / QUARANTINE).read_text().splitlines()]
    assert "episode 1: column 'action' is inf at frame 6" in line["reason"]
    assert {sample.meta["episode"] for sample in packed_samples(out)} == set(range(12)) - {1}
    assert index["source"]["episodes"] == read_index(out).statistics()["num_episodes"] == 11


@pytest.mark.parametrize("sees", [False, True])
def test_encodings_of_every_caption_are_stored_with_and_without_the_picture(tmp_path, sees):
    dataset = write_dataset(
        tmp_path / "set", 3, caption_detailed=lambda i: "d" * (20 + i), score_quality=lambda i: i / 4
    )
    for processes in (1, 2):
        pack(
            dataset,
            tmp_path / f"out{processes}",
            window=WINDOW,
            prompt_template="{task}",
            encoder=functools.partial(toy_encoder, sees=sees),
            processes=processes,
        )
    assert folder_bytes(tmp_path / "out1") == folder_bytes(tmp_path / "out2")
    index = read_index(tmp_path / "out1")
    assert index.encoders == {"text": {"kind": "toy", "image": sees}}
    assert (index.captions, index.scores) == (["instruction", "detailed"], ["quality"])
    assert (index.empty_context() == 0).all()
    for sample in packed_samples(tmp_path / "out1"):
        number, frames = sample.meta["episode"], sample.arrays["latents"].shape
        assert sample.meta["scores"] == {"quality": number / 4}
        assert sample.meta["captions"] == {"instruction": f"task {number}", "detailed": "d" * (20 + number)}
        assert frames == (16, 2, 4, 4)
        contexts = {name: values[0, 0] for name, values in sample.arrays.items() if name.startswith("context")}
        expected = {"context": 6, "context_detailed": 20 + number}
        if sees:  # text-to-video must not see the first frame
            expected |= {f"{name}_text": value for name, value in expected.items()}
            expected |= {name: value + 0.5 for name, value in expected.items() if not name.endswith("_text")}
        assert contexts == expected
        assert sample.arrays["context"].dtype == np.float16


def test_packed_with_other_encoders_is_another_folder(tmp_path, dataset):
    settings = {"window": WINDOW, "prompt_template": "{task}"}
    pack(dataset, tmp_path / "out", encoder=functools.partial(toy_encoder, sees=False), **settings)
    with pytest.raises(UserError, match="with other settings"):
        pack(dataset, tmp_path / "out", encoder=functools.partial(toy_encoder, sees=True), **settings)


def test_captions_of_a_file_are_carried_along(tmp_path, dataset):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"episode_index": 2, "captions": {"short": "two"}, "scores": {"motion": 0.5}}\n')
    index = pack(dataset, tmp_path / "out", window=WINDOW, prompt_template="{task}", captions=path)
    assert index["captions"] == ["instruction", "short"]
    for sample in packed_samples(tmp_path / "out"):
        mine = sample.meta["episode"] == 2
        assert sample.meta["captions"].get("short") == ("two" if mine else None)
        assert sample.meta["scores"] == ({"motion": 0.5} if mine else {})
    assert verify(tmp_path / "out") == []


def fail_at(worker: int, *, how: str):
    def do(task: int) -> int:
        if task == 5 and how == "user":
            raise UserError("task 5 is bad")
        if task == 5 and how == "bug":
            raise ValueError("a fault")
        if task == 5 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return task * task

    return do


def test_tasks_are_done_once_each():
    assert sorted(spread(functools.partial(fail_at, how="never"), range(9), 3)) == [(n, n * n) for n in range(9)]


@pytest.mark.parametrize(
    ("how", "kind", "match"),
    [
        ("user", UserError, "^task 5 is bad$"),
        ("bug", RuntimeError, "task 5 failed:(.|\n)*ValueError: a fault"),
        ("killed", RuntimeError, "process of task 5 died with exit code -9"),
    ],
)
def test_a_task_that_fails_ends_them_all(how, kind, match):
    with pytest.raises(kind, match=match):
        list(spread(functools.partial(fail_at, how=how), range(9), 2))
