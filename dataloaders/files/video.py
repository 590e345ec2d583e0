"""Videos decoded (PyAV): frames looked up by index or by time, on the video's own clock.

One picture at a time has its full size; what is kept of it is the caller's.

What is given is what a player shows: frames that an edit list hides do not count, pictures are upright and their pixels
square. What a player would guess is refused: several video streams, times out of order.

What follows a key frame may refer to frames before it (open groups of pictures), which a decoder that seeks has not
seen. So an error behind a seek is tried again from an earlier key frame on, and counts if it comes again.

Shapes: T frames, H height, W width; frames are uint8 RGB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import av
import numpy as np

from dataloaders.config import LimitsConfig
from dataloaders.files.video_file import BehindSeek, Fit, Video, check_frames, opened
from kairos_train.basics.errors import UserError

TOLERANCE_S = 1e-4  # farthest a frame may lie from the asked time, as LeRobot has it
_RUN_UPS = (0, 1, None)  # key frames that decoding starts before the needed one, in each attempt; None: all
_RESEEK_S = 4.0  # a gap between wanted frames from which a new seek is cheaper than decoding through it


def decode_mp4(
    file: Path | bytes,
    *,
    indices: Sequence[int] | None = None,
    timestamps: Sequence[float] | None = None,
    tolerance_s: float = TOLERANCE_S,
    name: str | None = None,
    suffix: str | None = None,
    out: np.ndarray | None = None,
    fit: Fit | None = None,
    limits: LimitsConfig | None = None,
) -> np.ndarray:
    """Frames of a video as uint8 (n, H, W, 3): all of them, those at `indices`, or those nearest to `timestamps`.

    Indices count frames in presentation order, timestamps are seconds of the file's own clock; both may repeat and come
    in any order, and the result follows theirs.

    Args:
        file: a path or the bytes of a file.
        tolerance_s: farthest the nearest frame may lie from an asked timestamp.
        name: what errors call the file; the path by default.
        suffix: of the name that bytes come with, one of `VIDEOS`; None: they may be any of these.
        out: uint8 (n, H, W, 3) that takes all of the frames and is returned; the file must hold exactly these.
        fit: what is kept of a picture, as soon as it is decoded.
        limits: of what the file may hold.

    Raises:
        UserError: file missing, truncated or undecodable, or not what its name says; beyond a limit; several video
            streams; pictures of different sizes; an index outside of it; no frame within the tolerance.
    """
    if indices is not None and timestamps is not None:
        raise TypeError("give indices or timestamps, not both")

    def found(video: Video) -> np.ndarray:
        if timestamps is not None:
            return _at_times(video, np.asarray(timestamps, np.float64), tolerance_s)
        if indices is None:
            return _all_frames(video) if out is None else _fill(out, video)
        times, wanted = _frame_times(video), np.asarray(indices, np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(times)):
            bad = wanted[(wanted < 0) | (wanted >= len(times))][0]
            raise UserError(f"{video.name}: frame {bad} asked of {len(times)}")
        return _at_times(video, times[wanted], TOLERANCE_S)

    given = {"suffix": suffix, "limits": limits or LimitsConfig(), "fit": fit}
    for run_up in _RUN_UPS:
        with suppress(BehindSeek), opened(file, name, run_up=run_up, **given) as video:
            return found(video)
    raise AssertionError("the last attempt gives frames or an error")


def frame_times(
    file: Path | bytes, *, name: str | None = None, suffix: str | None = None, limits: LimitsConfig | None = None
) -> np.ndarray:
    """Seconds of every frame of a video on its own clock, in presentation order, float64 (T,); nothing is decoded.

    Args: as for `decode_mp4`.

    Raises:
        UserError: file missing, unreadable, not what its name says, or beyond a limit.
    """
    with opened(file, name, suffix=suffix, limits=limits or LimitsConfig()) as video:
        return _frame_times(video)


def read_through(file: Path) -> tuple[str, tuple[int, int, int]]:
    """(codec, (frames, height, width)) of a video, every frame decoded and dropped.

    Raises:
        UserError: as `decode_mp4` does.
    """
    with opened(file, None, limits=LimitsConfig(), fit=lambda picture: picture[:1, :1].copy()) as video:
        count = len(_all_frames(video))
        return video.stream.codec_context.name, (count, *video.size)


def stored_shape(file: bytes) -> tuple[int, int, int]:
    """(frames, height, width) of an MP4 file, by its own word; nothing is decoded.

    Raises:
        UserError: as `frame_times` does.
    """
    with opened(file, None, suffix=".mp4", limits=LimitsConfig()) as video:
        return video.stream.frames, video.stream.height, video.stream.width


def _frame_times(video: Video) -> np.ndarray:
    """Seconds of every frame in presentation order, float64 (T,), from the packets' headers alone."""
    times, packets = [], 0
    for packet in video.container.demux(video.stream):
        packets += packet.size > 0
        if _is_shown(packet, video.stream):
            times.append(packet.dts if video.counted else packet.pts)
            check_frames(len(times), video.name, video.limits)
    if "mp4" in video.container.format.name and packets < (indexed := len(video.stream.index_entries)):
        raise _truncated(video, packets, indexed)
    if not times:
        raise UserError(f"{video.name}: holds no frames")
    return np.sort(np.array(times, np.float64)) * float(video.stream.time_base)


def _is_shown(packet: av.Packet, stream: av.VideoStream) -> bool:
    """Whether a packet gives a frame that a player shows."""
    if not packet.size or packet.is_discard:  # the second: hidden by an edit list
        return False
    return stream.codec_context.name not in ("vp8", "libvpx") or bool(bytes(packet)[0] >> 4 & 1)


