"""Signals and deadlines are noted, and the handlers of before come back."""

import os
import signal
import threading
from datetime import datetime

import pytest

from kairos_train.operations.stopping import CTRL_C, Requests


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["SIGUSR1", "SIGTERM"])
def test_a_signal_is_noted_and_the_first_one_is_named(number):
    with Requests() as requests:
        assert requests.why is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.why == signal.Signals(number).name


def test_ctrl_c_is_noted_and_said_and_the_second_ends_the_process_at_once(capfd):
    with Requests() as requests:
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.why == CTRL_C
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "once more ends the run at once" in capfd.readouterr().err


def test_the_handlers_of_before_come_back():
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with Requests():
        assert all(signal.getsignal(number) not in before for number in numbers)
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_profile_is_asked_for_without_stopping():
    asked = []
    with Requests(profile=lambda: asked.append(1)) as requests:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert requests.why is None
    assert asked == [1]


def test_the_deadline_is_met_with_its_margin():
    deadline = "2030-05-01T12:00:00"
    now = datetime.fromisoformat(deadline).timestamp() - 61
    requests = Requests(deadline=deadline, margin=60.0, clock=lambda: now)
    assert requests.why is None
    now += 1
    assert requests.why == f"train.deadline={deadline} is near"


def test_outside_of_the_main_thread_there_are_no_signals_but_a_deadline():
    found = []

    def elsewhere() -> None:
        with Requests(deadline="2000-01-01T00:00:00") as requests:
            found.append(requests.why)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == ["train.deadline=2000-01-01T00:00:00 is near"]
