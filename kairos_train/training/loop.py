"""Training one stage, top to bottom.

The same for one process and under torchrun: every rank runs this function; they differ in their share of the data and
in who writes.
"""

from __future__ import annotations

from pathlib import Path

from kairos_train.checkpoint.canonical import checkpoint_path
from kairos_train.config.schema import Config
from kairos_train.training.build_run import open_run
from kairos_train.training.measure.telemetry import StagePosition
from kairos_train.training.step import train_step


def train(config: Config, place: StagePosition | None = None) -> Path:
    """Train one stage to the end of its budget and return its last checkpoint.

    An interrupted run continues from the newest valid checkpoint of `run_dir`, by `train.resume`; on the CPU its losses
    are bit-identical to those of a run that was not interrupted.

    Args:
        place: of the stage in a curriculum, to be told.

    Raises:
        UserError: something in the configuration, the shards or the checkpoint does not fit the rest.
        RunStopped: more bad steps than `guard` allows.
        Interrupted: it was asked to stop and has written its checkpoint.
        MachineFault: a process, a disk or the data's file system failed.
    """
    with open_run(config, place) as run, run.progress() as advance:
        while not run.finished:
            with run.watched_step():
                batches, data_wait = run.next_batches()
                lr = run.lr
                run.engine.set_lr(lr)
                report = train_step(
                    run.engine,
                    run.feed.objective,
                    config.stage,
                    batches,
                    refuses=run.guard.refuses,
                    before_update=run.before_update,
                )
                if report.stepped:
                    run.ema.update()
            run.record(report, batches, lr=lr, data_wait=data_wait)
            run.follow_up()
            advance(run.done)
    return checkpoint_path(run.checkpointing.folder, run.step)
