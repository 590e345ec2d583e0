"""Videos, pictures, manifests and tars for tests of sources."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from dataloaders.files.video_encoder import encode_mp4


def counting(frames: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Pictures whose brightness says which frame it is: 5 levels a frame."""
    return np.broadcast_to(
        (5 * np.arange(frames)).astype(np.uint8)[:, None, None, None], (frames, height, width, 3)
    ).copy()


def write_manifest(folder: Path, rows: list[dict]) -> Path:
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def mp4(frames: np.ndarray, fps: float = 20) -> bytes:
    file = io.BytesIO()
    encode_mp4(file, frames, fps, crf=1)
    return file.getvalue()


def jpg(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="JPEG", quality=95)
    return file.getvalue()


def caption(text: str, **more) -> bytes:
    return json.dumps({"caption": text} | more).encode()
