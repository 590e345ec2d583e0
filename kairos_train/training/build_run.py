"""Putting a run together, or taking it up where it stood: `open_run`."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dataloaders.loading.cursor import LoaderShard
from dataloaders.loading.loader import ShardLoader, check_shards, sources_of
from dataloaders.shards import ShardIndex, read_index
from kairos_train.basics.errors import UserError
from kairos_train.basics.log import logger
from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.checkpoint.intact import find_intact
from kairos_train.config.compose import save_config
from kairos_train.config.schema import Config
from kairos_train.model.layout import check_layers, full_shapes, model_table
from kairos_train.model.trainable import trains
from kairos_train.operations.events import EventLog, next_life, read_events
from kairos_train.operations.guard import Guard
from kairos_train.operations.preflight.agreement import agree
from kairos_train.operations.prometheus import TextFile
from kairos_train.operations.reports.records import abandoned
from kairos_train.operations.run_lock import RunLock
from kairos_train.operations.stopping import Requests
from kairos_train.operations.watch.findings import RunFault
from kairos_train.operations.watch.liveness import Liveness, open_liveness
from kairos_train.training import run_state
from kairos_train.training.budget import Budget, Progress
from kairos_train.training.checkpointing import Checkpointing
from kairos_train.training.describe import chosen_kernels, peak_flops
from kairos_train.training.engine.deepspeed_engine import build_engine, start_processes
from kairos_train.training.engine.ema import Ema
from kairos_train.training.engine.initial_weights import build_model, initial_average
from kairos_train.training.engine.random_state import derive_random_state
from kairos_train.training.faults import Faults
from kairos_train.training.inputs.feed import Feed
from kairos_train.training.inputs.sources import check_sources, check_window, policy_source
from kairos_train.training.measure.monitor import Monitor
from kairos_train.training.measure.sample_log import SampleLog
from kairos_train.training.measure.telemetry import StagePosition, Telemetry
from kairos_train.training.run import Reports, Run
from kairos_train.training.run_state import RunState
from parallel.consensus import first_does, from_all, from_first
from parallel.topology import Topology


def open_run(config: Config, place: StagePosition | None = None) -> Run:
    """Build a stage's run, or resume it from the newest intact checkpoint of `run_dir` (`train.resume`).

    Args:
        place: in a curriculum.

    Raises:
        UserError: something in the configuration, the shards or the checkpoint does not fit the rest.
    """
    # First what can be known before any device is taken.
    begun = time.time()
    indices = [read_index(source.shards) for source in sources_of(config.data)]
    _check_data(config, indices)
    check_layers(config)
    reader, damaged = run_state.find_resumable(config)
    changes = run_state.changed_settings(config, reader) if reader else []

    topology = start_processes(config.train.device, config.parallel)
    with ExitStack() as outer:
        ground = _take_ground(config, topology, outer)
        with ground.watch.paused("start", times=None):
            if reader:
                reader, damaged = _intact(config, topology)
                changes += run_state.changed_layout(config, topology, reader) if reader else []
            state = _build_state(config, topology, indices, reader, rollbacks=ground.rollbacks)
            start = {"begun": round(begun, 3), **abandoned(Path(config.run_dir), state.progress.steps)}
            run = _assemble(state, ground, indices, place, outer)
            _tell(run, ground, indices, place, start=start, damaged=damaged, changes=changes)
            run.outer = outer.pop_all()  # the run closes it from here on
    return run


@dataclass(frozen=True)
class _Ground:
    """What a run stands on before anything is built.

    Attributes:
        versions: of what all processes run with.
        life: how often the run has been started, this time included.
        rollbacks: how often it has gone back in earlier lives.
    """

    watch: Liveness
    events: EventLog
    prometheus: TextFile | None
    versions: dict[str, str]
    life: int
    rollbacks: int


def _take_ground(config: Config, topology: Topology, outer: ExitStack) -> _Ground:
    """Watch over the ranks, lock of the run's folder, agreement of all ranks, event file. Collective."""
    run_dir, first = Path(config.run_dir), topology.rank == 0
    log: list[EventLog] = []

    def note(finding: RunFault) -> None:
        for events in log:
            events.write("stop", outcome="fault", text=finding.text)

    watch = outer.enter_context(open_liveness(config.watch, stacks=run_dir / "stacks", on_fault=note))
    lock = first_does(lambda: RunLock(run_dir, say=logger.info), rank=topology.rank, size=topology.size)
    if lock is not None:
        outer.enter_context(lock)
    versions = agree(config, checkpoint_bytes=_checkpoint_bytes(config), size=topology.size)
    past, life = from_first((read_events(run_dir), next_life(run_dir)), topology.size)
    prometheus = None
    if first and config.monitor.prometheus_file is not None:
        prometheus = TextFile(
            Path(config.monitor.prometheus_file),
            labels={"run": config.run_dir, "stage": config.stage.name},
            counts=Counter(event["kind"] for event in past),
            say=logger.info,
        )
    rollbacks = sum(event["kind"] == "rollback" for event in past)
    heard = (lambda kind: None) if prometheus is None else prometheus.count
    log.append(EventLog(run_dir, life=life, enabled=first, heard=heard))
    return _Ground(watch, log[0], prometheus, versions, life, rollbacks)


