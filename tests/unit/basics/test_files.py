"""Files that appear whole or not at all, what waits for the disk, and locks."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kairos_train.basics.errors import UserError
from kairos_train.basics.files import (
    describe_file,
    locked,
    new_folder,
    read_json,
    replacing,
    sha256_of,
    write_json,
    write_whole,
)
from kairos_train.checkpoint.writing import write_checkpoint


@pytest.fixture
def disk(tmp_path, monkeypatch) -> list[str]:
    """Names of what `fsync` was called for, each with whether the file "new" was there under its name."""
    calls, sync = [], os.fsync

    def recording(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        calls.append(f"{name} {'after' if (tmp_path / 'new').exists() else 'before'}")
        sync(handle)

    monkeypatch.setattr(os, "fsync", recording)
    return calls


def _fail_half_way(part: Path) -> None:
    part.write_text("half a pa")
    raise OSError("the disk is full")


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "page.html"
    write_whole(path, "old")
    with pytest.raises(OSError, match="full"), replacing(path) as part:
        _fail_half_way(part)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]
    write_whole(path, "new")
    assert path.read_text() == "new"


def test_a_folder_has_its_name_when_all_is_in_it(tmp_path):
    for fails in (True, False):
        try:
            with new_folder(tmp_path / "made" / "out") as work:
                assert not (tmp_path / "made" / "out").exists()
                (work / "a").write_text("a")
                if fails:
                    raise OSError("the disk is full")
        except OSError:
            assert os.listdir(tmp_path / "made") == []
    assert os.listdir(tmp_path / "made") == ["out"]
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "made" / "out") as work:
        (work / "b").write_text("b")
    assert os.listdir(tmp_path / "made") == ["out"]
    assert os.listdir(tmp_path / "made" / "out") == ["a"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    code = f"import os; from kairos_train.basics.files import new_folder\nwith new_folder({str(tmp_path / 'out')!r}): "
    subprocess.run([sys.executable, "-c", code + "os.kill(os.getpid(), 9)"], check=False)
    (killed,) = tmp_path.iterdir()
    with new_folder(tmp_path / "out") as mine:
        assert list(tmp_path.iterdir()) == [mine] != [killed]
        with new_folder(tmp_path / "other"):
            pass
        with new_folder(tmp_path / "out") as another:
            assert mine.exists()
        shutil.rmtree(tmp_path / "out")
        assert not another.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_the_mode_of_a_folder_is_the_umasks(tmp_path, umask):
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "out") as work:
            assert work.stat().st_mode & 0o777 == 0o777 & ~umask
        checkpoint = write_checkpoint(tmp_path / "checkpoints", 1, sections={}, state={}, files={})
    finally:
        os.umask(before)
    for folder in (tmp_path / "out", checkpoint):
        assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


def test_durable_files_are_on_the_disk_before_they_have_their_name_and_their_folder_after(tmp_path, disk):
    write_whole(tmp_path / "new", "text", durable=True)
    (first, of_file), (folder, of_folder) = (call.split() for call in disk)
    assert first.startswith(".new.")
    assert (of_file, folder, of_folder) == ("before", tmp_path.name, "after")


def test_other_files_do_not_wait_for_the_disk(tmp_path, disk):
    write_json(tmp_path / "new", {"a": 1})
    with new_folder(tmp_path / "folder"):
        pass
    assert disk == []


def test_a_long_name_has_a_temporary_one_too(tmp_path):
    write_whole(tmp_path / ("n" * 250), b"x")
    assert os.listdir(tmp_path) == ["n" * 250]


def test_a_value_that_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": [2]})
    assert path.read_text() == '{\n "a": [\n  2\n ],\n "b": 1\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"b": float("nan")})
    assert read_json(path, remedy="") == {"b": 1, "a": [2]}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, r"x\.json: not found; write it again"),
        ("{", r"x\.json: is not JSON \(.*\); write it again"),
        ("\ud800", r"x\.json: is not JSON \(.*\); write it again"),
        ("[]", r"x\.json: holds a list, must be an object; write it again"),
        ("[" * 200_000, r"x\.json: is not JSON \(is nested deeper than 32\); write it again"),
    ],
)
def test_an_unreadable_json_file_is_named_with_the_remedy(tmp_path, content, match):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=match):
        read_json(tmp_path / "x.json", remedy="write it again")


def test_a_file_is_described_by_size_and_digest(tmp_path):
    content = os.urandom(300_000)
    (tmp_path / "f").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    assert sha256_of(tmp_path / "f") == digest
    assert describe_file(tmp_path / "f") == {"bytes": 300_000, "sha256": digest}


def test_one_at_a_time_has_the_lock(tmp_path):
    with locked(tmp_path / "lock") as mine:
        assert mine
        with locked(tmp_path / "lock", wait=False) as too:
            assert not too
        entered = threading.Event()

        def wait() -> None:
            with locked(tmp_path / "lock"):
                entered.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.05)
    assert entered.wait(60)
    thread.join()
    with locked(tmp_path / "lock", wait=False) as mine:
        assert mine


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"lock: cannot be locked \(No locks available\)"), locked(tmp_path / "lock"):
        pytest.fail("not locked")