def _decoded(video: Video, start: float) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds, frame) in presentation order, from a key frame at or before `start` on."""
    if video.counted:
        video.container.seek(0, stream=video.stream)
        times = _frame_times(video)
        video.container.seek(0, stream=video.stream)
        frames = (frame for packet in video.container.demux(video.stream) for frame in _frames_of(packet, video))
        yield from zip(times, frames)
        return
    before = -np.inf
    for packet, needed, sought in _packets(video, start):
        try:
            frames = _frames_of(packet, video)
        except (av.FFmpegError, UserError):
            if not needed:
                continue
            if sought and video.run_up is not None:
                raise BehindSeek from None
            raise
        for frame in frames:
            if frame.pts is None or (time := video.seconds(frame.pts)) < before:
                raise UserError(
                    f"{video.name}: the times of its frames are missing or out of order behind {before:.3f} s; encode "
                    "the video again"
                )
            yield time, frame
            before = time


def _frames_of(packet: av.Packet, video: Video) -> list[av.VideoFrame]:
    if packet.is_corrupt:
        where = "an unknown time" if packet.pts is None else f"{video.seconds(packet.pts):.3f} s"
        raise UserError(f"{video.name}: is truncated or damaged at {where}: restore it")
    return packet.decode()


def _packets(video: Video, start: float) -> Iterator[tuple[av.Packet, bool, bool]]:
    """(packet, whether it is needed or only run-up, whether reading began behind the file's first key frame)."""
    key = _seek(video, start)
    first = key
    if key is not None and video.run_up != 0:
        first = _seek(video, video.seconds(key - 1)) if video.run_up else _seek(video, 0.0)
    begun = needed = key is None
    for packet in video.container.demux(video.stream):
        begun = begun or packet.is_keyframe or first is None
        needed = needed or packet.pts == key
        if begun:
            yield packet, needed, first is not None


def _seek(video: Video, start: float) -> int | None:
    """Go to a key frame that is shown at or before `start`; its pts, None for the start of the file.

    Files are searched by the times of decoding, which come before those of showing.
    """
    back = 0.0
    while target := max(int((start - back) / float(video.stream.time_base)) - 1, 0):
        video.container.seek(target, stream=video.stream, backward=True)
        key = next((p.pts for p in video.container.demux(video.stream) if p.is_keyframe and p.pts is not None), None)
        if key is not None and video.seconds(key) <= start + TOLERANCE_S:
            video.container.seek(target, stream=video.stream, backward=True)
            return key
        back = 2 * back + 1
    video.container.seek(0, stream=video.stream, backward=True)
    return None


def _all_frames(video: Video) -> np.ndarray:
    found = []
    for time, frame in _decoded(video, 0.0):
        found.append(video.picture(time, frame))
        check_frames(len(found), video.name, video.limits)
    if not found or len(found) < video.stream.frames:  # which counts hidden ones, too
        video.container.seek(0, stream=video.stream)
        if len(found) < (promised := len(_frame_times(video))):
            raise _truncated(video, len(found), promised)
    return np.stack(found)


def _fill(out: np.ndarray, video: Video) -> np.ndarray:
    count = 0
    for time, frame in _decoded(video, 0.0):
        picture = video.picture(time, frame)
        if count == len(out) or picture.shape != out.shape[1:]:
            raise UserError(
                f"{video.name}: frame {count} has shape {picture.shape}, expected {len(out)} of {out.shape[1:]}"
            )
        out[count] = picture
        count += 1
    if count < len(out):
        raise _truncated(video, count, len(out))
    return out


def _truncated(video: Video, count: int, promised: int) -> UserError:
    return UserError(f"{video.name}: holds {count} readable frames of {promised}; it is truncated: restore it")


def _at_times(video: Video, times: np.ndarray, tolerance_s: float) -> np.ndarray:
    """The frames nearest to `times` (n,), each wanted frame decoded and converted once."""
    if not len(times):
        return np.zeros((0, video.stream.height, video.stream.width, 3), np.uint8)
    wanted, inverse = np.unique(times, return_inverse=True)
    runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > _RESEEK_S) + 1)
    pictures = [picture for run in runs for picture in _run(video, run, tolerance_s)]
    return np.stack([pictures[i] for i in inverse])


def _run(video: Video, wanted: np.ndarray, tolerance_s: float) -> Iterator[np.ndarray]:
    """One picture per ascending `wanted` time, decoding once through all of them."""
    before: tuple[float, av.VideoFrame] | None = None
    position = 0
    for time, frame in _decoded(video, float(wanted[0])):
        # The frame that is exactly meant ends the wait at once; otherwise the first one past it does.
        while position < len(wanted) and time >= wanted[position] - min(tolerance_s, TOLERANCE_S):
            nearest = min(filter(None, (before, (time, frame))), key=lambda f: abs(f[0] - wanted[position]))
            yield _picture(video, nearest, wanted[position], tolerance_s)
            position += 1
        if position == len(wanted):
            return
        before = (time, frame)
    if before is None:
        raise UserError(
            f"{video.name}: holds no frame at {wanted[position]:.4f} s; it is truncated or the lookup is wrong"
        )
    for time in wanted[position:]:
        yield _picture(video, before, time, tolerance_s)


def _picture(video: Video, found: tuple[float, av.VideoFrame], wanted: float, tolerance_s: float) -> np.ndarray:
    if abs(found[0] - wanted) > tolerance_s:
        raise UserError(
            f"{video.name}: the frame nearest to {wanted:.4f} s lies at {found[0]:.4f} s, farther than the tolerance "
            f"of {tolerance_s:g} s; the timestamps and the video do not belong together"
        )
    return video.picture(*found)
