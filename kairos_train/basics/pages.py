"""Pieces of HTML pages that fetch nothing: no script, and images inside unless they are named by file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kairos_train.basics.format import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 74rem; padding: 0 1rem; color: #1c2430; }
h1 { font-size: 1.35rem; overflow-wrap: anywhere; margin-bottom: 0.2rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
h3 { font-size: 0.95rem; margin: 1rem 0 0.2rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 0.6rem 0; }
td, th { padding: 0.15rem 1rem 0.15rem 0; text-align: left; vertical-align: top; font-variant-numeric: tabular-nums; }
td { overflow-wrap: anywhere; } th { font-weight: 600; } tr { border-bottom: 1px solid #e6e9ee; }
img { max-width: 100%; height: auto; display: block; margin: 0.6rem 0; }
.wide { overflow-x: auto; } .note { color: #556; max-width: 52rem; margin: 0.2rem 0; } summary { cursor: pointer; }
"""
"""Of every page; each adds what it alone has."""


class Html(str):
    """Text that is HTML already. Any other is escaped: by `element`, by a page, and by being added to this."""

    def __add__(self, other: object) -> Html:
        return Html(str.__add__(self, escape(other)))


def page(title: str, sections: Iterable[str], *, style: str = "") -> str:
    """A whole page.

    Args:
        title: of the window, text.
        sections: HTML, or text, one below the other.
        style: CSS beside `STYLE`.
    """
    head = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    head += f"<title>{escape(title)}</title><style>{STYLE}{style}</style>"
    return f"{head}<body>{joined(sections)}</body></html>\n"


def escape(text: object) -> Html:
    """Text, or what is HTML already, as HTML."""
    return text if isinstance(text, Html) else Html(html.escape(str(text)))


def element(tag: str, *inside: object, attributes: str = "") -> Html:
    """An element with text and HTML inside.

    Args:
        attributes: of the tag, HTML.
    """
    return Html(f"<{tag}{attributes and f' {attributes}'}>{joined(inside)}</{tag}>")


def joined(pieces: Iterable[object]) -> Html:
    """Text and HTML one behind the other."""
    return Html("".join(map(escape, pieces)))


def note(text: str) -> Html:
    """A paragraph in grey."""
    return element("p", text, attributes='class="note"')


def table(
    rows: Iterable[Sequence[Any]], *, head: bool = True, marked: Mapping[tuple[int, int], str] | None = None
) -> Html:
    """A table.

    Args:
        rows: of cells: HTML, or text, numbers and None as `kairos_train.basics.format.number` shows them.
        head: the first row is the heading.
        marked: (row, column) → CSS class of cells.
    """
    lines, marked = [], marked or {}
    for i, row in enumerate(rows):
        tag = "th" if head and not i else "td"
        cells = (
            f"<{tag}{f' class={marked[i, j]}' if (i, j) in marked else ''}>"
            f"{escape(cell if isinstance(cell, Html) else number(cell))}</{tag}>"
            for j, cell in enumerate(row)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return Html(f'<div class="wide"><table>{"".join(lines)}</table></div>')


def image(content: bytes, about: str, *, kind: str = "png", attributes: str = "") -> Html:
    """An image inside the page.

    Args:
        content: of an image file.
        about: what it shows, text.
        kind: of the file: png, gif.
        attributes: further ones of the tag, HTML.
    """
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Html(f'<img {attributes} alt="{escape(about)}" src="{source}">')


def drawn(about: str, *figures: Figure | None, dots: int = 100) -> Html:
    """Figures inside the page, 100 pixels per inch; None is left out.

    Args:
        about: what they show, text.
        figures: one below the other.
        dots: of the image per inch, more for dense screens.
    """
    pieces = []
    for figure in filter(None, figures):
        width = f'width="{round(100 * figure.get_size_inches()[0])}"'
        pieces.append(image(png_of(figure, dots=dots), about, attributes=width))
    return Html("".join(pieces))


def png_of(figure: Figure, *, dots: int = 100) -> bytes:
    """A figure as a PNG file of `dots` pixels per inch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(content, format="png", dpi=dots)
    return content.getvalue()
