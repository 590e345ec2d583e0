"""Videos and images of any size and length -> samples that keep their aspect.

A video is shown at `fps` (a slower one at its own): frame k of a clip is the one nearest to start + k / fps. It is cut
into samples of `most_frames` frames, one behind the other; what is left gives one more of the longest 4k + 1 frames,
unless that is below `least_frames`. An image is a video of one frame.

Size: of the `aspects` (long side over short side; a tall picture takes the same the other way) the nearest in ratio,
with the short side at `short_side` and both sides then cut down to multiples of 32: 480 gives 480×832 and 720 gives
704×1280 for 16:9. The picture is scaled to cover that and cropped in the centre, never stretched.

Shapes: N frames of the file, T of a sample, H W height and width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataloaders.config import ClipConfig, LimitsConfig
from dataloaders.files.images import read_image as stored_image
from dataloaders.files.video import decode_mp4, frame_times
from dataloaders.files.video_file import check_frames
from dataloaders.sources.base import Clip, SourceSettings
from dataloaders.sources.rows import Row
from dataloaders.windows import cover
from kairos_train.basics.errors import UserError
from kairos_train.basics.geometry import PIXEL_MULTIPLE, whole_frames


def clip_size(height: int, width: int, clips: ClipConfig) -> tuple[int, int]:
    """(H, W) of the samples of a picture of height x width pixels, both multiples of 32."""
    wanted = math.log(max(height, width) / min(height, width))
    aspect = min(clips.aspects, key=lambda a: (abs(math.log(a) - wanted), a))
    short = clips.short_side // PIXEL_MULTIPLE * PIXEL_MULTIPLE
    long = int(clips.short_side * aspect + 1e-6) // PIXEL_MULTIPLE * PIXEL_MULTIPLE
    return (short, long) if height <= width else (long, short)


def pieces(frames: int, clips: ClipConfig) -> tuple[list[tuple[int, int]], int]:
    """([(first, count)] of the samples of a clip of `frames` frames, frames left out)."""
    out, first = [], 0
    while frames - first >= clips.most_frames:
        out.append((first, clips.most_frames))
        first += clips.most_frames
    rest = whole_frames(frames - first) if frames > first else 0
    if rest >= clips.least_frames:
        out.append((first, rest))
        first += rest
    return out, frames - first


def cut_video(
    file: Path | bytes,
    row: Row,
    settings: SourceSettings,
    *,
    suffix: str,
    key: str,
    name: str,
    meta: dict,
    left_out: Counter[str],
) -> Iterator[Clip]:
    """The samples of one video; frames that none of them shows are counted in `left_out`.

    Args:
        suffix: of the file's name, which says its format.

    Raises:
        UserError: undecodable, beyond a limit, an impossible start or end, too short for one sample.
    """
    clips, given = settings.clips, {"name": name, "suffix": suffix, "limits": settings.limits}
    times = frame_times(file, **given)
    shown, fps = _shown(times, row, clips, name, settings.limits)
    found, rest = pieces(len(shown), clips)
    if not found:
        raise UserError(
            f"{name}: has {len(shown)} frames at {fps:g} fps between its start and end, fewer than "
            f"data.clips.least_frames={clips.least_frames}; leave it out or lower that"
        )
    for number, (first, count) in enumerate(found):
        yield Clip(
            key=f"{key}-{number:06d}",
            frames=decode_mp4(
                file, timestamps=shown[first : first + count], fit=lambda picture: _covered(picture, clips), **given
            ),
            fps=fps,
            captions=row.captions,
            scores=row.scores,
            meta=meta | {"start_s": round(float(shown[first] - times[0]), 6)},
        )
    left_out["frames"] += rest


def read_image(
    data: bytes, row: Row, settings: SourceSettings, *, suffix: str, key: str, name: str, meta: dict
) -> Clip:
    """The sample of an image: one frame. Raises UserError when it cannot be decoded or is beyond a limit."""
    picture = stored_image(data, name=name, suffix=suffix, limits=settings.limits)
    frames = _covered(picture, settings.clips)[None]
    return Clip(f"{key}-000000", frames, settings.clips.fps, row.captions, dict(meta), scores=row.scores)


def _covered(picture: np.ndarray, clips: ClipConfig) -> np.ndarray:
    """A picture at the size of its samples."""
    return cover(picture[None], *clip_size(*picture.shape[:2], clips))[0]


def _shown(times: np.ndarray, row: Row, clips: ClipConfig, name: str, limits: LimitsConfig) -> tuple[np.ndarray, float]:
    """(seconds of the frames that are shown, their rate) of a video with frames at `times` (N,)."""
    period = float(np.median(np.diff(times))) if len(times) > 1 else 1 / clips.fps
    if not period > 0:
        raise UserError(f"{name}: most of its frames have the time of the one before; write it with times of their own")
    length = float(times[-1] - times[0]) + period
    end = length if row.end is None else row.end
    if not 0 <= row.start < end:
        raise UserError(f"{name}: start={row.start:g} and end={end:g} leave nothing; give seconds with start < end")
    if end > length + 0.5 * period + 1e-3:
        raise UserError(f"{name}: end={end:g} is behind the video's {length:.3f} s; fix the manifest")
    fps = min(clips.fps, 1 / period)
    count = int((min(end, length) - row.start) * fps + 1e-6)
    check_frames(count, f"{name}: {min(end, length) - row.start:g} s at {fps:g} fps", limits)
    wanted = times[0] + row.start + np.arange(count) / fps
    if len(times) == 1:
        return np.repeat(times, min(count, 1)), fps
    after = np.clip(np.searchsorted(times, wanted), 1, len(times) - 1)
    nearest = after - (wanted - times[after - 1] <= times[after] - wanted + 1e-6)  # halfway: the earlier one
    return times[nearest], fps
