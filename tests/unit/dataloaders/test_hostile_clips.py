"""Manifests and tars that want memory or what lies elsewhere: one line each in quarantine, all others are packed."""

import functools
import gc
import json
import re
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest
from support.http_server import Habits, serving
from support.packed_samples import packed_samples
from support.toy_datasets import toy_encoder
from support.toy_videos import write_manifest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
from attack_parts import cases
from attack_parts import clips as hostile

from dataloaders.config import ClipConfig, LimitsConfig, WindowConfig
from dataloaders.files.urls import Patience, read_url
from dataloaders.files.video import decode_mp4, frame_times, read_through
from dataloaders.packing.pack import QUARANTINE, pack
from dataloaders.sources.base import SourceSettings
from dataloaders.sources.clips import cut_video
from dataloaders.sources.rows import Row
from evaluation.benchmarks.completeness import video_fault
from evaluation.benchmarks.generate import first_frame
from kairos_train.basics.errors import UserError

CLIPS = ClipConfig(fps=10.0, short_side=64, aspects=[1.0], most_frames=9, least_frames=5)
LIMITS = LimitsConfig(image_pixels=10_000, video_pixels=20_000, frames=1000, member_mb=0.2, json_mb=0.1)

LARGE = {
    "large pictures": (
        hostile.named("b.mp4", lambda: hostile.encoded(height=256)),
        "pictures of 96x256, more than data",
    ),
    "wide pixels": (hostile.named("c.mp4", lambda: hostile.encoded(**{"x264-params": "sar=4/1"})), "shown at 384x64"),
    "many frames": (hostile.named("d.mp4", hostile.promised_frames(2000)), r"more than data\.limits\.frames=1000"),
    "very many frames": (
        hostile.named("e.mp4", hostile.promised_frames(2**31)),
        "e.mp4: has more than data.limits.frames",
    ),
    "a gap": (
        hostile.named("f.mkv", lambda: hostile.encoded("matroska", late=10**6)),
        "1e.06 s at 10 fps: has more than",
    ),
    "a large image": (
        hostile.named("b.png", hostile.black_png(200, 100)),
        "200x100 pixels, more than data.limits.image",
    ),
    "a huge image": (
        hostile.named("c.png", hostile.black_png(60_000, 6_000)),
        "more pixels than data.limits.image_pixels",
    ),
    "a hollow image": (hostile.hollow("d.png", 1 << 43), "has 8796093022208 bytes, more than"),
    "a hollow video": (hostile.hollow("g.mp4", 1 << 43), "g.mp4: cannot be decoded"),
    "a long line": (
        hostile.line('{"path": "good.mp4", "caption": "%s"}' % ("x" * 200_000)),
        "more than 100,000 bytes of J",
    ),
    "a long caption": (
        hostile.line({"path": "good.mp4", "end": 0.8, "caption": "x" * 30_000}),
        "30,000 characters, more",
    ),
}

ENTRIES = cases.ENTRIES | {
    "large members": (hostile.entry("b.mp4", bytes(300_000)) + hostile.entry("b.txt"), "b: has members of more than"),
    "a long text": (hostile.entry("b.mp4", b"x") + hostile.entry("b.txt", b"x" * 150_000), "its txt has 150,000 bytes"),
}


def packed(source, out: Path, limits: LimitsConfig = LIMITS, **settings) -> tuple[list, list[str]]:
    """(the samples, the lines of quarantine)."""
    pack(source, out, window=WindowConfig(), prompt_template="{task}", clips=CLIPS, limits=limits, **settings)
    text = (out / QUARANTINE).read_text() if (out / QUARANTINE).exists() else ""
    return packed_samples(out), [f"{line['name']}: {line['reason']}" for line in map(json.loads, text.splitlines())]


def greys(samples) -> set[int]:
    return {int(np.round(sample.frames.mean() / 10) * 10) for sample in samples}


@pytest.mark.parametrize(
    "rows", [cases.GUESSED, LARGE, cases.NONSENSE, cases.ELSEWHERE], ids=["guessed", "large", "nonsense", "elsewhere"]
)
def test_each_bad_row_is_one_line_and_the_others_are_packed(tmp_path, rows):
    source = hostile.manifest(tmp_path / "set", [row for row, _ in rows.values()])
    samples, lines = packed(source, tmp_path / "out", on_bad="skip")
    assert [sample.meta["path"] for sample in samples] == ["good.mp4"]
    assert greys(samples) == {40}, "nothing else is shown"
    assert len(lines) == len(rows)
    for (name, (_, match)), (number, line) in zip(rows.items(), enumerate(lines, 2)):
        assert re.search(rf"manifest\.jsonl: line {number}: .*(?:{match})", line), f"{name}: {line}"
        assert line.isprintable()
        assert len(line) < 700
    with pytest.raises(UserError, match=next(iter(rows.values()))[1]):
        packed(source, tmp_path / "stopped")


