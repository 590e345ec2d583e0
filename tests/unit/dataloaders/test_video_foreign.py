"""Videos and images as others write them: shown as a player shows them, or refused by a line that says why."""

import io
import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.foreign_videos import cut_without_encoding, numbered, numbers_in, two_sizes, video, with_matrix
from support.packed_samples import packed_samples
from support.toy_datasets import CAMERA, WINDOW, write_dataset
from support.toy_videos import caption, counting, mp4, write_manifest, write_tar

from dataloaders.config import ClipConfig, DataConfig, WindowConfig
from dataloaders.files.images import read_image
from dataloaders.files.video import decode_mp4, frame_times
from dataloaders.packing.inspection import inspect
from dataloaders.packing.members import MemberWriter
from dataloaders.packing.pack import QUARANTINE, pack
from dataloaders.packing.spool import Spool
from dataloaders.sources.base import Clip, Unit
from kairos_train.basics.errors import UserError

CLIPS = ClipConfig(fps=10.0, short_side=64, aspects=[1.0], most_frames=9, least_frames=5)
X264_OPEN = {"bf": "3", "g": "10", "x264-params": "open-gop=1:b-adapt=0:scenecut=0"}
PYRAMID_OPEN = {"bf": "4", "g": "13", "x264-params": "open-gop=1:b-adapt=0:scenecut=0:b-pyramid=strict:ref=6"}
X265_OPEN = {"x265-params": "keyint=10:min-keyint=10:bframes=4:open-gop=1:scenecut=0:log-level=none"}


def packed(folder: Path, rows: list[dict], out: Path, **settings):
    write_manifest(folder, rows)
    pack(folder, out, window=WindowConfig(), prompt_template="{task}", clips=CLIPS, **settings)
    return sorted(packed_samples(out), key=lambda sample: sample.key)


# ---- which frames there are


def test_frames_that_an_edit_list_hides_do_not_count(tmp_path):
    data = cut_without_encoding(video(numbered(40), g="12"), 0.5)
    assert len(frame_times(data)) == 35
    assert numbers_in(decode_mp4(data)) == list(range(5, 40))
    assert numbers_in(decode_mp4(data, indices=[0, 34, 7])) == [5, 39, 12]
    (tmp_path / "cut.mp4").write_bytes(data)
    samples = packed(tmp_path, [{"path": "cut.mp4", "start": 0.3, "end": 1.2}], tmp_path / "out")
    assert [numbers_in(s.frames) for s in samples] == [list(range(8, 17))]


def test_a_packet_without_a_picture_is_no_frame():
    data = bytearray(video(numbered(12), container="webm", codec="libvpx"))
    with av.open(io.BytesIO(bytes(data))) as container:
        packet = list(container.demux(video=0))[5]
    data[data.index(bytes(packet), packet.pos)] &= ~0x10  # VP8's bit that says whether to show it
    assert len(frame_times(bytes(data))) == 11
    assert numbers_in(decode_mp4(bytes(data), indices=[4, 5])) == [4, 6]


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", X264_OPEN),
        ("libx264", PYRAMID_OPEN),
        ("libx265", X265_OPEN),
        ("mpeg2video", {"bf": "2", "g": "12"}),
    ],
)
def test_seeking_into_open_groups_of_pictures_gives_the_same_frames(codec, options):
    data = video(numbered(60), codec=codec, **options)
    everything = decode_mp4(data)
    assert numbers_in(everything) == list(range(60))
    for first in range(0, 60, 3):
        assert np.array_equal(decode_mp4(data, indices=[first])[0], everything[first]), first


@pytest.mark.parametrize("options", [{"g": "10", "x264-params": "scenecut=0"}, X264_OPEN])
def test_damage_of_the_wanted_frames_is_told_behind_a_seek_too(options):
    data = video(numbered(40), **options)
    with av.open(io.BytesIO(data)) as container:
        packet = next(p for p in container.demux(video=0) if p.pts * p.time_base == 3)
    damaged, start = bytearray(data), packet.pos + packet.size // 2
    damaged[start : packet.pos + packet.size] = bytes(packet.pos + packet.size - start)
    with pytest.raises(UserError, match="damaged"):
        decode_mp4(bytes(damaged), indices=[33])
    assert np.array_equal(decode_mp4(bytes(damaged), indices=[13]), decode_mp4(data, indices=[13]))


@pytest.mark.parametrize(
    ("codec", "options"),
    [("libx264", {"bf": "2"}), ("mpeg4", {"bf": "2"}), ("mpeg4", {}), ("mjpeg", {"pix_fmt": "yuvj420p"})],
)
def test_avi_gives_its_frames_in_the_order_of_showing(codec, options):
    data = video(numbered(30), container="avi", codec=codec, **options)
    assert np.diff(frame_times(data)) == pytest.approx(0.1)
    assert numbers_in(decode_mp4(data)) == list(range(30))
    assert numbers_in(decode_mp4(data, indices=[7, 3, 22, 29])) == [7, 3, 22, 29]


