"""Checkpoints written behind a loop by one process; many ranks are in tests/distributed/test_sharded_checkpoint.py."""

import resource
import time
from pathlib import Path

import pytest
import torch
from support.killed_writer import kill_among_files

from kairos_train.basics.errors import MachineFault, UserError
from kairos_train.checkpoint.canonical import CheckpointReader, checkpoint_path, find_latest
from kairos_train.checkpoint.saver import CHUNK, HostCopy, Saver
from kairos_train.checkpoint.writing import Piece, publish, read_part, whole_pieces, write_part

NOTHING = {"own_state": {}, "state": {}, "files": {}}


def open_saver(parent: Path, **kwargs) -> Saver:
    return Saver(parent, rank=0, size=1, **kwargs)


def test_what_changes_after_the_save_is_not_in_it(tmp_path):
    """Large enough for the writing to take a while; the second save uses the same host memory again."""
    saver, weight, half = open_saver(tmp_path), torch.zeros(2000, 1000), torch.zeros(3, dtype=torch.bfloat16)
    for step in (1, 2):
        weight.fill_(step), half.fill_(step)
        assert saver.settle() is None
        saver.save(step, {"model": whole_pieces({"w": weight, "h": half})}, **NOTHING)
        weight.fill_(-1), half.fill_(-1)
    saver.close()
    for step in (1, 2):
        read = CheckpointReader(checkpoint_path(tmp_path, step)).read_section("model")
        assert (read["w"] == step).all()
        assert (read["h"] == step).all()
        assert read["h"].dtype == torch.bfloat16


