"""The newest sampled pictures of a run, out of TensorBoard's files.

Their records are passed by without reading what they hold unless it is a sample, and without checksums: tensorboard's
own reader computes those in Python, which takes minutes for the files of a long run.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TAGS = b"samples/"
HEAD = 512  # bytes of a record in which its tag stands
GIF = b"GIF8"


@dataclass(frozen=True)
class LoggedSample:
    """One picture.

    Attributes:
        tag: samples/video_N or samples/actions_N.
        step: after which it was sampled.
        kind: gif or png.
        file, place, size: where its record lies.
    """

    tag: str
    step: int
    kind: str
    file: Path
    place: int
    size: int

    def content(self) -> bytes:
        """The picture."""
        with self.file.open("rb") as file:
            file.seek(self.place)
            return _image(file.read(self.size))[2]


def newest_samples(folder: Path) -> list[LoggedSample]:
    """The pictures of the last step that was sampled, in order of their tags; none without any."""
    files = sorted(Path(folder).glob("events.out.tfevents.*"), key=lambda path: path.name.split(".")[3:4])
    for file in reversed(files):
        places = list(_places(file))
        found: dict[str, LoggedSample] = {}
        for place, size in reversed(places):
            with file.open("rb") as opened:
                opened.seek(place)
                tag, step, content = _image(opened.read(size))
            if found and step != next(iter(found.values())).step:
                break
            if tag:
                found.setdefault(
                    tag, LoggedSample(tag, step, "gif" if content.startswith(GIF) else "png", file, place, size)
                )
        if found:
            return [found[tag] for tag in sorted(found)]
    return []


def _places(path: Path) -> Iterator[tuple[int, int]]:
    """Offset and size of every record that may be a sample. The last one of a running run may be cut off."""
    end = path.stat().st_size
    with path.open("rb") as file:
        while len(header := file.read(12)) == 12:
            (size,) = struct.unpack("<Q", header[:8])
            place = file.tell()
            if place + size + 4 > end:
                return
            if TAGS in file.read(min(size, HEAD)):
                yield place, size
            file.seek(place + size + 4)


def _image(record: bytes) -> tuple[str, int, bytes]:
    """Tag, step and content of the first picture in a record; "" without one."""
    from tensorboard.compat.proto.event_pb2 import Event

    event = Event.FromString(record)
    for value in event.summary.value:
        if value.tag.startswith(TAGS.decode()) and value.HasField("image"):
            return value.tag, event.step, value.image.encoded_image_string
    return "", event.step, b""
