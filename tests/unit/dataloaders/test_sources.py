"""Videos with a manifest and existing WebDataset tars as sources: sizes, times, captions, scores, URLs."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.http_server import Habits, serving
from support.packed_samples import Packed, folder_bytes, packed_samples, psnr
from support.toy_videos import caption, counting, jpg, mp4, write_manifest, write_tar

from dataloaders.config import ClipConfig, WindowConfig
from dataloaders.files.video import decode_mp4
from dataloaders.packing.pack import QUARANTINE, pack
from dataloaders.shards import read_index
from dataloaders.sources.clips import clip_size, pieces
from dataloaders.windows import cover
from kairos_train.basics.errors import UserError

CLIPS = ClipConfig(fps=10.0, short_side=64, most_frames=9, least_frames=5)


def shown(sample: Packed) -> list[int]:
    """Frame numbers of a `counting` video that a sample shows."""
    return np.round(sample.frames.mean(axis=(1, 2, 3)) / 5).astype(int).tolist()


def packed(source, out: Path, clips: ClipConfig = CLIPS, **settings) -> list[Packed]:
    pack(source, out, window=WindowConfig(), prompt_template="Robot: {task}", clips=clips, **settings)
    return sorted(packed_samples(out), key=lambda sample: sample.key)


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((480, 854), 480, (480, 832)),
        ((720, 1280), 720, (704, 1280)),
        ((1080, 1920), 256, (256, 448)),
        ((1280, 720), 480, (832, 480)),
        ((480, 640), 256, (256, 320)),
        ((512, 512), 256, (256, 256)),
        ((300, 310), 256, (256, 256)),
        ((400, 960), 256, (256, 576)),
    ],
)
def test_sizes_are_the_recipes_for_its_resolutions(size, short_side, expected):
    assert clip_size(*size, ClipConfig(short_side=short_side)) == expected


@pytest.mark.parametrize("frames", range(1, 60))
def test_pieces_are_4k_plus_1_and_leave_no_more_than_they_say(frames):
    found, left_out = pieces(frames, CLIPS)
    covered = [i for first, count in found for i in range(first, first + count)]
    assert covered == list(range(len(covered)))
    assert all(count % 4 == 1 and 5 <= count <= 9 for _, count in found)
    assert left_out == frames - len(covered)
    assert left_out < 5 or frames < 5


def test_a_video_is_shown_at_the_wanted_rate_in_pieces(tmp_path):
    (tmp_path / "a.mp4").write_bytes(mp4(counting(48)))  # 2.4 s at 20 fps: 24 frames at 10
    write_manifest(tmp_path, [{"path": "a.mp4", "caption": "counting up"}])
    samples = packed(tmp_path, tmp_path / "out")
    assert [shown(s) for s in samples] == [list(range(0, 18, 2)), list(range(18, 36, 2)), list(range(36, 46, 2))]
    assert [s.meta["start_s"] for s in samples] == [0, 0.9, 1.8]
    assert {s.meta["text"] for s in samples} == {"counting up"}, "the template is for robots' tasks"
    index = read_index(tmp_path / "out")
    assert index.source["left_out"] == {"frames": 1}
    assert index.clips == CLIPS
    assert (index.action_dim, index.state_dim, index.fps) == (0, 0, 10.0)
    assert index.shapes == [
        {"frames": 5, "height": 64, "width": 64, "samples": 1},
        {"frames": 9, "height": 64, "width": 64, "samples": 2},
    ]
    assert index.statistics()["num_episodes"] == 0


def test_start_and_end_choose_a_part_and_slow_videos_keep_their_rate(tmp_path):
    (tmp_path / "a.mp4").write_bytes(mp4(counting(40)))
    (tmp_path / "slow.mp4").write_bytes(mp4(counting(9), fps=5))
    rows = [{"path": "a.mp4", "start": 0.5, "end": 1.0}, {"path": "slow.mp4"}]
    part, slow = packed(write_manifest(tmp_path, rows), tmp_path / "out")
    assert shown(part) == [10, 12, 14, 16, 18]
    assert shown(slow) == list(range(9))
    assert (part.meta["fps"], slow.meta["fps"]) == (10, 5)


def test_frames_of_an_uneven_rate_are_the_nearest(tmp_path):
    (tmp_path / "a.mp4").write_bytes(mp4(counting(24), fps=24))
    (sample,) = packed(
        write_manifest(tmp_path, [{"path": "a.mp4"}]), tmp_path / "out", ClipConfig(fps=16.0, short_side=64)
    )
    assert shown(sample) == [round(i * 1.5 - 0.01) for i in range(13)]


def test_captions_and_scores_of_jsonl_and_csv_are_carried_along(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (tmp_path / name).write_bytes(mp4(counting(18, 64, 64)))
    rows = [
        {"path": "a.mp4", "captions": {"detailed": "long  text", "short": "text"}, "scores": {"motion": 0.5}, "url": 1},
        {"path": "b.mp4", "caption": 'b, "quoted"', "scores": {"motion": 1, "aesthetic": 5.5}},
        {"path": "c.mp4"},
    ]
    (tmp_path / "json").mkdir()
    (tmp_path / "csv").mkdir()
    write_manifest(tmp_path, rows)
    (tmp_path / "table.csv").write_text(
        "path,caption,caption_detailed,caption_short,score_motion,score_aesthetic,url\n"
        'a.mp4,,long  text,text,0.5,,1\nb.mp4,"b, ""quoted""",,,1,5.5,\nc.mp4,,,,,,\n'
    )
    one, two = packed(tmp_path, tmp_path / "out1"), packed(tmp_path / "table.csv", tmp_path / "out2")
    for samples, out in ((one, "out1"), (two, "out2")):
        a, b, c = samples
        assert a.meta["captions"] == {"detailed": "long text", "short": "text"}
        assert (a.meta["text"], a.meta["primary_caption"]) == ("long text", "detailed")
        assert (b.meta["text"], b.meta["captions"]) == ('b, "quoted"', {"caption": 'b, "quoted"'})
        assert (a.meta["scores"], b.meta["scores"]) == ({"motion": 0.5}, {"motion": 1.0, "aesthetic": 5.5})
        assert (c.meta["text"], c.meta["captions"], c.meta["scores"]) == ("", {}, {})
        index = read_index(tmp_path / out)
        assert (index.captions, index.scores) == (["detailed", "short", "caption"], ["aesthetic", "motion"])
        assert index.source["columns_left_out"] == ["url"]


