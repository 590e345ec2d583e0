"""Findings -> one HTML page with a contact sheet and histograms as PNG beside it, and report.json.

The pictures are of their own: the page has no script and fetches nothing.
"""

from __future__ import annotations

import html
import json
import textwrap
from pathlib import Path

import numpy as np

from dataloaders.packing.findings import Findings, Strip, Vector

SHEET, REPORT, PAGE = "contact_sheet.png", "report.json", "index.html"
_HEIGHT, _GAP, _MARGIN, _LINE = 96, 4, 12, 14
_DIMENSIONS = 64  # most dimensions that are drawn
_BINS = 40

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1c2430; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: 0.9rem; } td, th { padding: 0.15rem 0.8rem 0.15rem 0; text-align: left; }
th { color: #667; font-weight: 600; } tr { border-bottom: 1px solid #e6e9ee; } td { overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; display: block; } .wide { overflow-x: auto; max-height: 30rem; }
"""


def write_page(findings: Findings, folder: Path) -> None:
    """Write everything into `folder`."""
    parts = [f"<h1>{html.escape(findings.title)}</h1>", _table([[k, v] for k, v in findings.facts], head=False)]
    if findings.strips:
        _contact_sheet(findings.strips).save(folder / SHEET)
        parts.append(
            f'<h2>Samples</h2><div class="wide" style="max-height:none"><img src="{SHEET}" alt="samples"></div>'
        )
    for vector in findings.vectors:
        name = f"{vector.name}s.png"
        _histograms(vector, folder / name)
        title = f"{vector.name.capitalize()}s ({vector.of})"
        parts.append(f'<h2>{html.escape(title)}</h2><img src="{name}" alt="histograms of {vector.name}s">')
    for title, rows in findings.tables.items():
        parts.append(f'<h2>{html.escape(title.capitalize())}</h2><div class="wide">{_table(rows)}</div>')
    page = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    page += f"<title>{html.escape(findings.title)}</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    (folder / PAGE).write_text(page, encoding="utf-8")
    report = {"title": findings.title, "facts": findings.facts, "tables": findings.tables}
    report["vectors"] = [{"name": v.name, "low": v.low, "high": v.high, "of": v.of} for v in findings.vectors]
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _table(rows: list[list[str]], *, head: bool = True) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    first = [line(rows[0], "th")] if head and rows else []
    return f"<table>{''.join([*first, *(line(row, 'td') for row in rows[len(first) :])])}</table>"


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dims = min(vector.values.shape[1], _DIMENSIONS)
    columns = min(dims, 6)
    rows = -(-dims // columns)
    figure = Figure(figsize=(2.1 * columns, 1.5 * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    for d in range(dims):
        axes = figure.add_subplot(rows, columns, d + 1)
        low, high = vector.low[d], vector.high[d]
        axes.set_title(f"{d}", fontsize=8, loc="left", pad=2)
        axes.set_yticks([])
        if high - low < 1e-4:
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
    figure.savefig(path, dpi=110)