def test_host_memory_is_taken_once(tmp_path):
    host = HostCopy()
    large = {"a": torch.ones(CHUNK // 4 + 1), "b": torch.ones(5, 3), "c": torch.ones(7)}
    first = host.take({"model": whole_pieces(large)})["model"]
    again = host.take({"model": whole_pieces({name: 2 * t for name, t in large.items()})})["model"]
    assert [p.tensor.data_ptr() for p in first] == [p.tensor.data_ptr() for p in again]
    assert all((p.tensor == 2).all() and p.tensor.shape == large[p.name].shape for p in again)


def test_the_callback_comes_after_each_checkpoint_has_its_name(tmp_path):
    seen = []
    saver = open_saver(tmp_path, published=lambda: seen.append(sorted(p.name for p in tmp_path.iterdir())))
    for step in (1, 2):
        saver.save(step, {"model": whole_pieces({"w": torch.ones(2)})}, **NOTHING)
        assert saver.settle() is None
    assert seen == [["step-00000001"], ["step-00000001", "step-00000002"]]


SECTION = {"model": whole_pieces({"w": torch.ones(2)})}


def settle(saver: Saver) -> str:
    """As a loop does, once it sees that the save has failed."""
    deadline = time.monotonic() + 20
    while not saver.failed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return saver.settle()


def close(saver: Saver) -> str:
    with pytest.raises(MachineFault) as error:
        saver.close()
    return str(error.value)


@pytest.mark.parametrize("ask", [settle, Saver.settle, close])
def test_a_failure_of_the_thread_is_told_once_and_the_next_save_may_come(tmp_path, ask):
    parent = tmp_path / "checkpoints"
    saver = open_saver(parent)
    parent.write_text("a file where the folder should be")
    saver.save(1, SECTION, **NOTHING)
    problem = ask(saver)
    assert "step-00000001: rank 0 could not write its part" in problem
    assert "\n" not in problem
    parent.unlink()
    saver.save(2, SECTION, **NOTHING)
    assert saver.settle() is None
    assert [path.name for path in parent.iterdir()] == ["step-00000002"]


def test_what_failed_saves_have_left_is_removed(tmp_path):
    """It would fill the disk that is full already."""
    saver = open_saver(tmp_path)
    (tmp_path / ".tmp-step-00000001-of-another-rank").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        saver.save(1, {"model": whole_pieces({"w": torch.zeros(5000)})}, **NOTHING)
        assert "File too large" in saver.settle()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_what_is_not_a_disks_fault_keeps_its_exception(tmp_path):
    saver = open_saver(tmp_path)
    saver.save(1, SECTION, **NOTHING)
    assert saver.settle() is None
    saver.save(1, {"model": whole_pieces({"w": torch.zeros(2)})}, **NOTHING)
    with pytest.raises(UserError, match="exists with other content"):
        saver.settle()
    saver.save(3, SECTION, **{**NOTHING, "state": {"loss": float("nan")}})
    with pytest.raises(ValueError, match="JSON"):
        saver.settle()


def test_a_save_in_flight_is_not_overtaken(tmp_path):
    saver = open_saver(tmp_path)
    saver.save(1, SECTION, **NOTHING)
    with pytest.raises(RuntimeError, match="settle it first"):
        saver.save(2, SECTION, **NOTHING)
    saver.close()


def test_a_run_that_fails_waits_for_its_checkpoint_and_keeps_its_own_error(tmp_path):
    saver = open_saver(tmp_path / "good")
    saver.save(1, {"model": whole_pieces({"w": torch.ones(1000, 1000)})}, **NOTHING)
    saver.close(failed=True)
    assert find_latest(tmp_path / "good", deep=True)[0] == checkpoint_path(tmp_path / "good", 1)
    saver = open_saver(tmp_path / "bad")
    saver.save(1, {"model": whole_pieces({"w": torch.ones(1)})}, **{**NOTHING, "state": {"loss": float("nan")}})
    saver.close(failed=True)
    assert not list((tmp_path / "bad").iterdir())


def test_parts_that_leave_a_hole_or_disagree_are_not_published(tmp_path):
    x = torch.arange(12.0).view(4, 3)
    first, second = Piece("w", (4, 3), (0, 0), x[:2]), Piece("w", (4, 3), (2, 0), x[2:])
    for number, (ranks, match) in enumerate(
        [
            ([[first], []], "do not tile"),
            ([[first], [first]], "do not tile"),
            ([[first], [Piece("w", (4, 3), (2, 0), x[2:].double())]], "different tensors"),
        ]
    ):
        folder = tmp_path / f".tmp-{number}"
        folder.mkdir()
        parts = [write_part(folder, rank, {"model": pieces}) for rank, pieces in enumerate(ranks)]
        with pytest.raises((UserError, ValueError), match=match):
            publish(folder, checkpoint_path(tmp_path, number), parts, state={}, files={})
    assert find_latest(tmp_path) == (None, [])
    folder = tmp_path / ".tmp-good"
    folder.mkdir()
    parts = [write_part(folder, rank, {"model": [piece]}) for rank, piece in enumerate([first, second])]
    publish(folder, checkpoint_path(tmp_path, 9), parts, state={}, files={})
    assert torch.equal(CheckpointReader(checkpoint_path(tmp_path, 9)).read("model", "w"), x)


WRITER = """
import sys, torch
from kairos_train.checkpoint.saver import Saver
from kairos_train.checkpoint.writing import whole_pieces
saver = Saver(sys.argv[1], rank=0, size=1, file_bytes=2**20)
sections = {"model": whole_pieces({f"w{i}": torch.full((256, 1024), float(i)) for i in range(400)})}
print("ready", flush=True)
saver.save(2, sections, own_state={}, state={}, files={})
saver.close()
"""


def test_a_process_killed_between_two_files_leaves_no_checkpoint_and_the_next_run_cleans_up(tmp_path):
    saver = open_saver(tmp_path)
    saver.save(1, {"model": whole_pieces({"w": torch.ones(3)})}, **NOTHING)
    saver.close()
    kill_among_files(WRITER, tmp_path, after=5)  # of 400
    (left,) = tmp_path.glob(".tmp-*")
    assert read_part(left, 0) is None
    assert find_latest(tmp_path, deep=True) == (checkpoint_path(tmp_path, 1), [])
    open_saver(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
