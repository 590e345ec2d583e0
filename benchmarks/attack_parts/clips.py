"""Rows of manifests and entries of tars that want memory, or what lies elsewhere. Used by attack.py and the tests.

A `Row` writes what it needs beside a manifest and gives the row, a value or a line as it is. An entry is bytes.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import av
import numpy as np
from PIL import Image

from dataloaders.files.video_encoder import encode_mp4

EXABYTE = 1 << 60
PRIVATE = 200
"""The grey of videos that no source may show; good ones have 40."""
Row = Callable[[Path], dict | str]


def video(frames: int = 9, *, level: int = 40) -> bytes:
    """An MP4 file of grey frames."""
    file = io.BytesIO()
    encode_mp4(file, np.full((frames, 64, 96, 3), level, np.uint8), 10.0)
    return file.getvalue()


def manifest(folder: Path, rows: Iterable[Row]) -> Path:
    """A manifest of a good video and these rows; the folder is the source."""
    folder.mkdir(parents=True)
    (folder / "good.mp4").write_bytes(video())
    values = [{"path": "good.mp4"}, *(row(folder) for row in rows)]
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder


def tar(path: Path, entries: bytes) -> Path:
    """A tar of two good samples and these entries."""
    good = b"".join(entry(f"good{i}.mp4", video()) + entry(f"good{i}.txt", b"good") for i in range(2))
    path.write_bytes(good + entries + bytes(1024))
    return path


def line(values: dict | str) -> Row:
    """A row as it is."""
    return lambda folder: values


def named(name: str, content: bytes | str | Callable[[], bytes]) -> Row:
    """A file below the manifest's folder."""

    def row(folder: Path) -> dict:
        data = content() if callable(content) else content
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return {"path": name}

    return row


def entry(name: str, content: bytes = b"", *, size: int | None = None, kind: bytes = tarfile.REGTYPE) -> bytes:
    """One entry of a tar; its header may say another size."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content) if size is None else size, kind
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def pax(**values: str) -> bytes:
    """A header that describes the member behind it."""
    records = b""
    for name, value in values.items():
        body = f" {name}={value}\n".encode()
        digits = len(str(len(body) + 1))
        records += f"{len(body) + digits}".encode() + body
    return entry("pax", records, kind=tarfile.XHDTYPE)


def sparse(name: str, size: int) -> bytes:
    """A member of holes, by an old GNU header."""
    header = bytearray(entry(name, kind=tarfile.GNUTYPE_SPARSE))
    header[483:495] = b"\x80" + size.to_bytes(11, "big")  # the size with its holes
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header[:512]):06o}\0 ".encode()
    return bytes(header)


# --- texts that FFmpeg follows ---


def concatenation(name: str) -> Row:
    """A list of another file's name, called like a video."""

    def row(folder: Path) -> dict:
        (folder / "private.mp4").write_bytes(video(level=PRIVATE))
        return named(name, "ffconcat version 1.0\nfile private.mp4\n")(folder)

    return row


def playlist(name: str) -> Row:
    """A list of a file's address, called like a video."""

    def row(folder: Path) -> dict:
        (folder / "private.mp4").write_bytes(video(level=PRIVATE))
        lines = ("#EXTM3U", "#EXT-X-TARGETDURATION:1", "#EXTINF:1,", f"file://{folder / 'private.mp4'}")
        return named(name, "\n".join((*lines, "#EXT-X-ENDLIST")))(folder)

    return row


SESSION = """v=0
o=- 0 0 IN IP4 127.0.0.1
s=x
c=IN IP4 127.0.0.1
t=0 0
m=video 15004 RTP/AVP 96
a=rtpmap:96 H264/90000
"""
"""By this text, FFmpeg opens a port and waits."""


# --- large from little ---


def image(kind: str, side: int = 64) -> bytes:
    """An image file of a Pillow format."""
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, kind)
    return file.getvalue()


def black_png(width: int, height: int) -> bytes:
    """A PNG of one bit per pixel, a thousandth of that as a file."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer, scan_line = zlib.compressobj(9), bytes(1 + -(-width // 8))
    data = b"".join([*(packer.compress(scan_line) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def promised_frames(count: int) -> bytes:
    """An MP4 of two kilobytes whose index promises frames of one byte."""
    data = bytearray(video())
    for name, offset, values in ((b"stsz", 8, (1, count)), (b"stts", 12, (count,)), (b"stsc", 16, (count,))):
        at = data.index(name) + offset
        data[at : at + 4 * len(values)] = struct.pack(f">{len(values)}I", *values)
    return bytes(data)


def encoded(
    container: str = "mp4", *, frames: int = 9, height: int = 64, width: int = 96, late: int = 0, **options: str
) -> bytes:
    """Black frames at 10 fps, the last of them `late` seconds later; options of x264."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream("libx264", rate=10, options={"bf": "0", "preset": "ultrafast", **options})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        black = av.VideoFrame(width, height, "yuv420p")
        for plane in black.planes:
            plane.update(bytes(plane.buffer_size))
        for number in (*range(frames), None):
            if number is not None:
                black.pts = number
            for packet in stream.encode(None if number is None else black):
                if late and round(packet.pts * packet.time_base * 10) == frames - 1:
                    packet.pts = packet.dts = packet.pts + int(late / packet.time_base)
                out.mux(packet)
    return file.getvalue()


def hollow(name: str, size: int) -> Row:
    """A file that is one hole."""

    def row(folder: Path) -> dict:
        with (folder / name).open("wb") as file:
            file.truncate(size)
        return {"path": name}

    return row


def nested(depth: int) -> str:
    """JSON of lists in each other."""
    return "[" * depth + "]" * depth


# --- elsewhere ---


def outside(folder: Path) -> Path:
    """A video beside a manifest's folder."""
    place = folder.with_name(f"{folder.name}-outside")
    place.mkdir(exist_ok=True)
    (place / "private.mp4").write_bytes(video(level=PRIVATE))
    return place / "private.mp4"


def address(scheme: str) -> Row:
    """The URL of a video of this machine."""
    return lambda folder: {"path": f"{scheme}://{outside(folder)}"}


def linked(folder: Path) -> dict:
    """A link to a folder, and a file behind it."""
    os.symlink(outside(folder).parent, folder / "link", target_is_directory=True)
    return {"path": "link/private.mp4"}
