"""Values out of strangers' bytes: within bounds, or one line that says what is wrong."""

import json
import math
from decimal import Decimal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kairos_train.basics.errors import UserError
from kairos_train.basics.files import read_json
from kairos_train.basics.foreign_files import (
    finite,
    one_plain_line,
    parse_json,
    read_text,
    refuse_half_characters,
    shown,
    whole,
)

DEEP = "[" * 100_000
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.decimals(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (DEEP, "is nested deeper than 32"),
        (DEEP + "]" * 100_000, "is nested deeper than 32"),
        ('{"a":' * 33 + "1" + "}" * 33, "is nested deeper than 32"),
        (b"\xff\xfe\xff", "decode"),
        ("", "Expecting value"),
    ],
)
@pytest.mark.parametrize("kind", [str, bytes, memoryview])
def test_json_beyond_the_limits_is_refused(text, match, kind):
    if kind is str and isinstance(text, bytes):
        pytest.skip("only bytes have an encoding")
    data = text if kind is str else kind(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=match) as caught:
        parse_json(data)
    assert len(str(caught.value).splitlines()) == 1


def test_a_json_value_has_no_more_bytes_than_it_may():
    with pytest.raises(ValueError, match="has more than 101 bytes of JSON"):
        parse_json('"' + "x" * 100 + '"', most_bytes=101)
    assert parse_json('"' + "x" * 100 + '"', most_bytes=102) == "x" * 100


def test_json_within_the_limits_is_what_json_says():
    text = '{"a": [1, -2.5, "ü", null, true], "b": ' + "[" * 31 + "]" * 31 + "}"
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)
    assert parse_json("[[],[],[[]]]", depth=3) == [[], [], [[]]]
    with pytest.raises(ValueError, match="deeper than 2"):
        parse_json("[[],[],[[]]]", depth=2)
    assert parse_json(str(2**128)) == 2**128, "states of random generators are that long"


def test_numbers_of_hundreds_of_digits_are_what_other_readers_make_of_them():
    assert parse_json("1" * 400) == math.inf
    assert parse_json("-" + "1" * 5000) == -math.inf
    assert parse_json("1" + "0" * 100) == 1e100


@pytest.mark.parametrize(
    "value", [10**400, "1e999", math.nan, "nan", True, None, [], {}, "x", Decimal("NaN"), "1" * 400]
)
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(ValueError, match=r"^start is .*; it must be a number$") as caught:
        finite(value, "start")
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("value", [-1, 0.5, 2**63, 10**400, math.inf, True, "3", None, Decimal("0.5"), Decimal("NaN")])
def test_what_is_no_count_is_refused(value):
    with pytest.raises(ValueError, match=r"^length is .*; it must be a (whole )?number"):
        whole(value, "length")


def test_numbers_of_any_type_are_taken():
    assert [finite(v, "x") for v in (1, "1.5", Decimal("2.5"))] == [1.0, 1.5, 2.5]
    assert [whole(v, "x") for v in (0, 3.0, Decimal(4), 2**63 - 1)] == [0, 3, 4, 2**63 - 1]


def attempt(take, *given):
    """(what it gives, what it says against it)."""
    try:
        return take(*given), ""
    except ValueError as error:
        return None, str(error)


@settings(max_examples=50)
@given(st.binary(max_size=60) | st.text(max_size=60))
@example(b'"\\ud800"')
def test_any_bytes_give_a_value_or_one_line(data):
    value, fault = attempt(parse_json, data)
    assert "\n" not in fault
    json.dumps(value)


@settings(max_examples=50)
@given(VALUES)
@example(["x" * 10**6] * 10)
def test_any_value_is_a_number_a_count_or_refused_in_one_short_line(value):
    taken, faults = zip(*(attempt(take, value, "it") for take in (finite, whole)))
    assert all(fault.isprintable() and len(fault) < 700 for fault in (*faults, shown(value)))
    assert faults[0] or math.isfinite(taken[0])
    assert faults[1] or 0 <= taken[1] < 2**63


@settings(max_examples=50)
@given(st.text(st.characters()) | st.text(st.characters()).map(lambda text: 500 * text), st.integers(16, 40))
@example("x" * 10**6, 40)
def test_a_line_is_printable_and_no_longer_than_asked(text, most):
    line = one_plain_line(text, most)
    assert line.isprintable()
    assert len(line) <= most
    assert one_plain_line(line, most) == line
    assert text != " ".join(text.split()) or not text.isprintable() or len(text) > most or line == text


def test_half_characters_are_refused():
    refuse_half_characters("ü\U0001f600", "caption")
    with pytest.raises(ValueError, match=r"caption holds half a character \('\\ud800'\)"):
        refuse_half_characters("a\ud800", "caption")


def test_files_are_read_no_further_than_they_may_be_long(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(1 << 43)
    with pytest.raises(UserError, match=r"a\.json: has more than 16,000,000 bytes"):
        read_json(path, remedy="restore it")
    with pytest.raises(UserError, match=r"a\.json: has more than 100 bytes"):
        read_text(path, most_bytes=100)
    path.write_text(DEEP)
    with pytest.raises(UserError, match=r"a\.json: is not JSON \(is nested deeper than 32\); restore it"):
        read_json(path, remedy="restore it")
