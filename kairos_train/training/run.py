"""The parts of a run while it goes: `Run` holds them and knows what comes before, between and after steps.

They are put together by `kairos_train.training.build_run.open_run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass

from dataloaders.config import DataConfig
from kairos_train.basics.errors import Interrupted, InterruptedAtTerminal, MachineFault, RunStopped
from kairos_train.basics.log import logger
from kairos_train.basics.progress import Advance, progress
from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.config.schema import OptimizerConfig, TrainConfig
from kairos_train.objective.flow_matching import ConditionedBatch
from kairos_train.operations.events import EventLog
from kairos_train.operations.prometheus import TextFile
from kairos_train.operations.stopping import CTRL_C, Requests
from kairos_train.operations.watch.liveness import Liveness
from kairos_train.training.budget import Budget, Progress
from kairos_train.training.checkpointing import Checkpointing
from kairos_train.training.dry_run import dry_run
from kairos_train.training.engine.optimizer import lr_at
from kairos_train.training.faults import Faults
from kairos_train.training.measure.monitor import Monitor
from kairos_train.training.measure.profiling import Profile
from kairos_train.training.measure.sample_log import SampleLog
from kairos_train.training.measure.telemetry import Telemetry
from kairos_train.training.rollback import last_good
from kairos_train.training.run_state import Best, RunState, restore
from kairos_train.training.samples import draw_samples
from kairos_train.training.step import StepReport, weighted_loss
from kairos_train.training.validation import validate
from parallel.consensus import any_rank, from_all

CHECKPOINT = "checkpoint"
"""The timed action that others ask for before its time."""

OUTCOMES = {type(None): "finished", Interrupted: "interrupted", RunStopped: "stopped", MachineFault: "fault"}
"""Error by which a run ends → what the event says; "error" of all others."""


@dataclass
class Reports:
    """What is written step by step. After going back to an earlier step it is opened again there."""

    telemetry: Telemetry
    samples: SampleLog

    def close(self) -> None:
        self.telemetry.close()
        self.samples.close()


@dataclass
class Run:
    """One stage being trained on this rank. A context manager: its end waits for the checkpoint in flight and closes.

    Attributes:
        run_dir: all that it writes.
        data, optimizer, train: the settings that it asks for while it goes.
        state: what a checkpoint holds: engine, averages, loader, progress, memory of bad steps.
        budget: how long the stage is.
        open_reports: opens telemetry and sample log behind a checkpoint; None: at the beginning.
        events: what happens, over all lives.
        requests: what this process is asked for from outside.
        watch: over the other ranks, and of this one's progress.
        outer: what is open around the run, the watch outermost; closed at its end.
        monitor: what is measured beside training.
        prometheus: the text file of its numbers, on rank 0 where one is wanted.
    """

    run_dir: str
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    state: RunState
    budget: Budget
    checkpointing: Checkpointing
    open_reports: Callable[[CheckpointReader | None], Reports]
    reports: Reports
    events: EventLog
    requests: Requests
    faults: Faults
    watch: Liveness
    outer: ExitStack
    monitor: Monitor
    prometheus: TextFile | None = None

    def __post_init__(self) -> None:
        self.engine, self.feed, self.loader = self.state.engine, self.state.feed, self.state.loader
        self.ema, self.guard, self.topology = self.state.ema, self.state.guard, self.state.engine.topology
        self._phase = ExitStack()
        self._reported = self.step
        self._first = True  # the next step is the first of this life
        self._went_back = False
        self._asked: set[str] = set()  # timed actions that are to be taken before their time
        train, held_out = self.train, bool(self.data.validation_shards)
        self._timed: list[tuple[int, str, Callable[[], None]]] = [  # (every, name, action); every 0 steps: never
            (train.log_every, "report", self._report),
            (train.validate_every if held_out else 0, "validation", self._validate_both),
            (train.sample_every if held_out else 0, "samples", self._draw_samples),
            (train.checkpoint_every, CHECKPOINT, self._save),
        ]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.state.progress.steps

    @property
    def done(self) -> int:
        """Of the budget, in its unit."""
        return getattr(self.state.progress, self.budget.unit)

    def progress(self) -> AbstractContextManager[Advance]:
        """How far the stage is, between the reports."""
        return progress("train", self.budget.amount, self.budget.unit, done=self.done)

    @property
    def finished(self) -> bool:
        return self.budget.finished(self.state.progress)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return lr_at(self.step, self.optimizer, self.budget.total_steps(self.state.progress))

    @property
    def telemetry(self) -> Telemetry:
        return self.reports.telemetry

    # --- a step ---

    @contextmanager
    def watched_step(self) -> Iterator[None]:
        """Around a step, from fetching its data to the end of its update."""
        number = self.step + 1
        with self.monitor.step(number, timed=number % self.train.log_every == 0), self._phase:
            yield
        self._tell_profile(self.monitor.finished_profile)

    def _tell_profile(self, profile: Profile | None) -> None:
        if profile is not None:
            logger.info(str(profile))
            self.events.write("profile", step=profile.last, path=profile.path)

    def before_update(self) -> None:
        """Between the last backward pass and the update."""
        self.monitor.before_update()
        self._enter("update")

    def _enter(self, phase: str) -> None:
        """The step's next phase."""
        self._phase.close()
        self._phase.enter_context(self.monitor.clock.phase(phase))
        self.watch.at(self.step + 1, phase)

    def next_batches(self) -> tuple[list[ConditionedBatch], float]:
        """The micro-batches of the next step, and the seconds that were waited for data.

        Before the first step of a life the largest micro-batch is tried.
        """
        self._enter("data")
        begin = time.perf_counter()
        self.faults.before_data(self.step + 1)
        # Loader processes start with the first batch of a life.
        with self.watch.paused("first data") if self._first else nullcontext():
            raw = [next(self.loader) for _ in range(self.train.accumulation)]
        waited = time.perf_counter() - begin
        if waited > self.data.log_wait:
            logger.info(f"step {self.step + 1}: waited {waited:.0f} s for data")
            self.events.write("loader_stall", step=self.step + 1, seconds=waited)
        share = self.budget.share(self.state.progress)
        batches = [self.feed.condition(batch, step=self.step, progress=share) for batch in raw]
        if self._first and self.train.dry_run:
            self._try_largest(batches[0])
        self._first = False
        self.faults.spoil(self.step + 1, batches)
        self.faults.before_step(self.step + 1)
        self._enter("forward_backward")
        return batches, waited

    def _try_largest(self, like: ConditionedBatch) -> None:
        with self.watch.paused("dry run"), self.telemetry.paused():
            memory = dry_run(
                self.engine,
                self.feed,
                accumulation=self.train.accumulation,
                like=like,
                largest=self.loader.largest_batch(),
            )
        logger.info(memory["text"])
        self.events.write("memory", **memory)

    # --- after a step ---

    def record(self, report: StepReport, batches: list[ConditionedBatch], *, lr: float, data_wait: float) -> None:
        """Count the step and tell of it; weigh it. Collective when it was a bad one.

        Raises:
            RunStopped: more bad steps than `guard` allows, and no way back; samples and remedy are named.
        """
        done = self.state.progress
        self.watch.at(self.step + 1, "follow_up")
        self.state.progress = Progress(done.steps + 1, done.samples + report.samples, done.tokens + report.tokens)
        self.reports.samples.step(self.step, batches)
        self.telemetry.step(self.step, report, lr=lr, data_wait=data_wait)
        self.guard.note(self.step, report.loss, good=report.stepped)
        if report.stepped:
            return
        keys = sorted(
            {key for rank in from_all([k for b in batches for k in b.keys], self.topology.size) for key in rank}
        )
        why = "a loss spike" if self.guard.is_spike(report.loss) else "not finite"
        text = f"step {self.step}: loss {report.loss}, gradient norm {report.grad_norm}: {why}, the update was dropped"
        logger.info(f"{text}; samples {', '.join(keys)}")
        self.events.write(
            "skipped", step=self.step, why=why, loss=report.loss, grad_norm=report.grad_norm, samples=keys
        )
        if self.guard.exceeded:
            self._roll_back(where=f"{text}; samples {', '.join(keys)}")

    def _roll_back(self, *, where: str) -> None:
        """Continue from the last good checkpoint, with the data that come next now: none is seen a second time.

        Steps count from that checkpoint on again; the loader stays where it is. Collective.
        """
        here, bad = self.step, self.guard.describe()
        with self.watch.paused("rollback", times=None):  # whole checkpoints are read, as at a start
            self.checkpointing.settle()
            reader = last_good(self.guard, self.checkpointing.folder, self.topology, where=where)
            restore(self.state, reader)
            self.guard.rollbacks += 1
            self.reports.close()
            self.reports = self.open_reports(reader)
        logger.info(f"{bad}: back to step {reader.step}, and on with the data behind step {here}")
        self.events.write("rollback", step=here, to=reader.step, rollbacks=self.guard.rollbacks)
        self._went_back, self._reported = True, self.step

    def follow_up(self) -> None:
        """What comes after a step when it is time: report, validation, samples, checkpoint. The last step has all.

        Raises:
            Interrupted: some rank was asked to stop; the checkpoint of this step is written.
            MachineFault: checkpoints cannot be written.
        """
        if self._went_back:  # to a step that has been followed up already
            self._went_back = False
            return
        stopping, failed = any_rank([self.requests.why is not None, self.checkpointing.failed], self.topology)
        if failed and (problem := self.checkpointing.settle()):
            logger.info(f"{problem}; training goes on, the next checkpoint is tried in its turn")
        self._asked = {CHECKPOINT} if stopping else set()
        for every, name, action in self._timed:
            if name in self._asked or (every > 0 and (self.finished or self.step % every == 0)):
                with self._pause(name):
                    action()
        if stopping and not self.finished:
            self._stop_as_asked()

    def _report(self) -> None:
        """Averages since the last report, to all who read them. Collective."""
        self.loader.sync()
        measured = self.monitor.report(steps=self.step - self._reported)
        self._reported = self.step
        for straggler in measured.stragglers:
            logger.info(f"step {self.step}: {straggler}")
            self.events.write("straggler", step=self.step, **asdict(straggler))
        values = self.telemetry.report(
            self.step,
            share=self.budget.share(self.state.progress),
            corrupt=sum(entry["count"] for entry in self.loader.skipped.values()),
            epochs=self.loader.epochs,
            totals=asdict(self.state.progress),
            measured=measured.values,
        )
        if self.prometheus is not None:
            self.prometheus.update(self.step, values)

    @contextmanager
    def _pause(self, phase: str) -> Iterator[None]:
        """What is done between two steps, measured, allowed to take its time, and not counted as training."""
        with self.monitor.clock.phase(phase), self.watch.paused(phase), self.telemetry.paused():
            yield

    def _stop_as_asked(self) -> None:
        why = next(reason for reason in from_all(self.requests.why, self.topology.size) if reason)
        self.events.write("stop_requested", step=self.step, why=why)
        if problem := self.checkpointing.settle():
            raise MachineFault(f"asked to stop ({why}), but {problem}")
        raise (InterruptedAtTerminal if why == CTRL_C else Interrupted)(
            f"{self.run_dir}: asked to stop ({why}); the checkpoint of step {self.step} is written, "
            "the same command continues from it"
        )

    def _validate_both(self) -> None:
        """Validate raw and averaged weights; ask for a checkpoint if the averaged ones are the best so far."""
        self._validate("raw")
        with self.ema.in_model():
            loss = self._validate("ema")
        best = self.state.best
        if not self.train.keep_best or (best is not None and loss >= best.loss):
            return
        self.state.best = Best(self.step, loss)
        self._asked.add(CHECKPOINT)

    def _validate(self, weights: str) -> float:
        """The validation loss of some weights, told."""
        losses = validate(self.engine, self.feed, self.data, self.train)
        self.telemetry.scalars(self.step, {f"validation_{weights}/{stream}": loss for stream, loss in losses.items()})
        text = "  ".join(f"{stream} {loss:.4f}" for stream, loss in losses.items())
        logger.info(f"step {self.step}  validation with {weights} weights  {text}")
        return weighted_loss(self.feed.stage, losses["video"], losses.get("action"))

    def _draw_samples(self) -> None:
        with self.ema.in_model():
            samples = draw_samples(self.engine, self.feed, self.data)
        if samples is not None:
            self.telemetry.samples(self.step, samples)

    def _save(self) -> None:
        if problem := self.checkpointing.save(self.state, losses=self.telemetry.losses):
            logger.info(problem)

    # --- begin and end ---

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        with self.outer:
            explained = None if error is None else self.watch.explain(error)
            self.close(failed=error is not None)
            if explained is not None:  # the watch has written the event
                raise explained from error
            outcome = next((name for kind, name in OUTCOMES.items() if isinstance(error, kind)), "error")
            self.events.write("stop", step=self.step, outcome=outcome, text="" if error is None else str(error))
            if error is not None:
                raise error  # through the watch, which tells the other ranks

    def close(self, *, failed: bool = False) -> None:
        """Wait for the checkpoint in flight, close files and loader processes, release the engine.

        Args:
            failed: the run ends by an error; then the checkpoint's failure is not raised on top of it.

        Raises:
            MachineFault: the last checkpoint could not be written.
        """
        try:
            self.checkpointing.close(failed=failed)
        finally:
            self._tell_profile(self.monitor.profiler.close(self.step))
            if self.prometheus is not None:
                self.prometheus.close()
            self.reports.close()
            self.loader.close()
            self.engine.close()