def test_a_raw_stream_without_times_is_refused():
    with pytest.raises(UserError, match=r"a\.mp4: cannot be decoded .* none of mp4, matroska"):
        frame_times(video(numbered(9), container="h264"), name="a.mp4")


def test_a_truncated_file_with_its_index_in_front_is_refused():
    data = video(numbered(40), muxing={"movflags": "faststart"})
    with pytest.raises(UserError, match="truncated"):
        frame_times(data[: int(len(data) * 0.8)])


def test_several_streams_are_refused_and_a_cover_is_none_of_them():
    with pytest.raises(UserError, match=r"holds 2 video streams \(64x64, 64x64\)"):
        decode_mp4(video(numbered(9), streams=2))
    data = video(numbered(9), cover=True)
    assert numbers_in(decode_mp4(data)) == list(range(9))


# ---- how they are shown


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), lambda p: p),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((-1, 0, 0, -1), lambda p: p[::-1, ::-1]),
        ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
        ((0, -1, 1, 0), np.rot90),
        ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda p: p.swapaxes(0, 1)[::-1, ::-1]),
        ((0, 0.5, 0.5, 0), lambda p: p.swapaxes(0, 1)),
    ],
)
def test_a_display_matrix_turns_and_mirrors(matrix, shown):
    data = video(np.repeat(counting(3, 32, 64), 1, axis=0) + numbered(3)[:, 16:48])
    stored, seen = decode_mp4(data), decode_mp4(with_matrix(data, matrix))
    assert np.array_equal(seen[2], shown(stored[2]))


@pytest.mark.parametrize("matrix", [(0.707, 0.707, -0.707, 0.707), (1, 0, 0, 0.5), (1, 0.3, 0, 1)])
def test_a_matrix_that_cannot_be_shown_is_refused(matrix):
    with pytest.raises(UserError, match=r"a\.mp4: its display matrix"):
        decode_mp4(with_matrix(video(numbered(3)), matrix), name="a.mp4")


@pytest.mark.parametrize(("aspect", "size"), [("2/1", (64, 128)), ("1/2", (128, 64)), ("1/1", (64, 64))])
def test_pixels_that_are_not_square_are_made_so(aspect, size):
    frames = decode_mp4(video(numbered(6), **{"x264-params": f"sar={aspect}"}))
    assert frames.shape[1:3] == size
    assert numbers_in(frames) == list(range(6))


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "bits"), [("libx265", "yuv420p10le", 8), ("ffv1", "gray16le", 16), ("ffv1", "rgb48le", 8)]
)
def test_more_than_8_bits_are_scaled(codec, pix_fmt, bits):
    ramp = np.linspace(0, 2**bits - 1, 64)[None, None, :] + np.zeros((3, 64, 1))
    frames = ramp.astype(np.uint16) if bits == 16 else np.repeat(ramp.astype(np.uint8)[..., None], 3, axis=3)
    options = {"x265-params": "lossless=1:log-level=none"} if codec == "libx265" else {}
    shown = decode_mp4(video(frames, container="matroska", codec=codec, pix_fmt=pix_fmt, **options))
    assert np.abs(shown[0, 0, :, 0] - np.linspace(0, 255, 64)).max() <= 3


def test_a_picture_that_changes_its_size_is_named_and_skipped(tmp_path):
    (tmp_path / "a.webm").write_bytes(two_sizes(numbered(12), numbered(12, 96)))
    (tmp_path / "b.mp4").write_bytes(mp4(counting(18)))
    rows = [{"path": "a.webm"}, {"path": "b.mp4"}]
    with pytest.raises(UserError, match=r"a\.webm: the picture changes from 64x64 to 96x96 at 1\.200 s"):
        packed(tmp_path, rows, tmp_path / "stopped")
    samples = packed(tmp_path, rows, tmp_path / "out", on_bad="skip")
    assert {s.key[-13:] for s in samples} == {"000001-000000", "000002-000000"}, "what has one size is packed"
    assert "at 1.200 s" in (tmp_path / "out" / QUARANTINE).read_text()
    with pytest.raises(UserError, match="from 64x64 to 96x96"):
        decode_mp4(tmp_path / "a.webm")


# ---- images


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def test_16_bits_of_grey_are_scaled_or_refused():
    ramp = np.linspace(0, 65535, 64)[None].repeat(4, 0).astype(np.uint16)
    shown = read_image(png(ramp), name="ramp.png")
    assert np.array_equal(shown, np.repeat(np.round(ramp / 257).astype(np.uint8)[..., None], 3, axis=2))
    with pytest.raises(UserError, match=r"wrist: has 16 bits of grey"):
        read_image(png(ramp), name="wrist", scale_16_bits=False)
    tiff = io.BytesIO()
    Image.fromarray(ramp.astype(np.float32)).save(tiff, "TIFF")
    with pytest.raises(UserError, match=r"depth: has 32 bits of grey"):
        read_image(tiff.getvalue(), name="depth")