def test_each_bad_tar_is_one_line_and_what_is_before_it_is_packed(tmp_path):
    (tmp_path / "set").mkdir()
    for number, (entries, _) in enumerate(ENTRIES.values()):
        hostile.tar(tmp_path / f"set/{number:02d}.tar", entries)
    samples, lines = packed(tmp_path / "set", tmp_path / "out", on_bad="skip")
    assert greys(samples) == {40}
    assert len(lines) == len(ENTRIES)
    for (name, (_, match)), (number, line) in zip(ENTRIES.items(), enumerate(lines)):
        assert re.search(rf"{number:02d}\.tar: .*(?:{match})", line), f"{name}: {line}"
    unknown = sum(": good1: this and what" in line for line in lines)  # whether the bad header is of its last sample
    assert len(samples) == 2 * len(ENTRIES) - unknown
    assert unknown == 3


# --- what is bounded, and how it is opened ---


def test_large_pictures_are_held_one_at_a_time(tmp_path):
    """81 frames of 512×1024 pixels are 127 MB."""
    (tmp_path / "a.mp4").write_bytes(hostile.encoded(frames=81, height=512, width=1024))
    settings = SourceSettings(WindowConfig(), ClipConfig(fps=10.0, short_side=64, aspects=[2.0]), "{task}")
    given = {"suffix": ".mp4", "key": "a", "name": "a", "meta": {}, "left_out": Counter()}
    tracemalloc.start()
    try:
        (clip,) = cut_video(tmp_path / "a.mp4", Row(), settings, **given)
        read_through(tmp_path / "a.mp4")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert clip.frames.shape == (81, 64, 128, 3)
    assert peak < 20e6


def test_a_sample_that_no_shard_can_hold_is_skipped_alone(tmp_path):
    """48 characters of the dataset's name and 32 of a variant's are more than a tar has for both."""
    row = hostile.line({"path": "good.mp4", "end": 0.8, "captions": {"a": "x", "x" * 32: "x"}})
    source = hostile.manifest(tmp_path / ("set" * 20), [row])
    encoder = functools.partial(toy_encoder, sees=True)
    samples, (line,) = packed(source, tmp_path / "out", on_bad="skip", encoder=encoder)
    assert [sample.meta["path"] for sample in samples] == ["good.mp4"]
    assert re.search(r"-000002-000000: .* is no plain name of up to 100 characters", line)
    with pytest.raises(UserError, match="is no plain name of up to 100 characters"):
        packed(source, tmp_path / "stopped", encoder=encoder)


def test_frames_are_not_kept_until_python_looks_for_circles():
    data = hostile.encoded(frames=30)
    gc.collect()
    gc.disable()
    try:
        decode_mp4(data)
        assert sum(isinstance(thing, av.VideoFrame) for thing in gc.get_objects()) <= 2
    finally:
        gc.enable()


def test_limits_are_settings(tmp_path):
    rows = [
        hostile.named("b.mp4", lambda: hostile.encoded(height=256)),
        hostile.named("b.png", hostile.black_png(200, 100)),
    ]
    source = hostile.manifest(tmp_path / "set", rows)
    assert len(packed(source, tmp_path / "narrow", on_bad="skip")[1]) == 2
    raised = replace(LIMITS, video_pixels=100_000, image_pixels=100_000)
    samples, lines = packed(source, tmp_path / "wide", raised, on_bad="skip")
    assert len(samples) == 3
    assert lines == []
    with pytest.raises(UserError, match="with other settings"):
        packed(source, tmp_path / "narrow", raised, on_bad="skip")


