"""A run saved in one layout goes on in any other: the same losses, the same export byte by byte."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.commands import train_overrides
from support.reshard_ranks import train_run

from kairos_train.cli import main

pytestmark = pytest.mark.slow

WRITERS = {
    "TP2xCP2": (4, "parallel.tensor=2 parallel.context=2 train.zero_stage=1"),
    "TP2xCP2xDP2": (8, "parallel.tensor=2 parallel.context=2 train.zero_stage=1"),
}
READERS = {
    "TP2xCP2": {
        "DP2-ZeRO3": (2, "train.zero_stage=3 train.micro_batch=1"),
        "one_process": (1, "train.zero_stage=0"),
        "TP4": (4, "parallel.tensor=4 parallel.sequence=true train.zero_stage=2"),
    },
    "TP2xCP2xDP2": {
        "CP4xDP2-ZeRO2": (8, "parallel.context=4 train.zero_stage=2"),
        "DP4-ZeRO3": (4, "train.zero_stage=3 train.micro_batch=1"),
        "one_process": (1, "train.zero_stage=0 train.accumulation=2"),
        "TP4": (4, "parallel.tensor=4 parallel.sequence=true train.zero_stage=1 train.accumulation=2"),
    },
}
PAIRS = [
    pytest.param(writer, reader, id=f"{writer}-{reader}", marks=[pytest.mark.nightly] * (writer == "TP2xCP2xDP2"))
    for writer, readers in READERS.items()
    for reader in readers
]
SAVED, STEPS = 2, 4
SETTINGS = (
    f"stage=joint train.micro_batch=2 train.precision=fp32 train.checkpoint_every={SAVED} model.num_heads=4 "
    f"train.validate_every=0 train.ema_decay=0.9 train.dry_run=false data.workers=0 train.steps={STEPS}"
)


def overrides(shards: Path, run_dir: Path, layout: str) -> list[str]:
    return train_overrides(shards, run_dir, *SETTINGS.split(), *layout.split())


def losses(run_dir: Path) -> torch.Tensor:
    lines = (run_dir / "losses.jsonl").read_text().splitlines()
    return torch.tensor([[json.loads(line)[key] for key in ("loss", "video_loss", "action_loss")] for line in lines])


def exported(run_dir: Path, out: Path) -> dict[str, bytes]:
    assert main(["export", str(run_dir), "--out", str(out)]) == 0
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix == ".safetensors"}


@pytest.fixture(scope="module")
def whole(world, shards, tmp_path_factory):
    """Writer → the folder of its run: all steps, with a checkpoint half way."""
    made = {}

    def run(writer: str) -> Path:
        if writer not in made:
            ranks, layout = WRITERS[writer]
            folder = tmp_path_factory.mktemp("reshard") / "whole"
            world(ranks).run(train_run, overrides(shards, folder, layout), timeout=240)
            made[writer] = folder
        return made[writer]

    return run


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_a_run_goes_on_in_another_layout(world, shards, whole, tmp_path, writer, reader):
    half, (ranks, layout) = tmp_path / "run", READERS[writer][reader]
    step = f"checkpoints/step-{SAVED:08d}"
    shutil.copytree(whole(writer) / step, half / step)
    shutil.copy(whole(writer) / "losses.jsonl", half)
    expected = exported(half, tmp_path / "export")

    world(ranks).run(train_run, overrides(shards, half, layout), str(tmp_path / "again"), timeout=240)
    assert expected
    assert exported(tmp_path / "again", tmp_path / "export_again") == expected
    continued = losses(half)
    assert len(continued) == STEPS
    torch.testing.assert_close(continued, losses(whole(writer)), rtol=1e-5, atol=0)
    assert not torch.equal(continued[SAVED:], continued[:SAVED]), "the losses move"
