"""A video file opened for reading (PyAV): the one format that its name says, the one stream that it must have.

FFmpeg would look for the format by itself, and knows some that open other files and network addresses: here a file is
what it is called, or is not read. What it says of its size is held to `data.limits` before anything is decoded.

Shapes: H height, W width; pictures are uint8 RGB.
"""

from __future__ import annotations

import ctypes
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np

from dataloaders.config import LimitsConfig
from dataloaders.files.images import Turn, display_turn, frame_pixels
from kairos_train.basics.errors import UserError
from kairos_train.basics.foreign_files import is_lfs_pointer, pointer_fault, refuse_lfs_pointer

VIDEOS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov", ".webm": "webm", ".avi": "avi"}
"""What a file is called -> FFmpeg's name of the only format that it is read as."""

_ALLOCATION = 1 << 28  # bytes that FFmpeg may ask for at once: the index of a file may promise what is not in it
_LARGE, _FEW_THREADS = 1 << 22, 2  # pixels of a picture from which so few decode: each thread holds frames of its own

Fit = Callable[[np.ndarray], np.ndarray]
"""What is kept of a picture uint8 (H, W, 3): another one, of the same size for all of a video."""


class BehindSeek(Exception):
    """An error behind a seek, that may come from what was not decoded."""


@dataclass
class Video:
    """An open file.

    Attributes:
        counted: its frames' own times mean nothing; the k-th frame that is decoded has the k-th time of the packets.
        run_up: key frames that are decoded before the needed one; None: all. With any, one thread decodes, so that an
            error belongs to the packet that was given.
        size: (height, width) of its pictures, from the first one on.
        turns: how they are shown, by the angle that each frame tells.
    """

    container: av.container.InputContainer
    stream: av.VideoStream
    name: str
    counted: bool
    run_up: int | None
    limits: LimitsConfig
    fit: Fit | None
    size: tuple[int, int] | None = None
    turns: dict[float, Turn] = field(default_factory=dict)

    def seconds(self, pts: int) -> float:
        return float(pts * self.stream.time_base)

    def picture(self, time: float, frame: av.VideoFrame) -> np.ndarray:
        """What is kept of a frame."""
        if frame.rotation not in self.turns:
            self.turns[frame.rotation] = display_turn(frame, name=self.name)
        aspect, most = self.stream.sample_aspect_ratio, self.limits.video_pixels
        shown = frame_pixels(frame, aspect, self.turns[frame.rotation], name=self.name, most_pixels=most)
        height, width = self.size = self.size or shown.shape[:2]
        if shown.shape[:2] != self.size:
            other = f"{shown.shape[1]}x{shown.shape[0]}"
            raise UserError(
                f"{self.name}: the picture changes from {width}x{height} to {other} at {time:.3f} s; cut the video "
                "there"
            )
        return shown if self.fit is None else self.fit(shown)


@contextmanager
def opened(
    file: Path | bytes,
    name: str | None,
    *,
    limits: LimitsConfig,
    suffix: str | None = None,
    run_up: int | None = 0,
    fit: Fit | None = None,
) -> Iterator[Video]:
    """An open file; its video stream refuses damage. FFmpeg's errors become ours, with the file's name."""
    name = name or (str(file) if isinstance(file, Path) else "video")
    if isinstance(file, Path) and not os.path.isfile(file):
        raise UserError(f"{name}: no such video file")
    if isinstance(file, Path):
        refuse_lfs_pointer(file)
    elif is_lfs_pointer(file):
        raise UserError(pointer_fault(name))
    form = _format(file, suffix, name)
    _bound_allocations(limits)
    try:
        # The whole path: in a name like 12:30.mp4, FFmpeg would take what is before the colon for a protocol.
        source = os.path.abspath(file) if isinstance(file, Path) else io.BytesIO(file)
        allowed = {"format_whitelist": ",".join(VIDEOS.values()), "protocol_whitelist": "file"}
        with av.open(source, format=form, options=allowed) as container:
            stream = _video_stream(container, name, limits)
            stream.thread_type = "AUTO"
            if run_up != 0 or stream.width * stream.height > _LARGE:
                stream.codec_context.thread_count = 1 if run_up != 0 else _FEW_THREADS
            # Without the first, damage is painted over in silence; the second holds for what the header hides.
            stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(limits.video_pixels)}
            # AVI knows the rate and the order of decoding alone: what FFmpeg makes of them is wrong with B-frames.
            counted = container.format.name == "avi" and not stream.codec_context.codec.intra_only
            yield Video(container, stream, name, counted, run_up, limits, fit)
    except (UserError, BehindSeek, ImportError):
        raise
    except Exception as error:  # decoders raise whatever they like on damaged bytes
        if isinstance(error, MemoryError) and not isinstance(error, av.FFmpegError):
            raise  # the machine's fault; FFmpeg's own says that the file asks for more than it may
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        other = f", or no {form} file as its name says" if form else f", or none of {', '.join(VIDEOS.values())}"
        raise UserError(
            f"{name}: cannot be decoded ({reason}); the file is truncated or damaged{other}: restore it"
        ) from error


def _format(file: Path | bytes, suffix: str | None, name: str) -> str | None:
    """FFmpeg's name of the format that a file's name says; None for bytes that have no name."""
    suffix = file.suffix if isinstance(file, Path) else suffix
    if suffix is not None and suffix.lower() not in VIDEOS:
        raise UserError(f"{name}: is no video by its name; use one of {', '.join(VIDEOS)}")
    return None if suffix is None else VIDEOS[suffix.lower()]


def _bound_allocations(limits: LimitsConfig) -> None:
    """Let FFmpeg refuse to allocate at once what no file within the limits needs.

    An MP4 of two kilobytes may announce a billion frames, which FFmpeg would list before anybody could ask how many.
    """
    need = max(_ALLOCATION, 16 * limits.video_pixels, 64 * limits.frames)
    ctypes.CDLL(av._core.__file__).av_max_alloc(ctypes.c_size_t(need))


def _video_stream(container: av.container.InputContainer, name: str, limits: LimitsConfig) -> av.VideoStream:
    """The one video stream, within the limits as far as the file says; cover pictures and thumbnails are none."""
    still = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & still]
    if not streams:
        raise UserError(f"{name}: holds no video; it is truncated or no video file: restore it")
    if len(streams) > 1:
        sizes = ", ".join(f"{stream.width}x{stream.height}" for stream in streams)
        raise UserError(f"{name}: holds {len(streams)} video streams ({sizes}); write each into a file of its own")
    stream = streams[0]
    if stream.width * stream.height > limits.video_pixels:
        raise UserError(
            f"{name}: has pictures of {stream.width}x{stream.height}, more than data.limits.video_pixels="
            f"{limits.video_pixels}; scale it down or raise that"
        )
    check_frames(max(stream.frames, len(stream.index_entries)), name, limits)
    return stream


def check_frames(count: int, name: str, limits: LimitsConfig) -> None:
    """Refuse a video of more frames than `data.limits.frames`."""
    if count > limits.frames:
        raise UserError(f"{name}: has more than data.limits.frames={limits.frames} frames; divide it or raise that")
