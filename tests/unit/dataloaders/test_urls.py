"""Files by URL against a local server that drops connections, keeps silent, refuses and changes its mind."""

import importlib.util
import tarfile

import fsspec
import numpy as np
import pytest
from support.http_server import Habits, serving

from dataloaders.files.urls import (
    ChangedFile,
    Patience,
    base_name,
    download,
    join,
    open_url,
    parent,
    read_range,
    read_url,
    size_of,
)
from kairos_train.basics.errors import UserError

QUICK = Patience(timeout_s=0.3, attempts=4, pause_s=0.01)
DATA = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data.bin").write_bytes(DATA)
    (tmp_path / "empty.bin").write_bytes(b"")
    return tmp_path


def test_a_dropped_connection_goes_on_at_the_byte_where_it_broke(folder):
    with serving(folder, Habits(drop_after=70_000)) as (address, habits):
        assert read_url(f"{address}/data.bin", QUICK) == DATA
        assert [first for _, first in habits.requests] == [0, 70_000, 140_000, 210_000, 280_000]


def test_a_server_without_ranges_is_read_through_a_dropped_connection(folder):
    with serving(folder, Habits(drop_after=70_000, drops=1, ranges=False)) as (address, habits):
        assert read_url(f"{address}/data.bin", QUICK) == DATA
        assert len(habits.requests) == 2


@pytest.mark.parametrize("habits", [Habits(silent=2, silence_s=1.0), Habits(refuse=3)], ids=["silent", "refusing"])
def test_a_slow_or_busy_server_is_asked_again(folder, habits):
    with serving(folder, habits) as (address, _):
        assert read_url(f"{address}/data.bin", QUICK) == DATA


def test_patience_ends_with_one_line_that_names_the_file_and_the_byte(folder):
    with serving(folder, Habits(refuse=99)) as (address, habits):
        with pytest.raises(OSError, match=r"/data\.bin: cannot be read at byte 0 after 4 attempts \(.*503") as caught:
            read_url(f"{address}/data.bin?signature=secret", QUICK)
        assert len(habits.requests) == 4
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    with pytest.raises(OSError, match=r"after 4 attempts"):  # nobody listens any more
        read_url(f"{address}/data.bin", QUICK)


def test_a_connection_that_never_brings_a_byte_ends_the_reading(folder):
    with serving(folder, Habits(drop_after=0)) as (address, _), pytest.raises(OSError, match=r"300000 bytes early"):
        read_url(f"{address}/data.bin", QUICK)


def test_a_missing_file_is_not_asked_for_twice(folder):
    with serving(folder) as (address, habits):
        with pytest.raises(FileNotFoundError, match=r"nothing\.bin: the server answers 404"):
            read_url(f"{address}/nothing.bin", QUICK)
        assert len(habits.requests) == 1


def test_a_file_that_changes_between_two_connections_is_an_error(folder):
    with (
        serving(folder, Habits(drop_after=100_000)) as (address, habits),
        open_url(f"{address}/data.bin", QUICK) as file,
    ):
        assert file.read(1000) == DATA[:1000]
        habits.tag = '"2"'
        with pytest.raises(ChangedFile, match="changed while it was being read"):
            file.read()


def test_any_part_of_a_file_can_be_read(folder):
    with serving(folder) as (address, _), open_url(f"{address}/data.bin", QUICK) as file:
        assert file.seek(-5, 2) == len(DATA) - 5
        assert file.read() == DATA[-5:]
        file.seek(1234)
        assert file.read(10) == DATA[1234:1244]
        assert file.tell() == 1244
        assert size_of(f"{address}/data.bin", QUICK) == len(DATA)
        assert read_url(f"{address}/empty.bin", QUICK) == b""


def test_a_range_asks_for_no_more_than_itself(folder):
    with serving(folder) as (address, habits):
        assert read_range(f"{address}/data.bin", 1000, 51_000, QUICK) == DATA[1000:51_000]
        assert habits.sent == 50_000
        assert read_range(f"{address}/data.bin", len(DATA) - 5, len(DATA) + 5, QUICK) == DATA[-5:]
    with serving(folder, Habits(drop_after=20_000)) as (address, habits):
        assert read_range(f"{address}/data.bin", 1000, 51_000, QUICK) == DATA[1000:51_000]
        assert [first for _, first in habits.requests] == [1000, 21_000, 41_000]
    with serving(folder, Habits(ranges=False)) as (address, habits):
        assert read_range(f"{address}/data.bin", 1000, 51_000, QUICK) == DATA[1000:51_000]
    assert read_range(folder / "data.bin", 5, 9) == DATA[5:9]


