"""All ranks come to one verdict on configuration, versions and room before a run starts, and on their health."""

import pytest
from support import agreement_ranks
from support.pool import Pool


def test_ranks_that_agree_are_told_their_versions(world, tmp_path):
    found = world(3).run(agreement_ranks.agreed, str(tmp_path / "run"), [[]] * 3, checkpoint_bytes=1000)
    assert found[0] == found[1] == found[2]
    assert {"python", "torch", "kairos-train", "code", "deepspeed", "megatron-core", "cuda driver"} <= found[0].keys()


def test_the_first_setting_that_differs_is_named_on_every_rank(world, tmp_path):
    overrides = [[], ["optimizer.betas=[0.9,0.9]"], []]
    found = world(3).run(agreement_ranks.agreed, str(tmp_path / "run"), overrides, checkpoint_bytes=1000)
    assert found[0] == found[1] == found[2]
    kind, line = found[0]
    assert kind == "UserError"
    assert line.startswith("optimizer.betas.1 is 0.95 on ranks 0, 2 (")
    assert ") and 0.9 on rank 1 (" in line
    assert "\n" not in line


def test_a_version_that_differs_is_named_on_every_rank(world, tmp_path):
    settings = {"checkpoint_bytes": 1000, "old_rank": 2}
    found = world(3).run(agreement_ranks.agreed, str(tmp_path / "run"), [[]] * 3, **settings)
    assert found[0] == found[1] == found[2]
    assert found[0][0] == "UserError"
    assert found[0][1].startswith("kairos-train is ")
    assert "0.0.0 on " in found[0][1]


def test_too_little_room_for_the_checkpoints_is_an_error_that_counts_those_already_there(world, tmp_path):
    for there, needed in ((0, "4000000000.00"), (2, "2000000000.00"), (7, "1000000000.00")):
        for step in range(there):
            (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True, exist_ok=True)
        found = world(3).run(agreement_ranks.agreed, str(tmp_path), [["train.keep_last=3"]] * 3, checkpoint_bytes=1e18)
        assert found[0] == found[1] == found[2]
        kind, line = found[0]
        assert kind == "UserError"
        assert line.startswith(f"run_dir={tmp_path}: ")
        assert f"need {needed} GB more; make room" in line


def test_a_flag_of_any_rank_is_set_on_all(world):
    flags = [[False, False, True], [False, True, True], [False, False, True]]
    assert world(3).run(agreement_ranks.set_on_any_rank, flags) == [[False, True, True]] * 3


@pytest.mark.parametrize(
    ("kind", "first", "others"),
    [
        ("UserError", ("UserError", "of rank 0"), ("UserError", "of rank 0")),
        ("KeyError", ("KeyError", "'of rank 0'"), ("MachineFault", "'of rank 0'")),
    ],
)
def test_what_rank_0_fails_at_all_ranks_raise(world, kind, first, others):
    assert world(3).run(agreement_ranks.first_raises, kind) == [first, others, others]


def test_health_of_several_processes_is_one_report_and_the_disk_is_tried_once_per_host(world, tmp_path):
    reports = world(3).run(agreement_ranks.health, str(tmp_path))
    assert reports[0] == reports[1] == reports[2]
    assert reports[0]["ok"], reports[0]["failed"]
    assert [rank["rank"] for rank in reports[0]["ranks"]] == [0, 1, 2]
    assert [rank["speed"] is None for rank in reports[0]["ranks"]] == [False, True, True]
    assert all(rank["collective"]["rate"] > 0 for rank in reports[0]["ranks"])
    assert list(tmp_path.iterdir()) == []


def test_wrong_sums_are_seen_by_every_process(world):
    good, wrong = world(3).run(agreement_ranks.reduced, [0, 1, 2]), world(3).run(agreement_ranks.reduced, [0, 1, 1])
    assert all(found.problem is None and found.rate > 0 for found in good)
    assert [found.problem for found in wrong] == ["1024 of 1024 sums over 3 processes are wrong"] * 3


def test_a_collective_that_does_not_end_is_told_as_stuck(world):
    for found in world(3).run(agreement_ranks.reduced, [0, 1, 2], late=2)[:2]:
        assert found.stuck
        assert found.problem == "an all-reduce over 3 processes did not end within 1 s"


@pytest.fixture
def broken():
    """Two processes whose group does not outlive the test."""
    pool = Pool(2)
    yield pool
    pool.close(kill=True)


def test_a_process_that_does_not_come_is_named(broken, tmp_path):
    line, _ = broken.run(agreement_ranks.health_without_the_last, str(tmp_path), 2.0)
    assert line.startswith("MachineFault: rank 1 on elsewhere did not finish looking at device and disk within 2 s")
