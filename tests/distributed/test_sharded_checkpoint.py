"""Checkpoints written in parallel: any layout writes its pieces, any other reads what it needs, bit for bit.

Here with DeepSpeed and real processes, in some pairs of layouts; in all, by tests/unit/training/test_master_shards.py.
"""

import json
from collections.abc import Iterable
from itertools import product

import pytest
import torch
from support.sharded_checkpoint_ranks import (
    INPUT,
    SAMPLES,
    SAVED,
    Layout,
    Net,
    newest_intact,
    resume,
    save_on_a_full_disk,
    save_without_rank_one,
    train,
    written_by_one,
)

from kairos_train.checkpoint.canonical import CheckpointReader, checkpoint_path, find_latest
from kairos_train.checkpoint.writing import write_checkpoint
from parallel.topology import Topology

pytestmark = pytest.mark.slow

WRITER = (4, {"tensor": 2, "context": 2, "stage": 1})
READERS = {
    "data4_zero3": (4, {"stage": 3}),
    "one_process": (1, {"stage": 0}),
    "tensor4": (4, {"tensor": 4, "stage": 1}),
    "tensor2_data2_zero2": (4, {"tensor": 2, "stage": 2}),
    "tensor2_data2_zero3": (4, {"tensor": 2, "stage": 3}),
    "context4_data2_zero2": (8, {"context": 4, "stage": 2}),
}
PRECISIONS = ("fp32", "bf16")


def nightly_but(chosen: set, cases: Iterable[tuple]) -> list:
    """Cases of which some are chosen for every run of the tests."""
    return [case if case in chosen else pytest.param(*case, marks=pytest.mark.nightly) for case in cases]


@pytest.fixture(scope="module")
def written(world, tmp_path_factory) -> dict:
    """(folder, report of rank 0) of a run on four ranks, by precision."""
    found = {}
    for precision in PRECISIONS:
        folder = tmp_path_factory.mktemp(precision)
        size, layout = WRITER
        found[precision] = folder, world(size).run(train, folder, Layout(**layout, precision=precision))[0]
    return found


@pytest.fixture(scope="module")
def alone(world) -> dict:
    """Report of one process that was not interrupted, by precision."""
    return {p: world(1).run(train, None, Layout(stage=0, precision=p))[0] for p in PRECISIONS}


@pytest.fixture(scope="module")
def averaged(written) -> torch.Tensor:
    """What the checkpoint's moving average computes, outside of all engines."""
    net = Net(Topology.single(torch.device("cpu")))
    net.load_state_dict(CheckpointReader(checkpoint_path(written["fp32"][0], SAVED)).read_section("ema"))
    return net(torch.randn(SAMPLES, INPUT, generator=torch.Generator().manual_seed(9)))[0].detach()


def assert_alike(steps: list, expected: list, precision: str) -> None:
    """Losses and gradient norms."""
    for column, rtol in ((0, 1e-6), (1, 5e-6)):
        found, wanted = (torch.tensor(s, dtype=torch.float64)[:, column] for s in (steps, expected))
        torch.testing.assert_close(found, wanted, rtol=rtol if precision == "fp32" else 2e-2, atol=0)


PAIRS = {("data4_zero3", "fp32"), ("tensor4", "fp32"), ("one_process", "bf16"), ("tensor2_data2_zero2", "bf16")}


