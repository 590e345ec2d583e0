"""MP4 files written and read back: codecs, lookup by index and by time, damaged files."""

import io
import os
import sys

import av
import numpy as np
import pytest

from dataloaders.files.video import decode_mp4, frame_times
from dataloaders.files.video_encoder import CODECS, Mp4Encoder, encode_mp4
from kairos_train.basics.errors import UserError


def moving_square(frames: int, size: int = 48) -> np.ndarray:
    """uint8 (T, H, W, 3); the square's column says which frame it is."""
    pictures = np.full((frames, size, size, 3), 60, np.uint8)
    for i in range(frames):
        left = (5 * i) % (size - 8)
        pictures[i, size // 3 : 2 * size // 3, left : left + 8] = (220, 40 + 4 * (i % 40), 30)
    return pictures


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


@pytest.fixture(scope="module")
def clip() -> tuple[np.ndarray, bytes]:
    """40 frames at 20 fps and their H.264 file, as decoded in full and as bytes."""
    file = io.BytesIO()
    encode_mp4(file, moving_square(40), 20)
    return decode_mp4(file.getvalue()), file.getvalue()


@pytest.mark.parametrize("codec", list(CODECS))
def test_every_codec_gives_the_pictures_back(codec, tmp_path):
    frames = moving_square(20, 64)
    encode_mp4(tmp_path / "a.mp4", frames, 20, codec=codec)
    back = decode_mp4(tmp_path / "a.mp4")
    assert back.shape == frames.shape
    assert back.dtype == np.uint8
    assert min(psnr(a, b) for a, b in zip(frames, back)) > 28
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_indices_give_the_same_pictures_as_decoding_everything(clip):
    everything, data = clip
    for indices in ([0], [39], [7], [8], [39, 0, 17, 17, 16], list(range(5, 25))):
        assert np.array_equal(decode_mp4(data, indices=indices), everything[indices])


def test_timestamps_find_the_frame_shown_at_that_time(clip):
    everything, data = clip
    times = np.array([0.35, 1.95, 0.0, 0.35]) + 5e-5
    assert np.array_equal(decode_mp4(data, timestamps=times), everything[[7, 39, 0, 7]])


def test_nearest_frame_wins_within_a_wide_tolerance(clip):
    everything, data = clip
    found = decode_mp4(data, timestamps=[0.374, 0.376, 1.99], tolerance_s=0.05)
    assert np.array_equal(found, everything[[7, 8, 39]])


@pytest.mark.parametrize("time", [0.3499 - 1e-3, 2.0, 50.0])
def test_a_time_without_a_frame_is_an_error(clip, time):
    with pytest.raises(UserError, match="tolerance"):
        decode_mp4(clip[1], timestamps=[0.1, time])


def test_an_index_outside_of_the_file_is_an_error(clip):
    with pytest.raises(UserError, match="frame 40 asked of 40"):
        decode_mp4(clip[1], indices=[3, 40])


def test_no_frames_asked_gives_none(clip):
    assert decode_mp4(clip[1], indices=[]).shape == (0, 48, 48, 3)


def test_far_apart_times_are_found_by_seeking():
    file = io.BytesIO()
    encode_mp4(file, moving_square(200, 32), 20)
    everything = decode_mp4(file.getvalue())
    assert np.array_equal(decode_mp4(file.getvalue(), indices=[199, 3, 100]), everything[[199, 3, 100]])


def test_frames_before_a_late_key_frame_of_a_foreign_file_are_found(shared):
    path = shared / "samples/lerobot_v20_gr1/videos/chunk-000/observation.images.ego_view/episode_000004.mp4"
    around = decode_mp4(path, indices=range(240, 260))  # its second key frame is frame 250
    for i in (249, 250, 251):
        assert np.array_equal(decode_mp4(path, indices=[i])[0], around[i - 240])


def test_each_clip_of_a_file_starts_at_a_key_frame(tmp_path):
    import av

    encoder = Mp4Encoder(tmp_path / "a.mp4", 20)
    for _ in range(2):
        encoder.add(np.full((11, 32, 32, 3), 90, np.uint8))  # no cut: nothing but the encoder asks for a key frame
    encoder.close()
    assert encoder.frames == 22
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        keys = [round(float(p.pts * p.time_base) * 20) for p in container.demux(stream) if p.is_keyframe]
    assert keys == [0, 8, 11, 19]


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_named(clip, tmp_path, keep):
    path = tmp_path / "cut.mp4"
    path.write_bytes(clip[1][: int(len(clip[1]) * keep)])
    with pytest.raises(UserError, match=r"cut\.mp4: .*(truncated|damaged)"):
        decode_mp4(path)


@pytest.mark.parametrize("number", [1, 4, 16, 25])
def test_a_damaged_picture_is_not_painted_over(clip, number):
    import av

    with av.open(io.BytesIO(clip[1])) as container:
        packet = [(p.pos, p.size) for p in container.demux(video=0) if p.size][number]
    damaged, half = bytearray(clip[1]), packet[1] // 2
    start = packet[0] + half
    damaged[start : start + half] = np.random.default_rng(0).integers(0, 256, half, np.uint8).tobytes()
    with pytest.raises(UserError, match=r"video: .*damaged"):
        decode_mp4(bytes(damaged))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.mp4: no such"):
        decode_mp4(tmp_path / "gone.mp4")


@pytest.mark.parametrize(
    ("frames", "codec", "message"),
    [
        (np.zeros((2, 15, 16, 3), np.uint8), "h264", "even height"),
        (np.zeros((2, 16, 16, 3), np.float32), "h264", "uint8"),
        (np.zeros((0, 16, 16, 3), np.uint8), "h264", "T > 0"),
        (np.zeros((2, 16, 16, 3), np.uint8), "vp9", "one of h264, av1"),
    ],
)
def test_pictures_that_cannot_be_written_leave_no_file(tmp_path, frames, codec, message):
    with pytest.raises(UserError, match=message):
        encode_mp4(tmp_path / "a.mp4", frames, 20, codec=codec)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("codec", "size"), [("h264", 16), ("h264", 32), ("h264", 80), ("av1", 64)])
