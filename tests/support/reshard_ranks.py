"""Ranks of the resharding tests: real runs, in processes that are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kairos_train.config.compose import load_config, to_yaml
from kairos_train.training import run_state
from kairos_train.training.build_run import open_run
from kairos_train.training.loop import train


def train_run(overrides: list[str]) -> None:
    train(load_config(overrides))


def save_again(overrides: list[str], out: str) -> None:
    """Resume a run in a layout and write what it holds, before any step, into another run folder."""
    config = load_config(overrides)
    with open_run(config) as run:
        saver = run_state.open_saver(run_state.checkpoints(out), config.train, run.topology)
        run_state.save(saver, replace(run.state, settings=to_yaml(replace(config, run_dir=out))))
        saver.close()
    if run.topology.rank == 0:
        assert (Path(out) / "checkpoints" / f"step-{run.step:08d}").is_dir()
