"""Pictures of predictions: PIL for frames, matplotlib figures without pyplot (no display, no global state).

Frames are uint8 RGB, channels last: T frames, H height, W width. A actions, D action dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from kairos_train.basics.files import replacing, write_whole
from kairos_train.basics.pages import png_of

GAP = 4  # pixels between pictures; even, because H.264 wants even sizes
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Join two clips (T, H, W, 3) with a white bar: (T, H, W_left + GAP + W_right, 3)."""
    bar = np.full((*left.shape[:2], GAP, 3), 255, dtype=np.uint8)
    return np.concatenate([left, bar, right], axis=2)


def contact_sheet(path: Path, rows: Mapping[str, np.ndarray], *, title: str, columns: int = 9) -> None:
    """Write a PNG with one labelled row of frames per clip.

    Args:
        path: the PNG.
        rows: label → clip (T, H, W, 3); all of one shape.
        title: drawn above, cut to the sheet's width.
        columns: most frames of a row; longer clips are thinned out evenly, first and last kept.
    """
    frames, height, width, _ = next(iter(rows.values())).shape
    shown = np.unique(np.linspace(0, frames - 1, min(frames, columns)).round().astype(int))
    font = ImageFont.load_default(size=12)
    line, margin = 16, int(max(font.getlength(label) for label in rows)) + 2 * GAP
    size = (margin + len(shown) * (width + GAP), 2 * line + len(rows) * (height + GAP))
    sheet = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 1), title, fill=BLACK, font=font)
    for column, frame in enumerate(shown):
        x = margin + column * (width + GAP)
        draw.text((x, line), str(frame), fill=BLACK, font=font)
        for row, clip in enumerate(rows.values()):
            sheet.paste(Image.fromarray(clip[frame]), (x, 2 * line + row * (height + GAP)))
    for row, label in enumerate(rows):
        draw.text((GAP, 2 * line + row * (height + GAP) + height // 2 - line // 2), label, fill=BLACK, font=font)
    with replacing(path) as part:
        sheet.save(part, format="PNG")


def action_curves(
    path: Path,
    *,
    predicted: np.ndarray,
    recorded: np.ndarray,
    valid: np.ndarray,
    title: str,
    names: Sequence[str] | None = None,
) -> None:
    """Write a PNG with one panel per action dimension, predicted beside recorded.

    Args:
        path: the PNG.
        predicted: (A, D), raw units.
        recorded: (A, D), raw units.
        valid: (A,) bool; padded steps are not drawn.
        title: above the panels.
        names: of the dimensions; None numbers them.
    """
    horizon, dims = predicted.shape
    columns = min(dims, 4)
    rows = -(-dims // columns)
    figure = Figure(figsize=(3.2 * columns, 0.5 + 2.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    steps = np.arange(horizon)[valid]
    for dim, axis in enumerate(axes[:dims]):
        axis.plot(steps, recorded[valid, dim], color="black", marker=".", label="recorded")
        axis.plot(steps, predicted[valid, dim], color="tab:orange", marker=".", label="predicted")
        axis.set_title(names[dim] if names else f"action {dim}", fontsize=9)
    for axis in axes[dims:]:
        axis.set_visible(False)
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


def horizon_errors(path: Path, curves: Mapping[str, Sequence[float | None]], *, title: str) -> None:
    """Write a PNG of the error at each step of the chunk, one curve per predictor; None leaves a gap."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, values in curves.items():
        axis.plot([np.nan if v is None else v for v in values], marker=".", label=name)
    axis.set_xlabel("step of the chunk")
    axis.set_ylabel("mean squared error, normalised units")
    axis.set_ylim(bottom=0)
    axis.legend()
    axis.set_title(title, fontsize=9)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG."""
    write_whole(path, png_of(figure))
