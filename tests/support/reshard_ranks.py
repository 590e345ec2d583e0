"""Ranks of the resharding tests: real runs, in processes that are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from kairos_train.config.compose import load_config, to_yaml
from kairos_train.config.schema import Config
from kairos_train.training import loop, run_state
from kairos_train.training.build_run import open_run
from kairos_train.training.run import Run


def train_run(overrides: list[str], again: str | None = None) -> None:
    """Train in a layout; what the run holds before its first step here is also written into the run folder `again`."""

    def opened(config: Config, *place: object) -> Run:
        run = open_run(config, *place)
        if again:
            save_elsewhere(run, config, again)
        return run

    with patch.object(loop, "open_run", opened):
        loop.train(load_config(overrides))


def save_elsewhere(run: Run, config: Config, run_dir: str) -> None:
    saver = run_state.open_saver(run_state.checkpoints(run_dir), config.train, run.topology)
    run_state.save(saver, replace(run.state, settings=to_yaml(replace(config, run_dir=run_dir))), losses="")
    saver.close()
    if run.topology.rank == 0:
        assert (Path(run_dir) / "checkpoints" / f"step-{run.step:08d}").is_dir()
