"""MP4 files written (PyAV): H.264 and AV1.

H.264 with a key frame every 8 frames is the best balance of size and seeking for training clips; AV1 (SVT, a key frame
every 2 frames, CRF 30) is what LeRobot writes by default. Shapes: T frames, H height, W width; frames are uint8 RGB.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import IO

import av
import numpy as np

from kairos_train.basics.errors import UserError
from kairos_train.basics.files import replacing


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
        self._container = av.open(os.path.abspath(file) if isinstance(file, Path) else file, "w", format="mp4")
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
