"""Damage that real datasets come with, one function each: given a good source in a folder, it spoils it."""

import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from support.toy_videos import caption, counting, jpg, mp4, write_manifest, write_tar

CAMERA = "observation.images.top"
GOOD, SHORT = counting(18), counting(3)


def info(**changes):
    """Change meta/info.json; a value that is a function is given the old one."""

    def damage(root: Path) -> None:
        path = root / "meta/info.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | {k: v(values[k]) if callable(v) else v for k, v in changes.items()}))

    return damage


def text(name: str, content: str):
    """Replace a file."""
    return lambda root: (root / name).write_text(content)


def lines(name: str, change):
    """Change the list of JSON objects of a JSON lines file."""

    def damage(root: Path) -> None:
        rows = [json.loads(line) for line in (root / name).read_text().splitlines()]
        (root / name).write_text("\n".join(json.dumps(row) for row in change(rows)))

    return damage


def remove(name: str):
    return lambda root: os.remove(root / name)


def cut(name: str, keep: float = 0.5):
    """Keep the first part of a file."""

    def damage(root: Path) -> None:
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def episode_file(number: int) -> str:
    return f"data/chunk-{number // 2:03d}/episode_{number:06d}.parquet"


def video_file(number: int) -> str:
    return f"videos/chunk-{number // 2:03d}/{CAMERA}/episode_{number:06d}.mp4"


def column(number: int, name: str, change):
    """Change a column of an episode's rows, a list."""

    def damage(root: Path) -> None:
        path = root / episode_file(number)
        values = pq.read_table(path).to_pydict()
        values[name] = change(values[name])
        pq.write_table(pa.table(values), path)

    return damage


def at(row: int, value):
    """A change of one row's vector."""
    return lambda rows: [value if i == row else old for i, old in enumerate(rows)]


def fewer_rows(number: int):
    def damage(root: Path) -> None:
        path = root / episode_file(number)
        pq.write_table(pq.read_table(path).slice(1), path)

    return damage


def manifest(*rows):
    """A manifest of good.mp4 and these rows; the files that the rows may name are there."""

    def write(folder: Path) -> Path:
        folder.mkdir()
        (folder / "good.mp4").write_bytes(mp4(GOOD))
        (folder / "short.mp4").write_bytes(mp4(SHORT))
        (folder / "cut.mp4").write_bytes(mp4(GOOD)[:-300])
        (folder / "cut.jpg").write_bytes(jpg(GOOD[0])[:200])
        (folder / "words.mp4").write_text("no video")
        (folder / "words.xyz").write_text("no video")
        (folder.parent / "outside.mp4").write_bytes(mp4(GOOD))
        return write_manifest(folder, [{"path": "good.mp4", "caption": "good"}, *rows])

    return write


def raw_manifest(content: str | bytes, name: str = "manifest.jsonl"):
    def write(folder: Path) -> Path:
        source = manifest()(folder)
        (source / "manifest.jsonl").unlink()
        (source / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return source

    return write


def tar(*members, change=None):
    """A tar of a good sample and these members; `change` of its bytes."""

    def write(folder: Path) -> Path:
        folder.mkdir()
        good = [("good.mp4", mp4(GOOD)), ("good.json", caption("good"))]
        path = write_tar(folder / "a.tar", [*good, *members])
        if change:
            path.write_bytes(change(path.read_bytes()))
        return folder

    return write


def linked_tar(folder: Path) -> Path:
    source = tar()(folder)
    with tarfile.open(folder / "a.tar", "a") as archive:
        link = tarfile.TarInfo("link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return source


def flip(offset: int):
    return lambda data: data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :]