def _checkpoint_bytes(config: Config) -> int:
    """Of a checkpoint of this stage: float32 weights and averages of all, moments of what trains."""
    shapes, stage = full_shapes(config), config.stage
    return sum(torch.Size(shape).numel() * (16 if trains(name, stage) else 8) for name, shape in shapes.items())


def _build_state(
    config: Config,
    topology: Topology,
    indices: Sequence[ShardIndex],
    reader: CheckpointReader | None,
    *,
    rollbacks: int,
) -> RunState:
    """Everything that a checkpoint holds, fresh or from one. Collective."""
    derive_random_state(config.seed, 0, topology.rank)
    feed = Feed(config, indices, topology.device)
    loader = _open_loader(config, topology, with_frames=feed.needs_frames)
    model = build_model(config, feed.identity, topology)
    table = model_table(config, model)
    engine = build_engine(model, config, topology=topology, table=table, full_shapes=full_shapes(config))
    start = None if reader else initial_average(config, engine.layout.shapes)
    ema = Ema(engine, config.train.ema_decay, start=start)
    guard = Guard(config.guard, tolerant=config.train.on_nonfinite == "skip", rollbacks=rollbacks)
    state = RunState(engine, ema, loader, feed, config, Progress(), None, guard)
    if reader:
        run_state.restore(state, reader)
    return state


def _assemble(
    state: RunState, ground: _Ground, indices: Sequence[ShardIndex], place: StagePosition | None, outer: ExitStack
) -> Run:
    """The run around its state. Collective."""
    config, topology = state.config, state.engine.topology
    budget = Budget.of(config.train, sum(index.samples for index in indices))
    open_reports = partial(_open_reports, config, topology, budget, place)
    monitor = Monitor(state.engine, config.monitor, Path(config.run_dir))
    requests = Requests(
        deadline=config.train.deadline, margin=config.train.deadline_margin, profile=monitor.profiler.request
    )
    outer.enter_context(requests)
    return Run(
        state=state,
        budget=budget,
        checkpointing=Checkpointing(config, topology, ground.events),
        open_reports=open_reports,
        reports=open_reports(state.progress.steps),
        events=ground.events,
        requests=requests,
        faults=Faults(config.faults.inject, rank=topology.rank, data_rank=topology.data_rank, life=ground.life),
        watch=ground.watch,
        outer=outer,
        monitor=monitor,
        prometheus=ground.prometheus,
    )


def _check_data(config: Config, indices: Sequence[ShardIndex]) -> None:
    """Refuse shards that do not fit the configuration or are not whole."""
    check_sources(config, indices)
    held_out = [read_index(folder) for folder in filter(None, [config.data.validation_shards])]
    if indices[policy_source(indices)].action_dim:
        for index in held_out:
            check_window(config.data.window, index)
    if config.data.on_corrupt == "stop":
        for index in [*indices, *held_out]:
            check_shards(index)


