"""Findings -> one HTML page with a contact sheet and histograms as PNG beside it, and report.json.

The pictures are of their own: the page has no script and fetches nothing.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np

from dataloaders.config import MIN_RANGE
from dataloaders.packing.findings import Findings, Strip, Vector
from kairos_train.basics.files import write_json
from kairos_train.basics.pages import Html, element, escape, page, png_of, table

SHEET, REPORT, PAGE = "contact_sheet.png", "report.json", "index.html"
_HEIGHT, _GAP, _MARGIN, _LINE = 96, 4, 12, 14
_DIMENSIONS = 64  # most dimensions that are drawn
_BINS = 40

_STYLE = ".wide { max-height: 30rem; } .sheet { overflow-x: auto; }"


def write_page(findings: Findings, folder: Path) -> None:
    """Write everything into `folder`."""
    parts = [element("h1", findings.title), table(findings.facts, head=False)]
    if findings.strips:
        _contact_sheet(findings.strips).save(folder / SHEET)
        sheet = Html(f'<div class="sheet"><img src="{SHEET}" alt="samples"></div>')
        parts.append(element("h2", "Samples") + sheet)
    for vector in findings.vectors:
        name = f"{vector.name}s.png"
        _histograms(vector, folder / name)
        title = f"{vector.name.capitalize()}s ({vector.of})"
        histograms = Html(f'<img src="{escape(name)}" alt="histograms of {escape(vector.name)}s">')
        parts.append(element("h2", title) + histograms)
    for title, rows in findings.tables.items():
        parts.append(element("h2", title.capitalize()) + table(rows))
    (folder / PAGE).write_text(page(findings.title, parts, style=_STYLE), encoding="utf-8")
    report = {"title": findings.title, "facts": findings.facts, "tables": findings.tables}
    report["vectors"] = [{"name": v.name, "low": v.low, "high": v.high, "of": v.of} for v in findings.vectors]
    write_json(folder / REPORT, report, sort_keys=False)


def _contact_sheet(strips: list[Strip]):
    """One row of pictures per strip, its label and text above them."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=12)
    rows = []
    for strip in strips:
        pictures = [_scaled(picture) for picture in strip.pictures]
        width = sum(p.width + _GAP for p in pictures) - _GAP
        chars = max(width // 7, 60)
        lines = [strip.label, *textwrap.wrap(strip.text, chars)[:3]]
        row = Image.new("RGB", (max(width, chars * 7), len(lines) * _LINE + _GAP + _HEIGHT), "white")
        draw = ImageDraw.Draw(row)
        for i, line in enumerate(lines):
            draw.text((0, i * _LINE), line, fill="#667080" if i == 0 else "#1c2430", font=font)
        left = 0
        for picture in pictures:
            row.paste(picture, (left, len(lines) * _LINE + _GAP))
            left += picture.width + _GAP
        rows.append(row)
    size = (max(r.width for r in rows) + 2 * _MARGIN, sum(r.height + _MARGIN for r in rows) + _MARGIN)
    sheet, top = Image.new("RGB", size, "white"), _MARGIN
    for row in rows:
        sheet.paste(row, (_MARGIN, top))
        top += row.height + _MARGIN
    return sheet


def _scaled(picture: np.ndarray):
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(picture))
    return image.resize((max(round(image.width * _HEIGHT / image.height), 1), _HEIGHT), Image.Resampling.BICUBIC)


def _histograms(vector: Vector, path: Path) -> None:
    """A small histogram for every dimension."""
    from matplotlib.figure import Figure

    dims = min(vector.values.shape[1], _DIMENSIONS)
    columns = min(dims, 6)
    rows = -(-dims // columns)
    figure = Figure(figsize=(2.1 * columns, 1.5 * rows + 0.3), layout="constrained")
    for d in range(dims):
        axes = figure.add_subplot(rows, columns, d + 1)
        low, high = vector.low[d], vector.high[d]
        axes.set_title(f"{d}", fontsize=8, loc="left", pad=2)
        axes.set_yticks([])
        if high - low < MIN_RANGE:
            axes.axvline(0, color="#a9b3bf", linewidth=4)
            axes.set_xlim(-1, 1)
            axes.set_xticks([0], [f"always {low:.3g}"], fontsize=7)
        else:
            counts, edges = np.histogram(vector.values[:, d], bins=_BINS, range=(low, high))
            axes.stairs(counts, edges, fill=True, color="#3b6ea5")  # one shape instead of a bar per bin
            axes.set_xlim(low, high)
            axes.set_xticks([low, high], [f"{low:.3g}", f"{high:.3g}"], fontsize=7)
            for label, side in zip(axes.get_xticklabels(), ("left", "right")):
                label.set_horizontalalignment(side)
        for side in ("top", "left", "right"):
            axes.spines[side].set_visible(False)
    more = vector.values.shape[1] - dims
    if more:
        figure.suptitle(f"{more} further dimensions are not drawn", fontsize=8)
    path.write_bytes(png_of(figure, dots=110))
