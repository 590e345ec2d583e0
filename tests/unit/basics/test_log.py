"""The one logger: which ranks it shows, and where."""

import logging

import pytest

from kairos_train.basics.log import log_to_stderr, logger


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    kept = logger.handlers[:], logger.level, logger.propagate
    logger.handlers.clear()
    yield
    logger.handlers[:], logger.level, logger.propagate = kept
    logger.setLevel(kept[1])  # forgets which levels it had found enabled


def test_lines_are_shown_once_as_they_are_however_often_a_program_asks(capsys):
    root = logging.StreamHandler()
    logging.getLogger().addHandler(root)  # as some libraries do when they are imported
    try:
        log_to_stderr()
        log_to_stderr()
        logger.info("100 % of 3 steps")
    finally:
        logging.getLogger().removeHandler(root)
    assert capsys.readouterr() == ("", "100 % of 3 steps\n")


def test_lines_are_shown_beside_another_handler(capsys):
    logger.addHandler(logging.NullHandler())
    log_to_stderr()
    logger.info("step 1")
    assert capsys.readouterr().err == "step 1\n"


def test_other_ranks_show_warnings_alone(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    log_to_stderr()
    logger.info("step 1")
    logger.warning("the disk is full")
    assert capsys.readouterr().err == "the disk is full\n"


def test_a_server_dates_its_lines(capsys):
    log_to_stderr()
    log_to_stderr(dated=True)
    logger.getChild("part").warning("a connection failed")
    line = capsys.readouterr().err
    assert line.endswith(" WARNING a connection failed\n")
    assert line[:2] == "20"


def test_a_closed_stderr_does_not_end_the_program(monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

        flush = write

    log_to_stderr()
    monkeypatch.setattr("sys.stderr", Closed())
    logger.info("step 1")