def _intact(config: Config, topology: Topology) -> tuple[CheckpointReader | None, list[str]]:
    """The newest checkpoint whose every byte is right. Collective; reads as `run_state.find_resumable`."""
    path, damaged = find_intact(run_state.checkpoints(config), topology)
    if path is None and config.train.resume == "must":
        raise UserError(f"train.resume=must: no intact checkpoint in {run_state.checkpoints(config)}: {damaged[0]}")
    return None if path is None else CheckpointReader(path), damaged


def _open_reports(
    config: Config, topology: Topology, budget: Budget, place: StagePosition | None, step: int
) -> Reports:
    """Telemetry and sample log behind a step; later lines are dropped."""
    run_dir = Path(config.run_dir)
    telemetry = Telemetry(
        run_dir,
        first_step=step,
        length=str(budget),
        place=place,
        peak_flops=peak_flops(config, topology.device),
        world=topology.size,
        enabled=topology.rank == 0,
    )
    return Reports(
        telemetry, SampleLog(run_dir, topology=topology, first_step=step, enabled=config.monitor.log_samples)
    )


def _open_loader(config: Config, topology: Topology, *, with_frames: bool) -> ShardLoader:
    """Batches of this rank's share of the data; ranks that share a sample get the same."""
    train = config.train
    return ShardLoader(
        config.data,
        LoaderShard(train.micro_batch, train.accumulation, topology.data_rank, topology.degrees.data),
        seed=config.seed,
        with_frames=with_frames,
        quarantine=Path(config.run_dir) / "quarantine.jsonl" if topology.rank == 0 else None,
        gather=partial(from_all, topology=topology) if topology.size > 1 else None,
        pin_memory=topology.device.type == "cuda",
    )


def _tell(
    run: Run,
    ground: _Ground,
    indices: Sequence[ShardIndex],
    place: StagePosition | None,
    *,
    start: dict[str, Any],
    damaged: Sequence[str],
    changes: Sequence[str],
) -> None:
    """How a life begins: configuration, events, lines for the person who watches."""
    config, topology, events = run.config, run.topology, run.events
    if topology.rank == 0:
        save_config(config, Path(config.run_dir) / "config.yaml")
    events.write(
        "start",
        host=platform.node(),
        pid=os.getpid(),
        job=os.environ.get("SLURM_JOB_ID"),
        world=topology.size,
        step=run.step,
        budget=str(run.budget),
        stage=config.stage.name,
        place=None if place is None else str(place),
        versions=ground.versions,
        **start,
    )
    for problem in damaged:
        logger.info(problem)
        events.write("passed_over", problem=problem)
    for change in changes:
        logger.info(f"resumed with a changed setting: {change}")
        events.write("changed", setting=change)
    logger.info(_headline(run.state, indices, run.budget, place))


def _headline(state: RunState, indices: Sequence[ShardIndex], budget: Budget, place: StagePosition | None) -> str:
    config, engine, done = state.config, state.engine, state.progress.steps
    parameters = sum(torch.Size(shape).numel() for shape in engine.layout.shapes.values())
    kernels = ", ".join(f"{name}={kind}" for name, kind in chosen_kernels(config, engine.topology.device).items())
    samples = " + ".join(f"{index.samples:,}" for index in indices)
    return (
        f"{config.run_dir}: stage {config.stage.name}{f' ({place})' if place else ''}, {parameters / 1e6:.2f} M "
        f"parameters train on {samples} samples for {budget}; {_layout(engine.topology)} on "
        f"{engine.topology.device.type}, ZeRO {config.train.zero_stage}, {config.train.precision}, {kernels}; "
        + (f"resumed at step {done}" if done else "from step 0")
    )


def _layout(topology: Topology) -> str:
    degrees = topology.degrees
    split = [f"{axis} {n}" for axis, n in asdict(degrees).items() if n > 1]
    return f"{topology.size} process(es)" + (f" ({' × '.join(split)})" if len(split) > 1 else "")
