"""What messages show of a value."""

from kairos_train.basics.errors import shown


def test_a_value_in_a_message_is_short_and_one_line():
    assert shown("a b") == shown("a b", most=3) == "a b"
    assert shown("x" * 100) == "x" * 80 + "…"
    assert shown("a\nb") == r"'a\nb'"
    assert shown(["a\nb"]) == r"['a\nb']"
    assert shown(10**5000) == "an integer of more than 4,300 digits"
