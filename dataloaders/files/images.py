"""Encoded images and decoded video frames as upright RGB, uint8 (H, W, 3), square pixels.

What is stored is not always what is shown: telephones store sideways or mirrored pictures beside the way to turn them,
old video formats store pixels that are not square, and some pictures have 16 bits where 8 are wanted.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from dataloaders.config import LimitsConfig
from kairos_train.basics.errors import UserError, one_line
from kairos_train.basics.foreign_files import holds_lfs_pointer, is_lfs_pointer, pointer_fault

IMAGES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}
"""What a file is called -> Pillow's name of the only format that it is read as."""

Turn = Callable[[np.ndarray], np.ndarray]
"""A picture as it is stored -> as it is shown."""

_UNNAMED = sorted({*IMAGES.values(), "TIFF"})  # depth is stored in the last
_TURNS: dict[
    tuple, Turn
] = {  # (a, b, c, d) of a display matrix, x' = a x + c y and y' = b x + d y -> what shows the picture so
    (1, 0, 0, 1): lambda p: p,
    (0, 1, -1, 0): lambda p: np.rot90(p, 3),
    (-1, 0, 0, -1): lambda p: np.rot90(p, 2),
    (0, -1, 1, 0): lambda p: np.rot90(p, 1),
    (-1, 0, 0, 1): lambda p: p[:, ::-1],
    (1, 0, 0, -1): lambda p: p[::-1],
    (0, 1, 1, 0): lambda p: p.swapaxes(0, 1),
    (0, -1, -1, 0): lambda p: np.rot90(p, 2).swapaxes(0, 1),
}


def read_image(
    source: bytes | Path,
    *,
    name: str,
    suffix: str | None = None,
    scale_16_bits: bool = True,
    limits: LimitsConfig | None = None,
) -> np.ndarray:
    """An encoded image, upright by its EXIF orientation.

    Args:
        source: the bytes of a file, or its path.
        name: what errors call it.
        suffix: of the name that bytes come with, one of `IMAGES`; None: they may be any of these, or TIFF.
        scale_16_bits: show 16 bits of grey as 8, as a viewer does; False refuses them.
        limits: of what it may hold.

    Raises:
        UserError: it cannot be decoded, is not what its name says, has more pixels than allowed or more bits per pixel
            than can be shown.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if is_lfs_pointer(source) if isinstance(source, bytes) else holds_lfs_pointer(source):
        raise UserError(pointer_fault(name))
    most = (limits or LimitsConfig()).image_pixels
    form = _format(source, suffix, name)
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=[form] if form else _UNNAMED) as image:
            if image.width * image.height > most:
                raise UserError(
                    f"{name}: has {image.width}x{image.height} pixels, more than data.limits.image_pixels={most}; "
                    "scale it down or raise that"
                )
            deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
            bits = 16 if deep else 32 if image.mode in ("I", "F") else 8
            if bits > (16 if scale_16_bits else 8):
                raise UserError(
                    f"{name}: has {bits} bits of grey per pixel, as depth has, and 8 are packed; leave it out, or "
                    "store it as an 8-bit image"
                )
            upright = ImageOps.exif_transpose(image)
            if not deep:
                return np.asarray(upright.convert("RGB"))
            grey = (np.asarray(upright).astype(np.uint32) * 255 + 32767) // 65535
            return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    except (UserError, MemoryError, ImportError):
        raise
    except UnidentifiedImageError as error:
        told = f"no {form} file, as its name says: restore or rename it" if form else f"none of {', '.join(_UNNAMED)}"
        raise UserError(f"{name}: cannot be decoded: it is {told}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: has more pixels than data.limits.image_pixels={most}; scale it down") from error
    except Exception as error:  # decoders raise whatever they like on damaged bytes
        raise UserError(f"{name}: cannot be decoded ({one_line(error)}); restore it") from error


def _format(source: bytes | Path, suffix: str | None, name: str) -> str | None:
    """Pillow's name of the format that a file's name says; None for bytes that have no name."""
    suffix = source.suffix if isinstance(source, Path) else suffix
    if suffix is not None and suffix.lower() not in IMAGES:
        raise UserError(f"{name}: is no image by its name; use one of {', '.join(IMAGES)}")
    return None if suffix is None else IMAGES[suffix.lower()]


def frame_pixels(
    frame: av.VideoFrame, aspect: Fraction | None, turn: Turn, *, name: str, most_pixels: int
) -> np.ndarray:
    """A decoded frame as it is meant to be shown; more than 8 bits per channel are scaled.

    Args:
        aspect: width over height of a stored pixel; None: square. The shorter side is stretched.
        turn: of `display_turn`.
        name: what errors call the video.
        most_pixels: of the picture that is shown.

    Raises:
        UserError: it has more pixels.
    """
    width, height = frame.width, frame.height
    if aspect and aspect != 1:
        width, height = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
    if width * height > most_pixels:
        raise UserError(
            f"{name}: is shown at {width}x{height}, more than data.limits.video_pixels={most_pixels}; scale it down or "
            "raise that"
        )
    return np.ascontiguousarray(turn(frame.to_ndarray(format="rgb24", width=width, height=height)))


def display_turn(frame: av.VideoFrame, *, name: str) -> Turn:
    """How a frame's display matrix has it shown. PyAV keeps a frame that is asked for it, until Python looks for
    circles: ask one for all.

    Raises:
        UserError: at an angle that is no multiple of 90 degrees; `name` is what it calls the video.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    a, b, _, c, d = np.zeros(5) if data is None else np.frombuffer(data, np.int32)[:5].astype(np.float64)
    if not (scale := max(abs(a), abs(b), abs(c), abs(d))):
        return _TURNS[1, 0, 0, 1]
    turn = tuple(round(v) if abs(v - round(v)) < 1e-3 else None for v in np.array([a, b, c, d]) / scale)
    if turn not in _TURNS:
        raise UserError(
            f"{name}: its display matrix turns or shears the picture by no multiple of 90 degrees ({a:g} {b:g} {c:g} "
            f"{d:g}); write the picture as it is to be shown"
        )
    return _TURNS[turn]
