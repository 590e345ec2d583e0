"""No message holds what a URL keeps secret."""

import logging
import pickle

import pytest

from kairos_train.basics.errors import EXIT_CODES, one_line
from kairos_train.basics.log import log_to_stderr, logger
from kairos_train.basics.secrets import redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://u:SECRET@h/a.tar?sig=SECRET: cannot be read", "https://h/a.tar: cannot be read"),
        ("path 'https://h/a?x=SE,CRET=SECRET' (bad)", "path 'https://h/a' (bad)"),
        ("(https://h/a?x=SECRET); give", "(https://h/a); give"),
        ("zip://a::https://u:SECRET@h/x?y=SECRET::file:///x?SECRET", "zip://a::https://h/x"),
        ("https:/u:SECRET@h/x?SECRET", "https:/h/x"),
        ('{"a": "s3://K:SECRET@b/k?S#SECRET"}', '{"a": "s3://b/k"}'),
        ("https://u:SE@CRET@h:8000/x#SECRET", "https://h:8000/x"),
        ("https://u:SECRET@h", "https://h"),
        ("two: https://h/x?SECRET and https://SECRET@h/y", "two: https://h/x and https://h/y"),
    ],
)
def test_a_login_and_a_query_are_cut_out(text, shown):
    assert redacted(text) == shown == redacted(shown)


@pytest.mark.parametrize("text", ["a@b?c", "really? yes@home", "data.shards=/a/b?c", "https://h/x.mp4", "12:30?"])
def test_other_text_stays(text):
    assert redacted(text) == text


@pytest.mark.parametrize("kind", EXIT_CODES)
def test_errors_hold_no_secret_in_any_process(kind):
    # Loader processes send their errors by pickle, which makes them anew from their arguments.
    error = kind("https://h/a?sig=SECRET: is bad")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "https://h/a: is bad"
    assert one_line(OSError("https://u:SECRET@h\nis bad")) == "https://h is bad"


def test_logs_hold_no_secret(capsys, monkeypatch):
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    log_to_stderr()
    logger.log(logging.WARNING, "reading %s", "https://u:SECRET@h/a?SECRET")
    assert capsys.readouterr().err == "reading https://h/a\n"