def test_a_tar_is_read_from_a_failing_server(folder):
    with tarfile.open(folder / "a.tar", "w") as tar:
        tar.add(folder / "data.bin", "data.bin")
    with (
        serving(folder, Habits(drop_after=90_000)) as (address, _),
        open_url(f"{address}/a.tar", QUICK) as file,
        tarfile.open(fileobj=file) as tar,
    ):
        assert tar.extractfile("data.bin").read() == DATA


def test_a_download_appears_when_it_is_complete(folder, tmp_path):
    target = tmp_path / "here" / "copy.bin"
    target.parent.mkdir()
    with serving(folder, Habits(drop_after=90_000)) as (address, habits):
        download(f"{address}/data.bin", target, QUICK)
        assert target.read_bytes() == DATA
        habits.drop_after = 0
        with pytest.raises(OSError, match="early"):
            download(f"{address}/data.bin", target.with_name("other.bin"), QUICK)
    assert [p.name for p in target.parent.iterdir()] == ["copy.bin"]


def test_a_user_and_a_password_are_told_to_their_own_server_alone(folder):
    with serving(folder, Habits(secret="a/b c")) as (address, habits):
        own = address.replace("http://", "http://user:a%2Fb%20c@")
        assert read_url(f"{own}/data.bin?signature=a/b%20c", Patience(attempts=1)) == DATA
        with (
            serving(folder, Habits(redirect=f"{address}/data.bin")) as (other, first),
            pytest.raises(PermissionError, match="403"),
        ):
            read_url(f"{other.replace('http://', 'http://user:secret@')}/data.bin", Patience(attempts=1))
    assert first.logins[0].startswith("Basic ")
    assert habits.logins[-1] is None


def test_a_name_that_is_not_ascii_is_read(folder):
    (folder / "é ü.bin").write_bytes(b"x")
    with serving(folder) as (address, _):
        assert read_url(join(address, "é ü.bin"), QUICK) == read_url(f"{address}/é%20ü.bin", QUICK) == b"x"


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("https://h/a b.mp4?sig=SECRET x", "'https://h/a': is no URL .has a blank"),
        ("https://h/a?sig=SECRET\n", "'https://h/a': is no URL .has a blank or control"),
        ("https://[h/a?sig=SECRET", "is no URL .Invalid IPv6"),
        ("https://u:SECRET@h:port/a", "'https://h:port/a': is no URL .Port could not be cast"),
        ("https:///a?SECRET", "'https:///a': is no URL .has no host"),
    ],
)
def test_what_is_no_url_is_refused_without_its_secrets(url, match):
    with pytest.raises(UserError, match=match) as caught:
        open_url(url)
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_object_store_is_read_through_fsspec():
    with fsspec.open("memory://bucket/a.bin", "wb") as file:
        file.write(DATA)
    assert read_url("memory://bucket/a.bin", QUICK) == DATA
    assert size_of("memory://bucket/a.bin") == len(DATA)
    with pytest.raises(FileNotFoundError, match=r"memory://bucket/none\.bin"):
        read_url("memory://bucket/none.bin", QUICK)


def test_an_object_store_that_fails_is_read_on(monkeypatch):
    from fsspec.implementations.memory import MemoryFile

    with fsspec.open("memory://bucket/b.bin", "wb") as file:
        file.write(DATA)
    calls, read = [], MemoryFile.read

    def failing(self, count=-1):
        calls.append(count)
        if len(calls) % 3 == 2:
            raise TimeoutError("slow down")
        return read(self, min(count, 40_000))

    monkeypatch.setattr(MemoryFile, "read", failing)
    assert read_url("memory://bucket/b.bin", QUICK) == DATA


@pytest.mark.parametrize(("url", "match"), [("s3://bucket/a.tar", "pip install s3fs"), ("gopher://a/b", "use a path")])
def test_a_scheme_that_cannot_be_opened_is_one_line_with_a_remedy(url, match):
    if url.startswith("s3") and importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(UserError, match=match) as caught:
        open_url(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("base", "name", "whole"),
    [
        ("https://a.b/c", "d/e f.mp4", "https://a.b/c/d/e%20f.mp4"),
        ("https://a.b/c/?sig=x", "d.tar", "https://a.b/c/d.tar?sig=x"),
        ("s3://bucket/c", "d e.tar", "s3://bucket/c/d e.tar"),
        ("/data/c", "d.tar", "/data/c/d.tar"),
    ],
)
def test_names_are_joined_to_folders(base, name, whole):
    assert str(join(base, name)) == whole
    assert str(parent(whole)).rstrip("/") in (base.replace("/?", "?"), f"{base}/d")
    assert base_name(whole) == name.rpartition("/")[2]


@pytest.mark.parametrize("base", ["https://a.b/c", "/data/c"])
@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "..", "", "file:///etc/passwd", "a\\..\\..\\x"])
def test_names_that_lead_out_of_the_folder_are_refused(base, name):
    with pytest.raises(UserError, match="leads out of the folder"):
        join(base, name)
