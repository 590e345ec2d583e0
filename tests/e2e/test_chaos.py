"""A run of four processes through faults comes out as the one that was left alone. `benchmarks/chaos.py` has more."""

import os
import random
import signal
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from chaos_parts.compare import compare_runs  # noqa: E402
from chaos_parts.faults import RANKS, Attempt, finish, run_with_faults, small_disk, steps_done  # noqa: E402
from chaos_parts.pack import make_shards  # noqa: E402

from kairos_train.operations.events import read_events  # noqa: E402

pytestmark = pytest.mark.slow

SEED = 11
STEPS = 16  # a checkpoint is due every 4
FAULTS = ["kill_rank", "disk_full", "stop_rank", "corrupt"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A dataset, and `reference`: the run that is left alone."""
    folder = tmp_path_factory.mktemp("chaos")
    make_shards(folder)
    finish(folder / "reference", settings(folder))
    return folder


def settings(home: Path) -> list[str]:
    return [f"data.shards={home / 'shards'}", f"train.steps={STEPS}"]


def test_faults_leave_no_trace_in_losses_weights_and_samples(home):
    rng = random.Random(SEED)
    with small_disk(home / "disk") as mounted:
        kinds = FAULTS if mounted else ["kill_in_save" if kind == "disk_full" else kind for kind in FAULTS]
        run_dir = home / "disk" / "run"
        outcomes = run_with_faults(run_dir, settings(home), kinds, rng, steps=STEPS)
        compared = compare_runs(run_dir, home / "reference")
        events = read_events(run_dir)
    assert compared.identical, compared
    assert (compared.lost, compared.repeated, compared.leftovers) == (0, 0, [])
    assert [outcome.kind for outcome in outcomes] == kinds
    by_kind = {outcome.kind: outcome for outcome in outcomes}
    for kind in ("kill_rank", "stop_rank"):
        assert by_kind[kind].named, "every survivor names the rank that is lost"
        assert by_kind[kind].detected < 60
        assert sorted(by_kind[kind].exit_codes) == [-signal.SIGKILL, 4, 4, 4]
    assert any(event["kind"] == "passed_over" for event in events), "the damaged checkpoint is told of"
    if mounted:
        assert any("No space left" in event.get("error", "") + event.get("text", "") for event in events) or any(
            code == 4 for code in by_kind["disk_full"].exit_codes
        )


def test_a_signal_to_one_rank_saves_all_and_the_second_life_ends_as_if_nothing_had_been(home):
    run_dir = home / "asked"
    life = Attempt(run_dir, settings(home))
    assert life.wait_for(lambda: steps_done(run_dir) >= 7)
    os.kill(life.ranks[2].pid, signal.SIGUSR1)
    assert life.wait() == [75] * RANKS
    (stop,) = [event for event in read_events(run_dir) if event["kind"] == "stop"]
    assert stop["outcome"] == "interrupted"
    assert "SIGUSR1" in stop["text"]
    assert (run_dir / "checkpoints" / f"step-{stop['step']:08d}").is_dir()
    finish(run_dir, settings(home))
    compared = compare_runs(run_dir, home / "reference")
    assert (compared.identical, compared.lost, compared.repeated, compared.leftovers) == (True, 0, 0, [])