def test_images_and_videos_of_several_shapes_stand_in_runs(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(6):
        size = ((64, 64), (64, 96), (96, 64))[i % 3]
        (tmp_path / f"{i}.jpg").write_bytes(jpg(rng.integers(0, 255, (*size, 3), np.uint8)))
        (tmp_path / f"{i}.mp4").write_bytes(mp4(counting(20, *size)))
        rows += [{"path": f"{i}.jpg", "caption": "i"}, {"path": f"{i}.mp4", "caption": "v"}]
    samples = packed(write_manifest(tmp_path, rows), tmp_path / "out", shard_samples=5)
    index = read_index(tmp_path / "out")
    assert sum(shape["samples"] for shape in index.shapes) == len(samples) == 12
    for shard in index.shards:
        rows_of = [s.meta for s in packed_samples(tmp_path / "out") if s.shard == shard.name]
        told = [(t, h, w) for t, h, w, count in shard.shapes for _ in range(count)]
        assert told == [(m["frames"], m["height"], m["width"]) for m in rows_of]
        assert len(shard.shapes) == len({tuple(shape[:3]) for shape in shard.shapes}), "one run per shape"
    pictures = [s for s in samples if s.meta["frames"] == 1]
    assert len(pictures) == 6
    for sample in samples:
        assert sample.frames.shape == (sample.meta["frames"], sample.meta["height"], sample.meta["width"], 3)


def test_a_photograph_is_turned_upright_and_not_stretched(tmp_path):
    y, x = np.mgrid[:120, :200]
    disc = np.where((y - 60) ** 2 + (x - 100) ** 2 < 40**2, 255, 0).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    Image.fromarray(disc).convert("RGB").save(tmp_path / "a.jpg", exif=exif)
    (sample,) = packed(write_manifest(tmp_path, [{"path": "a.jpg"}]), tmp_path / "out")
    inside = sample.frames[0, ..., 0] > 127
    assert sample.frames.shape == (1, 96, 64, 3) or sample.frames.shape == (1, 64, 64, 3)
    assert sample.meta["height"] >= sample.meta["width"]
    assert abs(inside.any(0).sum() - inside.any(1).sum()) <= 2


def test_real_videos_are_packed_as_they_are(shared, tmp_path):
    clips = shared / "samples/clips"
    rows = [{"path": "bikes.mp4", "start": 1, "end": 3}, {"path": "cosmoscurate_10s.mp4", "start": 8.5}]
    (tmp_path / "in").mkdir()
    for row in rows:
        (tmp_path / "in" / row["path"]).symlink_to(clips / row["path"])
    config = ClipConfig(fps=16.0, short_side=96, most_frames=17)
    samples = packed(write_manifest(tmp_path / "in", rows), tmp_path / "out", config)
    assert {(s.meta["height"], s.meta["width"]) for s in samples} <= {(96, 160), (96, 224)}
    for sample in samples:
        everything = decode_mp4(clips / sample.meta["path"])
        start, rate = {"bikes.mp4": (1, 25), "cosmoscurate_10s.mp4": (8.5, 24)}[sample.meta["path"]]
        times = start + (17 * int(sample.key[-6:]) + np.arange(sample.meta["frames"])) / 16
        wanted = everything[np.ceil(times * rate - 0.5 - 1e-6).astype(int)]
        assert psnr(sample.frames, cover(wanted, *sample.frames.shape[1:3])) > 28


# ---- tars


@pytest.fixture
def tars(tmp_path) -> Path:
    folder = tmp_path / "tars"
    folder.mkdir()
    clip, picture = mp4(counting(18)), jpg(counting(1)[0] + 100)
    write_tar(
        folder / "part-000.tar",
        [
            ("a/000.mp4", clip),
            ("a/000.json", caption("from json", scores={"motion": 2})),
            ("a/000.npy", b"not wanted"),
            ("b/000.jpg", picture),
            ("b/000.txt", b"from text\n"),
        ],
    )
    members = [("c.mp4", clip), ("c.json", caption("ignored", start=0.2)), ("c.txt", b"text wins")]
    write_tar(folder / "part-001.tar", members)
    return folder


def test_tars_give_their_samples_with_captions_and_scores(tars, tmp_path):
    a, b, c = packed(tars, tmp_path / "out")
    assert [s.meta["text"] for s in (a, b, c)] == ["from json", "from text", "text wins"]
    assert [s.meta["source_key"] for s in (a, b, c)] == ["a/000", "b/000", "c"]
    assert a.meta["scores"] == {"motion": 2.0}
    assert [s.meta["frames"] for s in (a, b, c)] == [9, 1, 5]
    assert shown(a) == list(range(0, 18, 2))
    assert read_index(tmp_path / "out").source["left_out"]["members of other kinds"] == 1


@pytest.mark.parametrize("pattern", ["part-{000..001}.tar", "part-{000,001}.tar"])
def test_tars_are_read_by_url_from_a_server_that_drops_connections(tars, tmp_path, pattern):
    plain = packed(tars, tmp_path / "plain")
    with serving(tars, Habits(drop_after=3000)) as (address, habits):
        remote = packed(f"{address}/{pattern}", tmp_path / "remote")
        assert len(habits.requests) > 4
    assert [s.frames.tobytes() for s in remote] == [s.frames.tobytes() for s in plain]
    assert [s.meta["text"] for s in remote] == [s.meta["text"] for s in plain]


def test_a_manifest_and_its_videos_are_read_by_url(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a b.mp4").write_bytes(mp4(counting(18)))
    (folder / "c.jpg").write_bytes(jpg(counting(1)[0] + 90))
    write_manifest(folder, [{"path": "a b.mp4", "caption": "x"}, {"path": "c.jpg", "caption": "y"}])
    with serving(folder, Habits(drop_after=2000)) as (address, _):
        remote = packed(f"{address}/manifest.jsonl", tmp_path / "remote")
    local = packed(folder, tmp_path / "local")
    assert [s.mp4 for s in remote] == [s.mp4 for s in local]


def test_processes_give_the_same_bytes(tars, tmp_path):
    (tmp_path / "v").mkdir()
    for i in range(20):
        (tmp_path / f"v/{i}.mp4").write_bytes(mp4(counting(10 + i)))
    write_manifest(tmp_path / "v", [{"path": f"{i}.mp4"} for i in range(20)])
    for source in (tars, tmp_path / "v"):
        out = [tmp_path / f"{source.name}-{n}" for n in (1, 2)]
        for processes, folder in enumerate(out, 1):
            packed(source, folder, shard_samples=4, processes=processes)
        assert folder_bytes(out[0]) == folder_bytes(out[1])


def test_bad_rows_are_left_out_and_listed(tmp_path):
    (tmp_path / "a.mp4").write_bytes(mp4(counting(18)))
    (tmp_path / "b.mp4").write_bytes(mp4(counting(18))[:-200])
    rows = [
        {"path": "a.mp4"},
        {"path": "b.mp4"},
        {"path": "none.mp4"},
        {"path": "../a.mp4"},
        {"path": "a.mp4", "end": 0},
    ]
    write_manifest(tmp_path, rows)
    with pytest.raises(UserError, match=r"manifest\.jsonl: line 2: .*b\.mp4: .*--on-bad skip"):
        packed(tmp_path, tmp_path / "out")
    for folder in tmp_path.glob(".out.*"):
        folder.rename(tmp_path / "old")
    assert len(packed(tmp_path, tmp_path / "out", on_bad="skip")) == 1
    bad = [json.loads(line) for line in (tmp_path / "out" / QUARANTINE).read_text().splitlines()]
    assert [line["name"].rpartition(" ")[2] for line in bad] == ["2", "3", "4", "5"]
    assert read_index(tmp_path / "out").source["quarantined"] == 4
