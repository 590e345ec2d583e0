"""Pieces of HTML pages: what is escaped, what is shown, and how numbers read."""

import io
from html.parser import HTMLParser

from matplotlib.figure import Figure
from PIL import Image

from kairos_train.basics.format import number
from kairos_train.basics.pages import Html, drawn, element, escape, image, joined, note, page, png_of, table


class Read(HTMLParser):
    """[(tag, attributes)] and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


HOSTILE = '<script>alert("&")</script>'


def test_text_is_shown_as_it_is_wherever_it_stands():
    body = [table([[HOSTILE], [HOSTILE]]), note(HOSTILE), image(b"x", HOSTILE), element("p", HOSTILE), HOSTILE]
    body += [f"<p>{HOSTILE}</p>", Html("<br>") + HOSTILE, joined([HOSTILE])]
    read = Read(page(HOSTILE, body))
    assert "script" not in [tag for tag, _ in read.tags]
    assert sum(words.count(HOSTILE) for words in read.words) == 9
    assert [attributes["alt"] for tag, attributes in read.tags if tag == "img"] == [HOSTILE]


def test_what_is_html_already_is_not_escaped_again():
    assert "<td><b>1</b></td>" in table([["a"], [Html("<b>1</b>")]])
    assert escape(escape("a < b")) == "a &lt; b"


def test_a_table_has_a_heading_unless_told_otherwise_and_marks_cells():
    cells = [tag for tag, _ in Read(table([["a", "b"], [1, 2]])).tags if tag in ("td", "th")]
    assert cells == ["th", "th", "td", "td"]
    assert "<th" not in table([["a", "b"], [1, 2]], head=False)
    assert table([["a"], ["b"], ["c"]], marked={(1, 0): "other"}).count("<td class=other>b</td>") == 1


def test_cells_read_as_numbers():
    row = [None, 0.123456, 12345.678, 12345, True, float("nan"), "12345"]
    assert [number(cell) for cell in row] == ["–", "0.1235", "1.235e+04", "12,345", "True", "nan", "12345"]
    assert Read(table([row], head=False)).words == [number(cell) for cell in row]


def test_figures_are_drawn_dense_and_shown_at_their_size():
    figure = Figure(figsize=(3, 2))
    assert Image.open(io.BytesIO(png_of(figure, dots=50))).size == (150, 100)
    ((tag, attributes),) = Read(drawn("a figure", None, figure, dots=200)).tags
    assert (tag, attributes["width"], attributes["alt"]) == ("img", "300", "a figure")
    assert attributes["src"].startswith("data:image/png;base64,")
    assert drawn("nothing", None) == ""


def test_a_page_has_its_own_style_beside_the_common_one():
    text = page("title", [], style=".mine { color: red; }")
    assert ".mine { color: red; }" in text
    assert "body {" in text
    assert text.startswith("<!doctype html>")
