"""A run of several processes through faults comes out as the one left alone. `benchmarks/chaos.py` has more."""

import os
import random
import signal
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from chaos_parts.attempt import Attempt, finish, steps_done  # noqa: E402
from chaos_parts.compare import compare_runs  # noqa: E402
from chaos_parts.faults import KINDS, run_with_faults, small_disk  # noqa: E402
from chaos_parts.pack import make_shards  # noqa: E402

from kairos_train.operations.events import read_events  # noqa: E402

pytestmark = pytest.mark.slow

FAULTS = ["kill_rank", "kill_in_save", "disk_full", "corrupt"]
STEPS = {2: 16, 4: 24}
"""Ranks → steps of the run; a checkpoint is due every 4."""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a dataset."""
    folder = tmp_path_factory.mktemp("chaos")
    make_shards(folder)
    return folder


@pytest.fixture(scope="module")
def reference(home):
    """Ranks → the folder of a run that is left alone."""
    made = {}

    def run(ranks: int) -> Path:
        if ranks not in made:
            finish(begin(home, "reference", ranks))
            made[ranks] = home / f"reference-{ranks}"
        return made[ranks]

    return run


def begin(home: Path, name: str, ranks: int) -> Attempt:
    """Slow in its steps, so that a fault comes before its end however late this process is scheduled."""
    slow = f"faults.inject=[{{kind: slow, step: 1, steps: {STEPS[ranks]}, seconds: 0.2}}]"
    settings = [f"data.shards={home / 'shards'}", f"train.steps={STEPS[ranks]}", slow]
    settings += ["data.timeout=60"] if ranks == 2 else []  # no loader is stopped there, and much else may be running
    return Attempt(home / f"{name}-{ranks}", settings, ranks=ranks)


@pytest.mark.parametrize(
    ("ranks", "faults", "seed"),
    [(2, FAULTS, 11), *(pytest.param(4, [*KINDS], seed, marks=pytest.mark.nightly) for seed in (11, 12))],
)
def test_faults_leave_no_trace_in_losses_weights_and_samples(home, reference, ranks, faults, seed):
    rng = random.Random(seed)
    with small_disk(home / "disk") as mounted:
        kinds = faults if mounted else [kind for kind in faults if kind != "disk_full"]
        life = begin(home, "disk/run", ranks)
        outcomes = run_with_faults(life, kinds, rng, steps=STEPS[ranks])
        compared = compare_runs(life.run_dir, reference(ranks))
        events = read_events(life.run_dir)
    assert compared.identical, compared
    assert (compared.lost, compared.repeated, compared.leftovers) == (0, 0, [])
    assert [outcome.kind for outcome in outcomes] == kinds
    by_kind = {outcome.kind: outcome for outcome in outcomes}
    assert all(outcome.named is not False for outcome in outcomes), "every survivor names the rank that is lost"
    for kind in {"kill_rank", "stop_rank"} & by_kind.keys():
        assert sorted(by_kind[kind].exit_codes) == [-signal.SIGKILL] + [4] * (ranks - 1)
    assert any(event["kind"] == "passed_over" for event in events), "the damaged checkpoint is told of"
    if "stop_worker" in by_kind:
        assert by_kind["stop_worker"].exit_codes == [4] * ranks
    if mounted:
        assert any("No space left" in event.get("error", "") + event.get("text", "") for event in events) or any(
            code == 4 for code in by_kind["disk_full"].exit_codes
        )


def test_a_signal_to_one_rank_saves_all_and_the_second_life_ends_as_if_nothing_had_been(home, reference):
    life = begin(home, "asked", 2)
    assert life.wait_for(lambda: steps_done(life.run_dir) >= 7)
    os.kill(life.ranks[1].pid, signal.SIGUSR1)
    assert life.wait() == [75, 75]
    (stop,) = [event for event in read_events(life.run_dir) if event["kind"] == "stop"]
    assert stop["outcome"] == "interrupted"
    assert "SIGUSR1" in stop["text"]
    assert (life.run_dir / "checkpoints" / f"step-{stop['step']:08d}").is_dir()
    finish(life.again())
    compared = compare_runs(life.run_dir, reference(2))
    assert (compared.identical, compared.lost, compared.repeated, compared.leftovers) == (True, 0, 0, [])
