"""MP4 files in and out (PyAV): H.264 and AV1, frames looked up by index or by time.

H.264 with a key frame every 8 frames is the best balance of size and seeking for training clips; AV1 (SVT, a key frame
every 2 frames, CRF 30) is what LeRobot writes by default. Shapes: T frames, H height, W width; frames are uint8 RGB.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import IO

import av
import numpy as np

from kairos_train.basics.errors import UserError
from kairos_train.basics.files import replacing

TOLERANCE_S = 1e-4  # farthest a frame may lie from the asked time, as LeRobot has it
_RESEEK_S = 4.0  # a gap between wanted frames from which a new seek is cheaper than decoding through it


@dataclass(frozen=True)
class Codec:
    """How one codec is written. `gop` is the distance of key frames in frames, `crf` the constant quality."""

    encoder: str
    gop: int
    crf: int
    options: dict[str, str] = field(default_factory=dict)


CODECS = {
    # x264's macroblock tree reads memory that nobody wrote at most widths: no two files would be alike.
    "h264": Codec("libx264", gop=8, crf=18, options={"mbtree": "0"}),
    "av1": Codec("libsvtav1", gop=2, crf=30),
}


class Mp4Encoder:
    """Frames appended to one MP4 file, yuv420p; several clips may follow each other, each from a key frame of its own.

    The same frames give the same bytes.

    Args:
        file: a path (written in place: the caller renames) or a seekable binary file.
        fps: frames per second of the whole file.
        codec: "h264" or "av1".
        crf, gop: override the codec's defaults.

    Raises:
        UserError: unknown codec.
    """

    def __init__(
        self, file: Path | IO[bytes], fps: float, *, codec: str = "h264", crf: int | None = None, gop: int | None = None
    ) -> None:
        if codec not in CODECS:
            raise UserError(f"codec is {codec!r}; it must be one of {', '.join(CODECS)}")
        if not fps > 0:
            raise UserError(f"fps is {fps}; it must be positive")
        self._spec = CODECS[codec]
        self._options = self._spec.options | {
            "g": str(self._spec.gop if gop is None else gop),
            "crf": str(self._spec.crf if crf is None else crf),
        }
        self._rate = Fraction(fps).limit_denominator(1001)
        self._container = av.open(str(file) if isinstance(file, Path) else file, "w", format="mp4")
        self._stream = None
        self._size: tuple[int, int] | None = None
        self.frames = 0
        self.bytes = 0  # of the pictures handed to the file so far

    def add(self, frames: np.ndarray) -> None:
        """Append a clip, uint8 (T, H, W, 3) with even H and W, the same for every clip of the file.

        Raises:
            UserError: wrong shape, dtype or an odd height or width.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
            raise UserError(f"frames are {frames.dtype} {frames.shape}; they must be uint8 (T, H, W, 3) with T > 0")
        height, width = frames.shape[1:3]
        if height % 2 or width % 2:
            raise UserError(f"frames are {height}x{width}; yuv420p video needs an even height and width")
        if self._stream is None:
            self._open_stream(height, width)
        elif (height, width) != self._size:
            raise UserError(
                f"frames are {height}x{width} but the video's first clip was {self._size[0]}x{self._size[1]}"
            )
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = self.frames
            if i == 0:  # decoding one clip then never starts in the clip before it
                frame.pict_type = av.video.frame.PictureType.I
            self._mux(frame)
            self.frames += 1

    def close(self) -> None:
        """Write what the codec holds back and the index of the file."""
        if self._stream is not None:
            self._mux(None)
        self._container.close()

    def _mux(self, frame: av.VideoFrame | None) -> None:
        packets = self._stream.encode(frame)
        self.bytes += sum(packet.size for packet in packets)
        self._container.mux(packets)

    def _open_stream(self, height: int, width: int) -> None:
        self._stream = self._container.add_stream(self._spec.encoder, rate=self._rate, options=self._options)
        # With more threads x264's output depends on their number, so on the machine.
        self._stream.codec_context.thread_count = 1
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._size = (height, width)
        with _scheduled_as_before():
            self._stream.codec_context.open()


