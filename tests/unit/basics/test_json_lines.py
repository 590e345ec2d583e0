"""Lines of JSON as a kill, a full disk or a failing one leaves them."""

import os

import pytest

from kairos_train.basics.json_lines import has_step, parse_json_line, read_json_lines

GOOD = b'{"step": 1, "loss": NaN}\n{"step": 3}\n'
ODD = {
    "half a line": b'{"step": 2, "lo',
    "no UTF-8": b'{"step": 2, "text": "\xff"}',
    "null bytes": b'{"step": 2}' + 40 * b"\0",
    "another object": b'{"samples": 2}',
    "a step that is none": b'{"step": true}',
    "no object": b"[2]",
    "nested deep": b'{"step": 2, "a": ' + 200_000 * b"[",
    "a key twice": b'{"step": 2, "step": 4}',
    "a number of many digits": b'{"step": ' + 5000 * b"9" + b"}",
    "nothing": b"",
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_a_line_that_cannot_be_read_is_skipped_and_said(tmp_path, caplog, odd):
    path, (first, second) = tmp_path / "x.jsonl", GOOD.splitlines(keepends=True)
    path.write_bytes(first + odd + b"\n" + second + odd + b"\n")
    lines = read_json_lines(path, has_step)
    assert [line.value["step"] for line in lines] == [1, 3]
    assert b"".join(line.text for line in lines) == GOOD, "to the byte"
    assert caplog.messages == [f"{path}: left out 2 lines that cannot be read"]


def test_a_last_line_that_is_being_written_is_nothing_to_speak_of(tmp_path, caplog):
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + b'{"step": 4, "lo')
    assert len(read_json_lines(path, has_step)) == 2
    path.write_bytes(GOOD + b'{"step": 4}')
    assert read_json_lines(path, has_step)[-1] == (b'{"step": 4}\n', {"step": 4})
    assert read_json_lines(tmp_path / "absent", has_step) == []
    assert caplog.messages == []


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink(path.name, path)])
def test_a_file_that_cannot_be_read_has_no_lines_and_that_is_said(tmp_path, caplog, make):
    make(tmp_path / "x.jsonl")
    assert read_json_lines(tmp_path / "x.jsonl", has_step) == []
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path / 'x.jsonl'}: cannot be read (")


def test_one_line_is_read_as_many_are():
    assert parse_json_line(b'{"step": 4}', has_step) == (b'{"step": 4}\n', {"step": 4})
    assert parse_json_line(b'{"step": 4', has_step) is None