def test_the_same_frames_give_the_same_file(codec, size):
    files = set()
    for _ in range(6):
        file = io.BytesIO()
        encode_mp4(file, moving_square(60, size), 20, codec=codec)
        files.add(file.getvalue())
    assert len(files) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="SVT-AV1 asks for real-time threads on Linux")
def test_encoding_leaves_the_process_scheduled_as_it_was():
    def policies() -> set[int]:
        return {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}

    before, encoder = policies(), Mp4Encoder(io.BytesIO(), 20, codec="av1")
    encoder.add(moving_square(3, 64))
    during = policies()
    encoder.close()
    assert during == policies() == before


@pytest.mark.parametrize(("degrees", "corner"), [(90, (-1, 0)), (-90, (0, -1)), (180, (-1, -1))])
def test_a_sideways_video_is_shown_upright(degrees, corner):
    """A bright patch in the stored top left corner; turned counterclockwise by 90 degrees it is at the bottom left."""
    file, picture = io.BytesIO(), np.zeros((32, 64, 3), np.uint8)
    picture[:8, :8] = 255
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(degrees)
        for i in range(3):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for shown in (decode_mp4(file.getvalue()), decode_mp4(file.getvalue(), indices=[1])):
        assert shown.shape[1:3] == ((32, 64) if degrees == 180 else (64, 32))
        assert shown[0][corner].min() > 200
        assert shown[0].mean() < 20


def test_times_of_all_frames_are_told_without_decoding(clip, tmp_path):
    everything, data = clip
    assert frame_times(data) == pytest.approx(np.arange(len(everything)) / 20)
    with pytest.raises(UserError, match=r"none\.mp4: no such"):
        frame_times(tmp_path / "none.mp4")