@pytest.mark.parametrize(("name", "precision"), nightly_but(PAIRS, product(READERS, PRECISIONS)))
def test_a_checkpoint_loads_into_any_layout_bit_for_bit_and_goes_on(world, written, averaged, name, precision):
    """Between loading and going on, each layout computes with the moving average and gets its weights back."""
    folder, writer = written[precision]
    size, layout = READERS[name]
    reports = world(size).run(resume, folder, Layout(**layout, precision=precision))
    assert reports[0]["loaded"] == writer["saved"]
    assert reports[0]["after_averaging"] == writer["saved"]
    for report in reports:
        assert_alike(report["steps"], writer["steps"][SAVED:], precision)
        if precision == "fp32":
            torch.testing.assert_close(report["averaged"], averaged, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("stage", "precision"),
    nightly_but({(0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32")}, product(range(4), PRECISIONS)),
)
def test_losses_and_clipped_norms_of_split_nets_are_those_of_one_process(world, alone, stage, precision):
    """Split, copied, partly computed and frozen parameters; every rank sees the same numbers."""
    assert all(norm > 1 for _, norm in alone[precision]["steps"]), "clipping is active"
    for report in world(4).run(train, None, Layout(tensor=2, stage=stage, precision=precision)):
        assert_alike(report["steps"], alone[precision]["steps"], precision)


@pytest.mark.parametrize(
    ("stage", "precision"),
    nightly_but(
        {(0, "bf16"), (2, "fp32"), (3, "bf16")}, [(0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")]
    ),
)
def test_plain_gradient_descent_trains_and_resumes_in_every_stage(world, tmp_path, stage, precision):
    layout = {"precision": precision, "optimizer": "sgd"}
    writer = world(4).run(train, tmp_path, Layout(tensor=2, stage=stage, **layout))[0]
    alone = world(1).run(resume, tmp_path, Layout(stage=0, **layout))[0]
    assert alone["loaded"] == writer["saved"]
    assert CheckpointReader(checkpoint_path(tmp_path, SAVED)).sections() == ["ema", "model", "rng"]
    assert_alike(alone["steps"], writer["steps"][SAVED:], precision)


def test_the_writer_of_four_ranks_trains_as_one_process(written, alone):
    assert_alike(written["fp32"][1]["steps"], alone["fp32"]["steps"], "fp32")


@pytest.mark.parametrize(("tensor", "stage"), nightly_but({(1, 3), (2, 0)}, [(1, 3), (2, 0), (2, 2), (4, 3)]))
def test_one_process_reads_what_other_layouts_write(world, tmp_path, tensor, stage):
    writer = world(4).run(train, tmp_path, Layout(tensor=tensor, stage=stage))[0]
    assert world(1).run(resume, tmp_path, Layout(stage=0))[0]["loaded"] == writer["saved"]


def test_every_rank_writes_its_pieces_and_together_they_are_whole(written):
    folder, _ = written["fp32"]
    reader = CheckpointReader(checkpoint_path(folder, SAVED))
    reader.verify()
    whole = Net(Topology.single(torch.device("cpu")))
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    assert {name: reader.shape("model", name) for name in reader.names("model")} == shapes
    assert reader.names("exp_avg") == sorted(name for name, p in whole.named_parameters() if p.requires_grad)
    writers = {file.rsplit("-", 2)[1] for file in reader.manifest["files"] if file.startswith("exp_avg-")}
    assert len(writers) == 4
    assert len(reader.manifest["sections"]["model"]["inner.weight"]["pieces"]) > 4, "rows are cut"
    assert reader.state["ranks"] == [{"rank": rank} for rank in range(4)]
    assert [int(reader.read("rng", f"rank{rank}.torch")[0]) for rank in range(4)] == list(range(4))
    assert reader.text("config.yaml") == "seed: 0\n"
    assert sorted(path.name for path in reader.path.iterdir()) == sorted([*reader.manifest["files"], "manifest.json"])


def test_copies_are_written_once_and_by_all(world):
    """Two tensor ranks × two copies: the large tensors go to different ranks, and nobody writes two of them."""
    sections = world(4).run(written_by_one)
    whole = Net(Topology.single(torch.device("cpu")))
    bytes_of = {name: tensor.nbytes for name, tensor in whole.state_dict().items()}
    assert sum(held["model"] for held in sections) == sum(bytes_of.values())
    assert sum(held["exp_avg"] for held in sections) == sum(p.nbytes for p in whole.parameters() if p.requires_grad)
    assert max(held["model"] for held in sections) < bytes_of["inner.weight"] / 2 + bytes_of["fixed"] / 4


def test_a_checkpoint_written_behind_the_loop_is_the_one_that_waits(world, written, tmp_path):
    """The loop goes on with steps while the background one is written: what counts is the moment of the save."""
    folder, _ = written["fp32"]
    size, layout = WRITER
    world(size).run(train, tmp_path, Layout(**layout), background=False)
    waited, behind = (json.loads((checkpoint_path(f, SAVED) / "manifest.json").read_text()) for f in (tmp_path, folder))
    assert waited == behind


def test_a_disk_that_takes_no_more_is_told_and_leaves_the_checkpoints_as_they_were(world, tmp_path):
    told = world(2).run(save_on_a_full_disk, tmp_path)
    assert [ranks[0] for ranks in told] == [ranks[2] for ranks in told] == [None, None]
    for message in (ranks[1] for ranks in told):
        assert "step-00000002: rank 1 could not write its part" in message
        assert "File too large" in message
        assert "\n" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
    assert find_latest(tmp_path, deep=True) == (checkpoint_path(tmp_path, 3), [])
    for step in (1, 3):
        read = CheckpointReader(checkpoint_path(tmp_path, step)).read_section("model")
        assert all(torch.equal(read[f"rank{rank}"], torch.arange(5000.0)) for rank in range(2))


def test_a_rank_that_never_writes_ends_the_wait_of_the_first(world, tmp_path):
    told = world(2).run(save_without_rank_one, tmp_path)
    assert "nothing came of rank 1 in 0.3 s" in told[0]
    assert find_latest(tmp_path) == (None, [])


def test_what_one_rank_cannot_read_all_ranks_skip(world, tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path / "all", step, sections={"model": {"w": torch.ones(3)}}, state={}, files={})
    old, new = (checkpoint_path(tmp_path / "all", step) for step in (1, 2))
    for file in ("manifest.json", "model-00000-00001.safetensors"):
        problem = f"checkpoint {new} is skipped: "
        for found, (warning,) in world(2).run(newest_intact, tmp_path / "all", new / file):
            assert found == old
            assert warning.startswith(problem)
            assert f"{file} cannot be read (Input/output error)" in warning
    (tmp_path / "file").touch()
    told = world(2).run(newest_intact, tmp_path / "file", tmp_path)
    assert told == 2 * [f"{tmp_path / 'file'}: cannot be listed (Not a directory); see to the disk, start it again"]
