"""What is measured beside training, put together: phases of every step, and the timed step before each report.

    monitor = Monitor(engine, config.monitor, run_dir)
    with monitor.step(number, timed=…):           # `timed` on the step before a report; the same on all ranks
        with monitor.clock.phase("data"): ...
        with monitor.clock.phase("forward_backward"): ...
        monitor.before_update()                   # after the last `backward`, before `engine.step()`
        with monitor.clock.phase("update"): ...
    measured = monitor.report(steps=10)           # collective when a step was timed

A timed step costs a few small kernels per collective and per Gated DeltaNet layer and one small all-reduce more than
another; its numbers, losses and weights are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kairos_train.config.operation_schema import MonitorConfig
from kairos_train.training.engine.deepspeed_engine import TrainingEngine
from kairos_train.training.measure.block_norms import BlockSquares, block_squares
from kairos_train.training.measure.collective_times import CollectiveTimes
from kairos_train.training.measure.decays import DecayProbe
from kairos_train.training.measure.phases import PhaseClock
from kairos_train.training.measure.profiling import Profile, ProfilerWindow
from kairos_train.training.measure.stragglers import BusyTimes, Straggler


@dataclass(frozen=True)
class StepMeasurements:
    """What a report tells.

    Attributes:
        values: for `Telemetry.report`.
        stragglers: processes that were too slow in the timed step.
    """

    values: dict[str, float] = field(default_factory=dict)
    stragglers: tuple[Straggler, ...] = ()


class Monitor:
    """The measurements of one run on one rank. Making one is collective.

    Attributes:
        clock: of the phases; usable outside of steps, too.
        profiler: windows of this process; `profiler.request()` opens one.
        finished_profile: of the step that has just ended, if a window closed with it.
    """

    def __init__(self, engine: TrainingEngine, config: MonitorConfig, run_dir: Path) -> None:
        self._engine, self._config = engine, config
        rank = engine.topology.rank
        self.clock = PhaseClock(engine.topology.device)
        # A window that was configured opens on rank 0, one that was asked for on the process that was asked.
        at = config.profile_at if rank == 0 else None
        self.profiler = ProfilerWindow(run_dir, rank=rank, at=at, steps=config.profile_steps)
        self.finished_profile: Profile | None = None
        self._decays = DecayProbe(engine.model) if rank == 0 else None  # told as rank 0 sees them
        self._busy = BusyTimes(engine.topology, factor=config.straggler_factor)
        self._times: CollectiveTimes | None = None
        self._squares: BlockSquares | None = None
        self._timing = False

    @contextmanager
    def step(self, number: int, *, timed: bool) -> Iterator[None]:
        """Around a step, counted from 1, from fetching its data to the end of its update.

        Args:
            timed: measure it, if `monitor.timed_steps`; equal on all ranks.
        """
        self.finished_profile = None
        self.profiler.before_step(number)
        self._timing = timed and self._config.timed_steps
        with ExitStack() as stack:
            if self._timing:
                self._times = self._squares = None
                times = stack.enter_context(CollectiveTimes(self._engine.topology))
                if self._decays is not None:
                    stack.enter_context(self._decays.listening())
            yield
        if self._timing:
            self._times, self._timing = times, False
        self.finished_profile = self.profiler.after_step(number)

    def before_update(self) -> None:
        """Between the last `backward` of a step and `engine.step()`, where reduced gradients are whole."""
        if self._timing:
            self._squares = block_squares(self._engine)

    def report(self, *, steps: int) -> StepMeasurements:
        """What was measured since the last call. Collective if a step was timed since then.

        Args:
            steps: done since then.
        """
        values = self.clock.take(steps=steps)
        times, squares = self._times, self._squares
        self._times = self._squares = None
        if times is None:
            return StepMeasurements(values)
        values |= {f"communication/{kind}": seconds for kind, seconds in times.seconds.items()}
        if squares is not None:
            values |= squares.norms(self._engine.topology)
        if self._decays is not None:
            values |= self._decays.values()
        comparison = self._busy.compare(times.busy)
        return StepMeasurements(values | comparison.values(), comparison.stragglers)
