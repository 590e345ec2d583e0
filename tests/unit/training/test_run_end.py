"""How a run ends: what is around it learns of the error that ends it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from kairos_train.basics.errors import Interrupted, MachineFault
from kairos_train.config.operation_schema import WatchConfig
from kairos_train.operations.events import EventLog, read_events
from kairos_train.operations.watch.liveness import Liveness
from kairos_train.operations.watch.members import this_member
from kairos_train.training.run import Run


class Ending(Run):
    """A run with nothing in it."""

    step = 7

    def close(self, *, failed: bool = False) -> None:
        pass


@pytest.fixture
def ended(tmp_path):
    """`ended(error)`: what the context around a run sees when the run ends by an error."""
    seen = []

    @contextmanager
    def around() -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            seen.append(error)
            raise
        seen.append(None)

    def end(error: BaseException | None) -> list[BaseException | None]:
        run = object.__new__(Ending)
        run.outer = ExitStack()
        run.outer.enter_context(around())
        run.events = EventLog(tmp_path, life=1, enabled=True)
        run.watch = Liveness(WatchConfig(), roster=[this_member(0)], rank=0, store=None, stacks=tmp_path / "stacks")
        if error is None:
            with run:
                pass
        else:
            with pytest.raises(type(error)) as raised, run:
                raise error
            assert raised.value is error
        return seen

    return end


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (MachineFault("data: no batch within 6 s"), "fault"),
        (ValueError("the tape ran out"), "error"),
        (Interrupted("SIGTERM"), "interrupted"),
        (None, "finished"),
    ],
)
def test_the_watch_around_a_run_learns_by_what_it_ends(ended, tmp_path, error, outcome):
    """It tells the other ranks, which would wait for this one otherwise."""
    assert ended(error) == [error]
    (event,) = read_events(tmp_path)
    assert (event["kind"], event["outcome"], event["step"]) == ("stop", outcome, 7)