def test_an_image_is_mirrored_by_its_orientation():
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:4, :4] = 255
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 2
    Image.fromarray(picture).save(file, "PNG", exif=exif)
    assert np.array_equal(read_image(file.getvalue(), name="a"), picture[:, ::-1])


# ---- names


@pytest.mark.parametrize("name", ["2024-05-01T12:30:05.mp4", "what?.mp4", "~tmp.mp4", "a#1 %20.MP4", "a\\b.mp4"])
def test_a_file_may_have_any_name(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(mp4(counting(18)))
    write_manifest(tmp_path, [{"path": name, "caption": "x"}])
    monkeypatch.chdir(tmp_path)
    pack(Path("manifest.jsonl"), Path("out"), window=WindowConfig(), prompt_template="{task}", clips=CLIPS)
    (sample,) = packed_samples(tmp_path / "out")
    assert sample.meta["path"] == name
    assert len(decode_mp4(Path(name))) == 18


def test_a_tar_may_have_braces_in_its_name(tmp_path):
    write_tar(tmp_path / "a{1,2}.tar", [("a.mp4", mp4(counting(18))), ("a.json", caption("x"))])
    pack(tmp_path / "a{1,2}.tar", tmp_path / "out", window=WindowConfig(), prompt_template="{task}", clips=CLIPS)
    assert len(packed_samples(tmp_path / "out")) == 1
    with pytest.raises(UserError, match=r"b\{1\.tar: is neither a tar nor a pattern"):
        pack(tmp_path / "b{1.tar", tmp_path / "none", window=WindowConfig(), prompt_template="{task}")


# ---- one bad file


class Failing:
    """A source whose middle unit fails in a way that nobody foresaw."""

    name, units, identity, sizes_differ, fps = "failing", 3, {}, True, 10.0

    def __init__(self, *, at_once: bool) -> None:
        self.at_once = at_once

    def unit(self, number: int) -> Unit:
        if number == 1 and self.at_once:
            raise ValueError("all input arrays\nmust have the same shape")
        return Unit(f"unit {number}", self.samples(number))

    def samples(self, number: int):
        yield Clip(f"failing-{number}", counting(5, 64, 64), 10.0, {}, {})
        if number == 1:
            raise ValueError("all input arrays\nmust have the same shape")

    def describe(self) -> dict:
        return {}


@pytest.mark.parametrize("at_once", [False, True])
def test_an_unforeseen_error_of_one_unit_ends_no_packing_that_may_skip(tmp_path, at_once):
    spool, source = Spool(tmp_path), Failing(at_once=at_once)
    for unit in range(3):
        spool.write(unit, source, MemberWriter(None), skip_bad=True)
    records = [spool.record(unit) for unit in range(3)]
    assert [len(record.samples) for record in records] == [1, 0, 1]
    ((_, reason),) = records[1].bad
    assert reason == "ValueError: all input arrays must have the same shape"
    with pytest.raises(ValueError, match="same shape"):
        Spool(tmp_path / "strict").write(1, source, MemberWriter(None), skip_bad=False)


# ---- depth


@pytest.mark.parametrize("told", [{"info": {"is_depth_map": True}}, {"video_info": {"video.is_depth_map": True}}, {}])
def test_depth_beside_a_robots_pictures_is_packed_only_where_it_is_named(tmp_path, told):
    root, depth = write_dataset(tmp_path / "set", episodes=2), "observation.images.a_depth"
    path = next(root.glob("data/*/*.parquet"))
    table = pq.read_table(path)
    cells = [{"bytes": png(np.full((32, 32), 1500, np.uint16)), "path": None}] * table.num_rows
    pq.write_table(table.append_column(depth, pa.array(cells)), path)
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][depth] = {"dtype": "image", "shape": [32, 32, 1]} | told
    (root / "meta/info.json").write_text(json.dumps(info))

    if not told:
        with pytest.raises(UserError, match=rf"picture of '{depth}': has 16 bits of grey"):
            pack(root, tmp_path / "out", window=WINDOW, prompt_template="{task}")
        return
    source = pack(root, tmp_path / "out", window=WINDOW, prompt_template="{task}")["source"]
    assert source["cameras"] == [CAMERA]
    assert source["notes"] == [f"depth is packed only where data.window.cameras names it: left out {depth}"]
    with pytest.raises(UserError, match=rf"picture of '{depth}': has 16 bits of grey"):
        pack(root, tmp_path / "named", window=replace(WINDOW, cameras=[depth]), prompt_template="{task}")
    facts = inspect(root, tmp_path / "page", data=DataConfig(window=WINDOW))
    assert any(fact.startswith(f"camera: {depth}, depth: packed only where") for fact in facts)