@contextmanager
def _scheduled_as_before() -> Iterator[None]:
    """Undo what SVT-AV1 does where it may: it makes its threads, and the one that opens it, real-time ones for good.

    Such a process takes a core from all others, the machine's own housekeeping included. Linux only, as the habit is.
    """
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    others = set(os.listdir("/proc/self/task")) - {str(threading.get_native_id())}
    try:
        yield
    finally:
        for thread in map(int, set(os.listdir("/proc/self/task")) - others):
            with suppress(ProcessLookupError):  # it has just ended
                os.sched_setscheduler(thread, policy, parameters)


def encode_mp4(
    file: Path | IO[bytes],
    frames: np.ndarray,
    fps: float,
    *,
    codec: str = "h264",
    crf: int | None = None,
    gop: int | None = None,
) -> None:
    """Write one clip, uint8 (T, H, W, 3). A path appears only when the file is complete.

    Raises:
        UserError: unknown codec, wrong shape or dtype, odd height or width.
    """
    with replacing(file) if isinstance(file, Path) else nullcontext(file) as target:
        encoder = Mp4Encoder(target, fps, codec=codec, crf=crf, gop=gop)
        try:
            encoder.add(frames)
        finally:
            encoder.close()


def decode_mp4(
    file: Path | bytes,
    *,
    indices: Sequence[int] | None = None,
    timestamps: Sequence[float] | None = None,
    tolerance_s: float = TOLERANCE_S,
    name: str | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Frames of a video as uint8 (n, H, W, 3): all of them, those at `indices`, or those nearest to `timestamps`.

    Indices count frames in presentation order, timestamps are seconds of the file's own clock; both may repeat and come
    in any order, and the result follows theirs.

    Args:
        file: a path or the bytes of a file.
        tolerance_s: farthest the nearest frame may lie from an asked timestamp.
        name: what errors call the file; the path by default.
        out: uint8 (n, H, W, 3) that takes all of the frames and is returned; the file must hold exactly these.

    Raises:
        UserError: file missing, truncated or undecodable; an index outside of it; no frame within the tolerance.
    """
    if indices is not None and timestamps is not None:
        raise TypeError("give indices or timestamps, not both")
    with _opened(file, name) as (container, name):
        if timestamps is not None:
            return _at_times(container, np.asarray(timestamps, np.float64), tolerance_s, name)
        if indices is None:
            return _all_frames(container, name) if out is None else _fill(out, container, name)
        times = _frame_times(container, name)
        wanted = np.asarray(indices, np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(times)):
            raise UserError(f"{name}: frame {wanted[(wanted < 0) | (wanted >= len(times))][0]} asked of {len(times)}")
        return _at_times(container, times[wanted], TOLERANCE_S, name)


def frame_times(file: Path | bytes, *, name: str | None = None) -> np.ndarray:
    """Seconds of every frame of a video on its own clock, in presentation order, float64 (T,); nothing is decoded.

    Raises:
        UserError: file missing or unreadable.
    """
    with _opened(file, name) as (container, name):
        return _frame_times(container, name)


@contextmanager
def _opened(file: Path | bytes, name: str | None) -> Iterator[tuple[av.container.InputContainer, str]]:
    """The container of a file and what errors call it; its video stream refuses damage. FFmpeg's errors become ours."""
    name = name or (str(file) if isinstance(file, Path) else "video")
    if isinstance(file, Path) and not file.is_file():
        raise UserError(f"{name}: no such video file")
    try:
        with av.open(str(file) if isinstance(file, Path) else io.BytesIO(file)) as container:
            if not container.streams.video:
                raise UserError(f"{name}: holds no video; it is truncated or no video file: restore it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            stream.codec_context.options = {"err_detect": "explode"}  # else damage is painted over in silence
            yield container, name
    except av.FFmpegError as error:
        raise UserError(
            f"{name}: cannot be decoded ({error.strerror or error}); the file is truncated or damaged: restore it"
        ) from error


def _frame_times(container: av.container.InputContainer, name: str) -> np.ndarray:
    """Seconds of every frame in presentation order, float64 (T,), from the packets' headers alone."""
    stream = container.streams.video[0]
    pts = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None and packet.size)
    if not pts:
        raise UserError(f"{name}: holds no frames")
    return np.array(pts, np.float64) * float(stream.time_base)


def _decoded(container: av.container.InputContainer, start: float, name: str) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds, frame) from the key frame at or before `start` on."""
    stream = container.streams.video[0]
    container.seek(max(int(start / float(stream.time_base)) - 1, 0), stream=stream, backward=True)
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise UserError(f"{name}: is truncated or damaged at {_seconds(packet)}: restore it")
        for frame in packet.decode():
            yield float(frame.pts * frame.time_base), frame


def _seconds(packet: av.Packet) -> str:
    return "an unknown time" if packet.pts is None else f"{float(packet.pts * packet.time_base):.3f} s"


def _all_frames(container: av.container.InputContainer, name: str) -> np.ndarray:
    promised = container.streams.video[0].frames
    frames = [_pixels(frame) for _, frame in _decoded(container, 0.0, name)]
    if not frames or len(frames) < promised:
        raise UserError(f"{name}: holds {len(frames)} readable frames of {promised}; it is truncated: restore it")
    return np.stack(frames)


def _fill(out: np.ndarray, container: av.container.InputContainer, name: str) -> np.ndarray:
    count = 0
    for _, frame in _decoded(container, 0.0, name):
        picture = _pixels(frame)
        if count == len(out) or picture.shape != out.shape[1:]:
            raise UserError(f"{name}: frame {count} has shape {picture.shape}, expected {len(out)} of {out.shape[1:]}")
        out[count] = picture
        count += 1
    if count < len(out):
        raise UserError(f"{name}: holds {count} readable frames, expected {len(out)}; it is truncated: restore it")
    return out


def _at_times(container: av.container.InputContainer, times: np.ndarray, tolerance_s: float, name: str) -> np.ndarray:
    """The frames nearest to `times` (n,), each wanted frame decoded and converted once."""
    if not len(times):
        return np.zeros((0, container.streams.video[0].height, container.streams.video[0].width, 3), np.uint8)
    wanted, inverse = np.unique(times, return_inverse=True)
    runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > _RESEEK_S) + 1)
    pictures = [picture for run in runs for picture in _run(container, run, tolerance_s, name)]
    return np.stack(pictures)[inverse]


def _run(
    container: av.container.InputContainer, wanted: np.ndarray, tolerance_s: float, name: str
) -> Iterator[np.ndarray]:
    """One picture per ascending `wanted` time, decoding once through all of them."""
    before: tuple[float, av.VideoFrame] | None = None
    position = 0
    frames = _decoded(container, float(wanted[0]), name)
    for time, frame in frames:
        # The frame that is exactly meant ends the wait at once; otherwise the first one past it does.
        while position < len(wanted) and time >= wanted[position] - min(tolerance_s, TOLERANCE_S):
            nearest = min(filter(None, (before, (time, frame))), key=lambda f: abs(f[0] - wanted[position]))
            yield _picture(nearest, wanted[position], tolerance_s, name)
            position += 1
        if position == len(wanted):
            return
        before = (time, frame)
    if before is None:
        raise UserError(f"{name}: holds no frame at {wanted[position]:.4f} s; it is truncated or the lookup is wrong")
    for time in wanted[position:]:
        yield _picture(before, time, tolerance_s, name)


def _picture(found: tuple[float, av.VideoFrame], wanted: float, tolerance_s: float, name: str) -> np.ndarray:
    if abs(found[0] - wanted) > tolerance_s:
        raise UserError(
            f"{name}: the frame nearest to {wanted:.4f} s lies at {found[0]:.4f} s, farther than the tolerance of "
            f"{tolerance_s:g} s; the timestamps and the video do not belong together"
        )
    return _pixels(found[1])


def _pixels(frame: av.VideoFrame) -> np.ndarray:
    """uint8 (H, W, 3), upright: telephones store a sideways picture and the angle to turn it back by."""
    picture = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture
