"""A run of several stages: each from the one before, those that are finished left alone."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from dataloaders.loading.loader import sources_of
from dataloaders.shards import read_index
from kairos_train.basics.errors import UserError
from kairos_train.basics.log import logger
from kairos_train.checkpoint.canonical import CheckpointReader, checkpoint_path, find_latest
from kairos_train.config.curriculum import Curriculum
from kairos_train.config.schema import Config
from kairos_train.training import run_state
from kairos_train.training.budget import Budget
from kairos_train.training.build_run import check
from kairos_train.training.loop import train
from kairos_train.training.measure.telemetry import StagePosition


def train_curriculum(curriculum: Curriculum) -> Path:
    """Walk the stages; returns the last one's last checkpoint.

    Started again, it goes on in the stage that was interrupted. A stage is finished when its newest valid checkpoint
    has come to the end of its budget.

    Raises:
        UserError: see `train`; a stage that is not finished, though a later one was started from it already.
        RunStopped: see `train`.
    """
    stages = curriculum.stages
    for number in curriculum.walk:
        config = stages[number]
        place = StagePosition(number + 1, curriculum.names) if curriculum.names else None
        last = finished(config) if place else None
        if last is not None:
            logger.info(f"{config.run_dir}: stage {place} is finished")
            continue
        _refuse_to_outdate(curriculum, number)
        last = train(config, place)
        dist.barrier()  # the next stage reads what only one rank has published
    return last


def check_curriculum(curriculum: Curriculum) -> None:
    """Refuse what `train_curriculum` would, wherever it is going to run; nothing is started.

    Raises:
        UserError: as `train_curriculum`.
    """
    for number in curriculum.walk:
        if curriculum.names and finished(curriculum.stages[number]):
            continue
        _refuse_to_outdate(curriculum, number)
        check(curriculum.stages[number], on_this_machine=False)


def finished(config: Config) -> Path | None:
    """The last checkpoint of a stage that has had its budget; None of one that has not."""
    folder = run_state.checkpoints(config.run_dir)
    path, _ = find_latest(folder)
    if path is None:
        return None
    reader = CheckpointReader(path)
    epoch = sum(read_index(source.shards).samples for source in sources_of(config.data))
    done = Budget.of(config.train, epoch).finished(run_state.progress_of(reader))
    return checkpoint_path(folder, reader.step) if done else None


def _refuse_to_outdate(curriculum: Curriculum, number: int) -> None:
    """A later stage's weights would no longer be what its configuration says."""
    stages = curriculum.stages
    for later in range(number + 1, len(stages)):
        before, after = stages[later - 1], stages[later]
        if after.stage.init_from != before.run_dir:
            return
        if list(run_state.checkpoints(after.run_dir).glob("step-*")):
            raise UserError(
                f"curriculum stage {curriculum.names[number]} is not finished, but {after.run_dir} was started from it "
                f"already: go on with curriculum.first={curriculum.names[later]}, or remove {after.run_dir}, or choose "
                "another run_dir"
            )
