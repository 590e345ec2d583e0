"""Users, passwords and signatures of URLs: used, and in nothing that is written or printed."""

import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.commands import TINY
from support.http_server import Habits, serving
from support.toy_videos import caption, counting, jpg, mp4, write_manifest, write_tar

from kairos_train.cli import main
from kairos_train.operations.events import read_events

SECRET = "S3CR3T"
CLIPS = ["data.clips.fps=10", "data.clips.short_side=64", "data.clips.most_frames=9"]


def signed(address: str, name: str, secret: str = SECRET) -> str:
    """The URL of a file, with all that it may be asked for."""
    return f"http://user:{secret}@{urlsplit(address).netloc}/{name}?X-Signature={secret}&expires=1#{secret}"


def told(capfd, folder: Path) -> str:
    """All that was printed, and every name and byte of all files below a folder."""
    printed = capfd.readouterr()
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = "\n".join(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return "\n".join([printed.out, printed.err, names, *(path.read_bytes().decode("latin-1") for path in files)])


@pytest.fixture
def served(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(mp4(counting(18)))
    (folder / "b.jpg").write_bytes(jpg(counting(9)[8]))
    with serving(folder, Habits(secret=SECRET)) as (address, _):
        yield folder, address


def test_sources_that_are_signed_are_packed_and_shown_nowhere(served, tmp_path, capfd, monkeypatch):
    (folder, address), work = served, tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    rows = [{"path": signed(address, name), "caption": name} for name in ("a.mp4", "b.jpg", "none.mp4")]
    rows += [{"path": signed(address, "a.mp4").replace("http", "gopher"), signed(address, "x"): "a field"}]
    write_manifest(folder, rows)
    write_tar(folder / "c.tar", [("a.mp4", mp4(counting(18))), ("a.json", caption("a")), ("b.mp4", b"none")])
    for name, out in (("manifest.jsonl", "one"), ("c.tar", "two")):
        assert main(["data", "pack", signed(address, name), "--out", out, "--on-bad", "skip", *CLIPS]) == 0
    for source, name in ((signed(address, "manifest.jsonl"), "page"), (signed(address, "c.tar"), "other")):
        assert main(["data", "inspect", source, "--out", name, *CLIPS]) == 0
        assert main(["data", "verify", source, *CLIPS]) == 1
    assert main(["data", "pack", signed(address, "manifest.jsonl"), "--out", "stopped", *CLIPS]) == 2
    assert main(["data", "pack", signed(address, "c.tar", "wrong"), "--out", "wrong", *CLIPS]) == 2
    text = told(capfd, work)
    assert SECRET not in text
    assert "wrong@" not in text
    host = f"http://{urlsplit(address).netloc}"
    lines = [json.loads(line) for line in (work / "one/quarantine.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [f"{host}/manifest.jsonl: line {number}" for number in (3, 4)]
    assert f"{host}/none.mp4: cannot be read" in lines[0]["reason"]
    (line,) = (json.loads(line) for line in (work / "two/quarantine.jsonl").read_text().splitlines())
    assert line["name"] == f"{host}/c.tar: b"
    assert f'"path": "{host}/a.mp4"' in text, "the rest of an address is shown"


@pytest.mark.nightly
def test_a_run_on_shards_that_are_signed_shows_no_secret_and_goes_on_with_another(shards, tmp_path, capfd, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def train(address: str, secret: str, *overrides: str) -> int:
        data = [f"data.shards='{signed(address, 'shards', secret)}'", "data.validation_shards=null", "data.workers=0"]
        return main(["train", *TINY, *data, "run_dir=run", "data.cache_dir=cache", *overrides])

    with serving(shards, Habits()) as (address, habits):
        for habits.secret, steps in ((SECRET, 2), ("R3N3W3D", 3)):
            assert train(address, habits.secret, f"train.steps={steps}", "train.checkpoint_every=2") == 0
    assert [event["step"] for event in read_events(Path("run")) if event["kind"] == "start"] == [0, 2]
    assert main(["export", "run", "--out", "export"]) == 0
    assert main(["report", "run", "--out", "report.html"]) == 0
    assert main(["status", "run"]) == 0
    text = told(capfd, work)
    assert SECRET not in text
    assert "R3N3W3D" not in text
    assert "/shards" in (work / "run/config.yaml").read_text()