@pytest.mark.parametrize(
    "row", [hostile.address("file"), hostile.address("local"), hostile.linked], ids=["file", "local", "link"]
)
def test_a_root_that_a_setting_names_is_opened(tmp_path, row):
    source = hostile.manifest(tmp_path / "set", [row])
    allowed = LimitsConfig(allowed_roots=[str(tmp_path / "set-outside")])
    assert greys(packed(source, tmp_path / "out", allowed)[0]) == {40, hostile.PRIVATE}
    with pytest.raises(UserError, match="leads out of the folder"):
        packed(source, tmp_path / "other", LimitsConfig(allowed_roots=[str(tmp_path / "set-out"), "memory://a"]))


@pytest.mark.parametrize("scheme", ["file", "local"])
def test_a_manifest_from_afar_names_no_files_of_this_machine(tmp_path, scheme):
    source = hostile.manifest(tmp_path / "set", [hostile.address(scheme)])
    with serving(source) as (address, _):
        manifest = f"{address}/manifest.jsonl"
        samples, lines = packed(manifest, tmp_path / "out", on_bad="skip")
        assert greys(samples) == {40}
        assert re.search(r"line 2: .*leads out of the folder", lines[0])
        allowed = LimitsConfig(allowed_roots=[f"file://{tmp_path / 'set-outside'}"])
        assert greys(packed(manifest, tmp_path / "opened", allowed)[0]) == {40, hostile.PRIVATE}


def test_an_address_of_another_kind_is_opened_where_a_setting_has_its_beginning(tmp_path):
    with fsspec.open("memory://videos/a/b.mp4", "wb") as file:
        file.write(hostile.video(level=hostile.PRIVATE))
    source = hostile.manifest(tmp_path / "set", [hostile.line({"path": "memory://videos/a/b.mp4"})])
    allowed = LimitsConfig(allowed_roots=["memory://videos/a/"])
    assert greys(packed(source, tmp_path / "out", allowed)[0]) == {40, hostile.PRIVATE}
    for number, root in enumerate(("memory://videos/a/b", "memory://video", "/videos/a")):
        with pytest.raises(UserError, match=r"names 'memory://videos/a/b\.mp4'"):
            packed(source, tmp_path / f"other{number}", LimitsConfig(allowed_roots=[root]))


def test_links_to_files_are_followed_as_caches_of_hubs_have_them(tmp_path):
    """A snapshot of real folders, whose files are links to blobs beside it; the snapshot itself may be a link."""
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/1234"
    blobs.mkdir(parents=True)
    (blobs / "abcd").write_bytes(hostile.video())
    (snapshot / "videos").mkdir(parents=True)
    (snapshot / "videos/a.mp4").symlink_to(Path("../../../blobs/abcd"))
    write_manifest(snapshot, [{"path": "videos/a.mp4"}])
    (tmp_path / "link").symlink_to(snapshot, target_is_directory=True)
    for number, source in enumerate((snapshot, tmp_path / "link")):
        assert greys(packed(source, tmp_path / f"out{number}")[0]) == {40}


def test_a_redirection_leads_to_nothing_but_http(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    for target in (f"file://{tmp_path}/a.bin", "ftp://127.0.0.1/a.bin", "data:,x"):
        with serving(tmp_path, Habits(redirect=target)) as (address, _), pytest.raises(OSError, match=r"302|unknown"):
            read_url(f"{address}/a.bin", Patience(attempts=1))


def test_what_judges_are_given_is_read_as_what_it_is_called(tmp_path):
    hostile.concatenation("a.mp4")(tmp_path)
    assert re.search("cannot be decoded: .*no mp4 file as its name says", video_fault(tmp_path / "a.mp4", {}))
    (tmp_path / "b.mp4").write_bytes(hostile.video())
    assert video_fault(tmp_path / "b.mp4", {"frames": 9, "height": 64, "width": 96}) == ""
    assert "has 9 frames of 64×96; the manifest says" in video_fault(
        tmp_path / "b.mp4", {"frames": 8, "height": 64, "width": 96}
    )
    (tmp_path / "c.png").write_bytes(hostile.image("GIF"))
    with pytest.raises(UserError, match=r"c\.png: cannot be decoded: it is no PNG file"):
        first_frame(tmp_path / "c.png", 32, 32)


def test_videos_without_a_name_are_of_a_format_that_names_say():
    for content in (hostile.SESSION.encode(), b"ffconcat version 1.0\nfile private.mp4\n"):
        with pytest.raises(UserError, match="or none of mp4, matroska"):
            frame_times(content)
        with pytest.raises(UserError, match="no mp4 file as its name says"):
            decode_mp4(content, suffix=".mp4")
    assert len(frame_times(hostile.encoded("matroska"))) == 9
