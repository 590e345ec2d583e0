"""Videos as others write them: any codec and container, edit lists, display matrices, several streams."""

import io
import struct
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SIDE = 64


def numbered(count: int, side: int = SIDE) -> np.ndarray:
    """uint8 (count, side, side, 3): two rows of five light and dark blocks say which frame it is."""
    bits = (np.arange(count)[:, None] >> np.arange(10)) & 1
    blocks = (bits * 200 + 25).astype(np.uint8).reshape(count, 2, 5)
    rows = np.repeat(np.repeat(blocks, side // 2, axis=1), side // 5, axis=2)
    frames = np.full((count, side, side, 3), 25, np.uint8)
    frames[:, : rows.shape[1], : rows.shape[2]] = rows[..., None]
    return frames


def numbers_in(frames: np.ndarray) -> list[int]:
    """The numbers that `numbered` frames show, of any size."""
    height, width = frames.shape[1] // 2, frames.shape[2] * (SIDE // 5) // SIDE
    found = []
    for frame in frames:
        blocks = frame[: 2 * height, : 5 * width].mean(-1).reshape(2, height, 5, width)
        light = blocks[:, height // 4 : -(height // 4), :, width // 4 : -(width // 4)].mean((1, 3)) > 128
        found.append(int((light.reshape(-1) << np.arange(10)).sum()))
    return found


def video(
    frames: np.ndarray,
    *,
    container: str = "mp4",
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    streams: int = 1,
    cover: bool = False,
    muxing: dict[str, str] | None = None,
    **options: str,
) -> bytes:
    """A video at 10 fps; frames uint8 (T, H, W, 3), or (T, H, W) of the pixel format itself.

    Args:
        streams: as many streams of these frames.
        cover: a black cover picture stands before them.
        muxing: options of the container.
        options: of the codec.
    """
    with tempfile.NamedTemporaryFile() as file, av.open(file.name, "w", format=container, options=muxing or {}) as out:
        made = []
        if cover:
            art = out.add_stream("mjpeg", rate=1)
            art.height, art.width, art.pix_fmt = 32, 32, "yuvj420p"
            art.disposition = av.stream.Disposition.attached_pic
        for _ in range(streams):
            stream = out.add_stream(codec, rate=10, options={"bf": "0", **options})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = pix_fmt
            made.append(stream)
        if cover:
            black = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            black.pts = 0
            out.mux([*art.encode(black), *art.encode(None)])
        for i, picture in enumerate(frames):
            for stream in made:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24" if picture.ndim == 3 else pix_fmt)
                frame.pts = i
                out.mux(stream.encode(frame))
        for stream in made:
            out.mux(stream.encode(None))
        out.close()
        return Path(file.name).read_bytes()


def cut_without_encoding(data: bytes, seconds: float) -> bytes:
    """What `ffmpeg -ss SECONDS -c copy` makes: an edit list hides the frames from the key frame to the cut."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        shift = int(seconds / source.streams.video[0].time_base)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)
    return file.getvalue()


def with_matrix(data: bytes, matrix: Sequence[float]) -> bytes:
    """An MP4 file with (a, b, c, d) as its track's display matrix: x' = a x + c y, y' = b x + d y."""
    at = data.index(b"tkhd") + 4
    at += 40 if data[at] == 0 else 52  # by the version of the header
    a, b, c, d = (int(v * 65536) for v in matrix)
    packed = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return data[:at] + packed + data[at + 36 :]


def two_sizes(first: np.ndarray, second: np.ndarray) -> bytes:
    """A WebM file whose picture size changes at a key frame."""
    packets = []
    for frames in (first, second):
        with av.open(io.BytesIO(video(frames, container="webm", codec="libvpx"))) as source:
            packets += [(bytes(p), p.is_keyframe) for p in source.demux(video=0) if p.size]
    file = io.BytesIO()
    with av.open(file, "w", format="webm") as out:
        stream = out.add_stream("libvpx", rate=10)
        stream.height, stream.width, stream.pix_fmt = *first.shape[1:3], "yuv420p"
        for i, (data, is_key) in enumerate(packets):
            packet = av.Packet(data)
            packet.pts = packet.dts = i
            packet.time_base, packet.is_keyframe, packet.stream = Fraction(1, 10), is_key, stream
            out.mux(packet)
    return file.getvalue()
