"""Bad inputs: each is one clear error, or is put in quarantine and counted when that is asked for.

What is wrong with a whole dataset is an error either way (`quarantined` is None). What is wrong with a part of it stops
the packing by default; with `on_bad="skip"` exactly that part is left out, listed and counted, and the rest is packed.
"""

import contextlib
import json
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from support import bad_datasets as bad
from support.bad_datasets import CAMERA, GOOD, episode_file, video_file
from support.lerobot_layouts import as_version_2
from support.packed_samples import packed_samples
from support.toy_datasets import WINDOW, write_dataset
from support.toy_videos import caption, mp4

from dataloaders.config import ClipConfig
from dataloaders.packing.pack import QUARANTINE, pack
from dataloaders.shards import read_index
from kairos_train.basics.errors import UserError

CLIPS = ClipConfig(fps=10.0, short_side=64, most_frames=9)
EPISODES = 4


@dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
        damage: spoils a good LeRobot dataset of EPISODES episodes; for clips, writes a source that has one good one.
        match: what the error says.
        quarantined: how many parts of it are left out when that is asked for; None: the whole is refused.
        window: changes of the window.
    """

    name: str
    damage: Callable[[Path], Any]
    match: str
    quarantined: int | None = None
    window: dict[str, Any] = field(default_factory=dict)


FIRST = episode_file(1)
LEROBOT = [
    Case("unknown version", bad.info(codebase_version="v1.6"), "codebase_version is 'v1.6'; it must be one of"),
    Case("info is a list", bad.text("meta/info.json", "[]"), "info.json: holds a list, must be an object"),
    Case("info is cut off", bad.cut("meta/info.json"), "is not JSON"),
    Case("negative fps", bad.info(fps=-20), "fps is -20; it must be a positive number"),
    Case("fps not a number", bad.info(fps="20"), "fps is '20'"),
    Case("fps is NaN", bad.info(fps=float("nan")), "fps is nan"),
    Case("fps is infinite", bad.info(fps=float("inf")), "fps is inf"),
    Case("features without dtype", bad.info(features={"action": {"shape": [2]}}), "features must map"),
    Case("data path leads out", bad.info(data_path="../x/{episode_index}.parquet"), "leads out of the folder"),
    Case("video path leads out", bad.info(video_path="/etc/{video_key}{episode_index}"), "leads out of the folder"),
    Case("unknown placeholder", bad.info(data_path="{nothing}"), "cannot be filled in"),
    Case("no tasks table", bad.remove("meta/tasks.jsonl"), r"tasks\.jsonl: the file is missing"),
    Case("task index as text", bad.text("meta/tasks.jsonl", '{"task_index": "x", "task": "a"}'), "task_index is 'x'"),
    Case("episode twice", bad.lines("meta/episodes.jsonl", lambda r: [*r, r[0]]), "holds episode 0 twice"),
    Case("negative length", bad.lines("meta/episodes.jsonl", lambda r: [r[0] | {"length": -3}]), "length is -3"),
    Case("no episodes", bad.text("meta/episodes.jsonl", ""), "has no episodes; there is nothing to pack"),
    Case("unknown state", bad.info(), "state_key='pose': .*no such column; it has action", None, {"state_key": "pose"}),
    Case("unknown camera", bad.info(), "'wrist' has no files", None, {"cameras": ["wrist"]}),
    Case("no camera", lambda root: shutil.rmtree(root / "videos"), "no camera with files"),
    Case(
        "broken modality",
        bad.text("meta/modality.json", '{"action": {"arm": {"start": 0}}}'),
        "is not a table of parts",
    ),
    Case(
        "mixed action sizes",
        bad.column(1, "action", lambda rows: [[*r, 0.0] for r in rows]),
        "one dataset is one embodiment",
    ),
    Case(
        "zero-length episode",
        bad.lines("meta/episodes.jsonl", lambda r: [r[0], r[1] | {"length": 0}, *r[2:]]),
        "whose length is 0",
        1,
    ),
    Case(
        "NaN action",
        bad.column(1, "action", bad.at(3, [0.0, float("nan")])),
        "'action' is nan at frame 3, dimension 1",
        1,
    ),
    Case("infinite state", bad.column(1, "observation.state", bad.at(0, [float("inf"), 0.0])), "is inf at frame 0", 1),
    Case("vectors of two lengths", bad.column(1, "action", bad.at(2, [0.0])), "vectors of different lengths", 1),
    Case("a missing vector", bad.column(1, "action", bad.at(2, None)), "rows without a value", 1),
    Case("rows are missing", bad.fewer_rows(1), "holds 14 rows of episode 1, whose length is 15", 1),
    Case("parquet is cut off", bad.cut(FIRST), "is not a readable parquet file", 1),
    Case("parquet is missing", bad.remove(FIRST), "the file is missing", 1),
    Case("mp4 is cut off", bad.cut(video_file(1)), "cannot be decoded|truncated", 1),
    Case("mp4 is missing", bad.remove(video_file(1)), "no such video file", 1),
    Case("mp4 is text", bad.text(video_file(1), "no video"), "cannot be decoded", 1),
    Case(
        "times do not fit",
        bad.column(1, "timestamp", lambda rows: [t + 0.02 * (i % 2) for i, t in enumerate(rows)]),
        "farther than the tolerance",
        1,
    ),
    Case(
        "times of another rate",
        bad.column(1, "timestamp", lambda rows: [1.5 * t for t in rows]),
        "info.json says 10 fps; timestamp says 6.66667 fps",
        1,
    ),
    Case(
        "unknown task", bad.column(1, "task_index", lambda rows: [9] * len(rows)), "task_index 9 is not in the table", 1
    ),
    Case(
        "slice too wide",
        bad.info(),
        "dimensions 0 to 5 asked of column 'action', which has 2",
        EPISODES,
        {"action_key": "action[0:5]"},
    ),
    Case(
        "no state to subtract",
        bad.info(),
        "action dimension 1 has no state to subtract",
        EPISODES,
        {"state_key": "observation.state[0:1]", "action_values": "minus_state"},
    ),
]

B, TWICE = ("b.mp4", mp4(GOOD)), (("good.mp4", mp4(GOOD)), ("good.txt", b"x"))
WITH_TEXT = (B, ("b.txt", b"b"))
CLIP = [
    Case("line is not JSON", bad.raw_manifest('{"path": "good.mp4"}\n{"path": \n'), "line 2: is not JSON", 1),
    Case("line is a list", bad.raw_manifest('{"path": "good.mp4"}\n[1]\n'), "line 2: is not a JSON object", 1),
    Case("path leads out", bad.manifest({"path": "../outside.mp4"}), "line 2: .*leads out of the folder", 1),
    Case("absolute path", bad.manifest({"path": "/etc/passwd"}), "line 2: .*leads out of the folder", 1),
    Case("no path", bad.manifest({"caption": "x"}), "line 2: has no path", 1),
    Case("path is a number", bad.manifest({"path": 3}), "line 2: path is 3", 1),
    Case("start behind end", bad.manifest({"path": "good.mp4", "start": 2, "end": 1}), "leave nothing", 1),
    Case("negative start", bad.manifest({"path": "good.mp4", "start": -1}), "leave nothing", 1),
    Case(
        "end behind the video", bad.manifest({"path": "good.mp4", "end": 60}), "end=60 is behind the video's 0.900 s", 1
    ),
    Case("start is NaN", bad.manifest({"path": "good.mp4", "start": "nan"}), "start is 'nan'; it must be a number", 1),
    Case(
        "score is text", bad.manifest({"path": "good.mp4", "end": 0.8, "scores": {"a": "high"}}), "score a is 'high'", 1
    ),
    Case("caption is a list", bad.manifest({"path": "good.mp4", "end": 0.8, "caption": ["x"]}), "caption is", 1),
    Case(
        "variant of a wrong name",
        bad.manifest({"path": "good.mp4", "end": 0.8, "captions": {"a/b": "x"}}),
        "'a/b' must be",
        1,
    ),
    Case("row twice", bad.manifest({"path": "good.mp4"}), "names the clip of line 1 a second time", 1),
    Case("file is missing", bad.manifest({"path": "none.mp4"}), "no such file", 1),
    Case("video is cut off", bad.manifest({"path": "cut.mp4"}), "cut.mp4: .*(cannot be decoded|truncated)", 1),
    Case("video is text", bad.manifest({"path": "words.mp4"}), "words.mp4: cannot be decoded", 1),
    Case("unknown kind", bad.manifest({"path": "words.xyz"}), "no video or image by its name", 1),
    Case("image is cut off", bad.manifest({"path": "cut.jpg"}), "cut.jpg: cannot be decoded", 1),
    Case("video is too short", bad.manifest({"path": "short.mp4"}), "fewer than data.clips.least_frames=5", 1),
    Case("empty manifest", bad.raw_manifest("\n"), "has no rows"),
    Case("CSV without path", bad.raw_manifest("file\ngood.mp4\n", "manifest.csv"), "one be called path"),
    Case("CSV with a column twice", bad.raw_manifest("path,path\na,b\n", "manifest.csv"), "each must be there once"),
    Case(
        "CSV row too long",
        bad.raw_manifest("path,caption\ngood.mp4,a\ngood.mp4,a,b\n", "manifest.csv"),
        "has not 2 cells",
        1,
    ),
    Case("CSV not in UTF-8", bad.raw_manifest(b"path\n\xff\n", "manifest.csv"), "is not a CSV file in UTF-8"),
    Case("tar member is missing", bad.tar(B), "b: has the members mp4; a sample is one of", 1),
    Case("tar without media", bad.tar(("b.json", caption("b"))), "b: has the members json", 1),
    Case(
        "tar key twice", bad.tar(("b.txt", b"b"), *TWICE), "good: is in its tar a second time|b: has the members txt", 2
    ),
    Case("tar member twice", bad.tar(B, *WITH_TEXT), "b: has its member mp4 twice", 1),
    Case(
        "tar path leads out", bad.tar(("../b.mp4", mp4(GOOD)), ("../b.txt", b"b")), r"\.\./b\.mp4: is no plain file", 2
    ),
    Case("tar absolute path", bad.tar(("/b.mp4", mp4(GOOD)), ("/b.txt", b"b")), r"/b\.mp4: is no plain file", 2),
    Case("tar link", bad.linked_tar, "link.mp4: is no plain file", 1),
    Case(
        "tar is cut off",
        bad.tar(*WITH_TEXT, change=lambda d: d[: d.index(b"b.mp4") + 700]),
        "what follows cannot be read",
        1,
    ),
    Case(
        "tar without its end",
        bad.tar(*WITH_TEXT, change=lambda d: d.rstrip(b"\0") + bytes(511)),
        "what follows cannot be read",
        1,
    ),
    Case(
        "tar header damaged",
        bad.tar(*WITH_TEXT, change=lambda d: bad.flip(d.index(b"b.txt") + 100)(d)),
        "what follows cannot be read",
        1,
    ),
    Case("tar JSON is a list", bad.tar(B, ("b.json", b"[1]")), "b: its json or txt cannot be used", 1),
    Case("tar text is no text", bad.tar(B, ("b.txt", b"\xff\xfe")), "b: its json or txt cannot be used", 1),
]


@contextlib.contextmanager
def no_longer_than(seconds: int):
    """A hang is a failure."""

    def stop(*ignored):
        raise TimeoutError(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    return as_version_2(write_dataset(folder / "set", EPISODES), folder / "v21", "v2.1")


def attempt(source: Path, out: Path, case: Case, on_bad: str) -> dict[str, Any]:
    window = replace(WINDOW, **case.window)
    with no_longer_than(60):
        return pack(source, out, window=window, clips=CLIPS, prompt_template="{task}", on_bad=on_bad)


def refused(source: Path, out: Path, case: Case, on_bad: str, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        attempt(source, out, case, on_bad)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert not out.exists()
    for work in out.parent.glob(f".{out.name}.*"):
        shutil.rmtree(work)


def check(source: Path, tmp_path: Path, case: Case, parts: int) -> None:
    """`parts`: how many there are in all, each of them packed or in quarantine."""
    refused(source, tmp_path / "out", case, "stop", case.match)
    if case.quarantined is None:
        refused(source, tmp_path / "out", case, "skip", case.match)
        return
    if case.quarantined == parts:
        refused(source, tmp_path / "out", case, "skip", "has no usable sample; .*" + case.match)
        return
    index = attempt(source, tmp_path / "out", case, "skip")
    listed = [json.loads(line) for line in (tmp_path / "out" / QUARANTINE).read_text().splitlines()]
    assert index["source"]["quarantined"] == len(listed) == case.quarantined
    assert any(re.search(case.match, f"{line['name']}: {line['reason']}") for line in listed), listed
    samples = packed_samples(tmp_path / "out")
    assert len(samples) == index["samples"] == read_index(tmp_path / "out").samples > 0
    packed = {sample.meta.get("episode", sample.meta.get("line", sample.meta.get("source_key"))) for sample in samples}
    assert len(packed) == parts - case.quarantined, "what is not packed is in quarantine"


@pytest.mark.parametrize("case", LEROBOT, ids=lambda case: case.name)
def test_bad_lerobot_datasets(case, good, tmp_path):
    source = tmp_path / "set"
    shutil.copytree(good, source)
    case.damage(source)
    check(source, tmp_path, case, EPISODES)


@pytest.mark.parametrize("case", CLIP, ids=lambda case: case.name)
def test_bad_clips(case, tmp_path):
    source = case.damage(tmp_path / "set")
    check(source, tmp_path, case, 1 + (case.quarantined or 0))


def edited(**changes):
    """Change index.json."""

    def damage(folder: Path, _: Path) -> None:
        path = folder / "index.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | {k: v(values[k]) if callable(v) else v for k, v in changes.items()}))

    return damage


SHARDS = {
    "another format": (edited(format="tars-7"), "format 'tars-7' is not"),
    "unknown entry": (edited(extra=1), "incomplete or unknown entry"),
    "unknown window key": (edited(window=lambda w: w | {"hight": 3}), "unknown key 'hight'"),
    "shard path leads out": (edited(shards=lambda s: [s[0] | {"name": "../x.tar"}]), "is not a plain file name"),
    "wrong count": (edited(samples=7), "samples=7 is not the sum over its shards"),
    "no shards": (edited(shards=[], samples=0), "is not the sum over its shards"),
    "index is cut off": (lambda folder, _: bad.cut("index.json")(folder), "cannot be read as JSON"),
    "no index": (lambda folder, _: (folder / "index.json").unlink(), "does not exist"),
    "no statistics": (lambda folder, _: (folder / "dataset_stats.json").unlink(), "does not exist"),
    "statistics of another dataset": (
        lambda folder, other: shutil.copy(other / "dataset_stats.json", folder),
        "not the file that these shards were packed with",
    ),
}


@pytest.fixture(scope="module")
def packed(good, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("packed")
    other = write_dataset(folder / "other", EPISODES + 1)
    for source, name in ((good, "one"), (other, "two")):
        pack(source, folder / name, window=WINDOW, prompt_template="{task}")
    return folder / "one", folder / "two"


@pytest.mark.parametrize("name", SHARDS)
def test_bad_shard_folders(name, packed, tmp_path):
    damage, match = SHARDS[name]
    shutil.copytree(packed[0], tmp_path / "shards")
    read_index(tmp_path / "shards").statistics()
    damage(tmp_path / "shards", packed[1])
    with pytest.raises(UserError, match=match) as caught:
        read_index(tmp_path / "shards").statistics()
    assert "\n" not in str(caught.value)


def test_the_list_is_long_enough():
    names = [case.name for case in (*LEROBOT, *CLIP)]
    assert len(names) == len(set(names)) >= 25
    assert CAMERA in video_file(0)
