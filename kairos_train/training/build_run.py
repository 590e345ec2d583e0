"""Putting a run together, or taking it up where it stood: `open_run`."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dataloaders.config import DataConfig
from dataloaders.consistency.report import announced
from dataloaders.loading.cursor import LoaderShard
from dataloaders.loading.loader import ShardLoader, check_shards, sources_of
from dataloaders.shards import ShardIndex, read_index
from kairos_train.basics.log import logger
from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.checkpoint.intact import check_intact, find_intact
from kairos_train.checkpoint.resolve import resolve_checkpoint
from kairos_train.config.compose import save_config, to_yaml
from kairos_train.config.schema import Config, StageConfig, TrainConfig
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
from kairos_train.training.engine.deepspeed_engine import build_engine, device_kind, start_processes
from kairos_train.training.engine.ema import Ema
from kairos_train.training.engine.initial_weights import build_model, initial_average
from kairos_train.training.engine.random_state import derive_random_state
from kairos_train.training.faults import Faults
from kairos_train.training.inputs.feed import Feed
from kairos_train.training.inputs.sources import (
    check_encoders,
    check_held_out,
    check_sources,
    held_out_source,
    normalizers_of,
    rates_of,
)
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
    begun = time.time()
    checked = check(config)
    topology = start_processes(config.train.device, config.parallel)
    with ExitStack() as outer:
        ground = _take_ground(config, topology, outer)
        with ground.watch.paused("start", times=None):
            if config.train.resume != "never":
                checked = confirm(config, checked, topology)
            if checked.checkpoint is None and config.stage.init_from is not None:
                check_intact(resolve_checkpoint(Path(config.stage.init_from)), topology)
            state = _build_state(config, topology, checked, rollbacks=ground.rollbacks)
            start = {"begun": round(begun, 3)}
            if topology.rank == 0:
                start |= abandoned(Path(config.run_dir), state.progress.steps)
            run = _assemble(config, state, ground, checked, place, outer)
            if topology.rank == 0:
                save_config(config, Path(config.run_dir) / "config.yaml")
            _tell(run, ground, config.stage, place, checked=checked, start=start)
            run.outer = outer.pop_all()  # the run closes it from here on
    return run


@dataclass(frozen=True)
class Checked:
    """What is known of a run before any device is taken.

    Attributes:
        indices: of the sources, whole and such as the stage can be trained on.
        checkpoint: to continue from; None: the run begins.
        damaged: warnings about newer checkpoints.
        changes: settings that the checkpoint has otherwise, all of them free to change.
        notes: what else is to be said of the sources, such as what their datasets say in two ways and what was
            believed.
    """

    indices: list[ShardIndex]
    checkpoint: CheckpointReader | None
    damaged: list[str]
    changes: list[str]
    notes: list[str]


def check(config: Config, *, on_this_machine: bool = True) -> Checked:
    """Hold a configuration to its shards, its layers and the run that it continues, without taking a device.

    Args:
        on_this_machine: False where the run starts on another one.

    Raises:
        UserError: something in them does not fit the rest.
    """
    indices = [read_index(source.shards) for source in sources_of(config.data)]
    notes = _check_data(config, indices)
    check_layers(config, on_this_machine=on_this_machine)
    if on_this_machine:
        device = torch.device(device_kind(config.train.device))
        chosen_kernels(config.kernels, device, precision=config.train.precision)
    reader, damaged = run_state.find_resumable(config.run_dir, resume=config.train.resume)
    changes = run_state.changed_settings(asdict(config), reader) if reader else []
    return Checked(indices, reader, damaged, changes, [*filter(None, [rates_of(indices)]), *notes])


def _check_data(config: Config, indices: Sequence[ShardIndex]) -> list[str]:
    """Refuse shards that do not fit the configuration or each other, or are not whole; what is to be said of them."""
    data, train = config.data, config.train
    check_sources(indices, window=data.window, model=config.model, stage=config.stage)
    held_out = [read_index(folder) for folder in filter(None, [data.validation_shards])]
    for index in held_out:
        source = indices[held_out_source(indices, index)]
        check_held_out(source.window, source, index)
    for index in indices:
        normalizers_of(index, data=data, stage=config.stage)
    check_encoders(config.encoders, [*indices, *held_out])
    ShardLoader(data, LoaderShard(train.micro_batch, train.accumulation, 0, 1), seed=config.seed)
    if data.on_corrupt == "stop":
        for index in [*indices, *held_out]:
            check_shards(index)
    return [line for index in [*indices, *held_out] for line in announced(index.folder)]


def confirm(config: Config, checked: Checked, topology: Topology) -> Checked:
    """What `check` found, with the newest checkpoint whose every byte is right. Collective, under the run's lock.

    `check` looked at names and sizes before the lock was taken: the job before, whose end this one may have waited for,
    has written further checkpoints since then, or its first.

    Raises:
        UserError: there is none, and some that are damaged or `train.resume=must`; or it does not fit this run.
        MachineFault: the folder of checkpoints cannot be listed.
    """
    folder = run_state.checkpoints(config.run_dir)
    path, damaged = find_intact(folder, topology)
    if path is None:
        run_state.refuse_to_begin(folder, damaged, resume=config.train.resume)
        return replace(checked, checkpoint=None, damaged=damaged, changes=[])
    reader = CheckpointReader(path)
    changes = checked.changes if checked.checkpoint else run_state.changed_settings(asdict(config), reader)
    run_state.check_step_size(config.data, config.train, topology, reader)
    changes = [*changes, *run_state.changed_layout(topology, reader)]
    return replace(checked, checkpoint=reader, damaged=damaged, changes=changes)


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
    past = from_first(read_events(run_dir) if first else None, topology.size)
    life = next_life(past)
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


def _build_state(config: Config, topology: Topology, checked: Checked, *, rollbacks: int) -> RunState:
    """Everything that a checkpoint holds, fresh or from one. Collective."""
    data, train, reader = config.data, config.train, checked.checkpoint
    derive_random_state(config.seed, 0, topology.rank)
    feed = Feed(
        checked.indices,
        topology.device,
        data=data,
        encoders=config.encoders,
        model=config.model,
        stage=config.stage,
        seed=config.seed,
    )
    quarantine = Path(config.run_dir) / "quarantine.jsonl"
    loader = open_loader(data, train, topology, seed=config.seed, with_frames=feed.needs_frames, quarantine=quarantine)
    model = build_model(config, feed.identity, topology)
    table, shapes = model_table(config, model), full_shapes(config)
    engine = build_engine(model, train, config.optimizer, topology=topology, table=table, full_shapes=shapes)
    start = None if reader else initial_average(config, engine.master_shards.shapes)
    state = RunState(
        engine=engine,
        ema=Ema(engine, train.ema_decay, start=start),
        loader=loader,
        feed=feed,
        settings=to_yaml(config),
        kernels=chosen_kernels(config.kernels, topology.device, precision=train.precision),
        step_size=run_state.step_size(data, train, topology),
        seed=config.seed,
        progress=Progress(),
        best=None,
        guard=Guard(config.guard, tolerant=train.on_nonfinite == "skip", rollbacks=rollbacks),
    )
    if reader:
        run_state.resume(state, reader)
    return state


def open_loader(
    data: DataConfig, train: TrainConfig, topology: Topology, *, seed: int, with_frames: bool, quarantine: Path
) -> ShardLoader:
    """Batches of this rank's share of the data; ranks that share a sample get the same.

    Args:
        seed: of the order.
        with_frames: decode the clips.
        quarantine: file in which rank 0 lists what was skipped.
    """
    return ShardLoader(
        data,
        LoaderShard(train.micro_batch, train.accumulation, topology.data_rank, topology.degrees.data),
        seed=seed,
        with_frames=with_frames,
        quarantine=quarantine if topology.rank == 0 else None,
        gather=partial(from_all, size=topology.size) if topology.size > 1 else None,
        pin_memory=topology.device.type == "cuda",
    )


def _assemble(
    config: Config,
    state: RunState,
    ground: _Ground,
    checked: Checked,
    place: StagePosition | None,
    outer: ExitStack,
) -> Run:
    """The run around its state. Collective."""
    train, topology = config.train, state.engine.topology
    run_dir, budget = Path(config.run_dir), Budget.of(train, sum(index.samples for index in checked.indices))
    peak = peak_flops(train, topology.device)

    def open_reports(reader: CheckpointReader | None) -> Reports:
        step = 0 if reader is None else reader.step
        telemetry = Telemetry(
            run_dir,
            first_step=step,
            losses=run_state.losses_of(reader) if topology.rank == 0 else "",
            length=str(budget),
            place=place,
            peak_flops=peak,
            world=topology.size,
            enabled=topology.rank == 0,
        )
        samples = SampleLog(run_dir, topology=topology, first_step=step, enabled=config.monitor.log_samples)
        return Reports(telemetry, samples)

    monitor = Monitor(state.engine, config.monitor, run_dir)
    requests = Requests(deadline=train.deadline, margin=train.deadline_margin, profile=monitor.profiler.request)
    outer.enter_context(requests)
    return Run(
        run_dir=config.run_dir,
        data=config.data,
        optimizer=config.optimizer,
        train=train,
        state=state,
        budget=budget,
        checkpointing=Checkpointing(run_state.checkpoints(config.run_dir), train, topology, ground.events),
        open_reports=open_reports,
        reports=open_reports(checked.checkpoint),
        events=ground.events,
        requests=requests,
        faults=Faults(config.faults.inject, rank=topology.rank, data_rank=topology.data_rank, life=ground.life),
        watch=ground.watch,
        outer=outer,
        monitor=monitor,
        prometheus=ground.prometheus,
    )


def _tell(
    run: Run,
    ground: _Ground,
    stage: StageConfig,
    place: StagePosition | None,
    *,
    checked: Checked,
    start: dict[str, Any],
) -> None:
    """How a life begins: events, lines for the person who watches."""
    run.events.write(
        "start",
        host=platform.node(),
        pid=os.getpid(),
        job=os.environ.get("SLURM_JOB_ID"),
        world=run.topology.size,
        step=run.step,
        budget=str(run.budget),
        stage=stage.name,
        place=None if place is None else str(place),
        versions=ground.versions,
        **start,
    )
    for note in checked.notes:
        logger.info(note)
    for problem in checked.damaged:
        logger.info(problem)
        run.events.write("passed_over", problem=problem)
    for change in checked.changes:
        logger.info(f"resumed with a changed setting: {change}")
        run.events.write("changed", setting=change)
    logger.info(_headline(run, stage, checked.indices, place))


def _headline(run: Run, stage: StageConfig, indices: Sequence[ShardIndex], place: StagePosition | None) -> str:
    topology, train = run.topology, run.train
    parameters = sum(torch.Size(shape).numel() for shape in run.engine.master_shards.shapes.values())
    kernels = ", ".join(f"{name}={kind}" for name, kind in run.state.kernels.items())
    samples = " + ".join(f"{index.samples:,}" for index in indices)
    return (
        f"{run.run_dir}: stage {stage.name}{f' ({place})' if place else ''}, {parameters / 1e6:.2f} M "
        f"parameters train on {samples} samples for {run.budget}; {_layout(topology)} on "
        f"{topology.device.type}, ZeRO {train.zero_stage}, {train.precision}, {kernels}; "
        + (f"resumed at step {run.step}" if run.step else "from step 0")
    )


def _layout(topology: Topology) -> str:
    degrees = topology.degrees
    split = [f"{axis} {n}" for axis, n in asdict(degrees).items() if n > 1]
    return f"{topology.size} process(es)" + (f" ({' × '.join(split)})" if len(split) > 1 else "")
