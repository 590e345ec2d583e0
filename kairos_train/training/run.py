"""The parts of a run, put together once: `open_run` builds or resumes them, `Run` holds them."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dataloaders.loader import ShardLoader, check_shards, sources_of
from dataloaders.shards import ShardIndex, read_index
from kairos_train.checkpoint.saver import Saver
from kairos_train.config.compose import save_config
from kairos_train.config.schema import Config
from kairos_train.errors import RunStopped
from kairos_train.model.layout import check_fp8, full_shapes, model_table
from kairos_train.objective.flow_matching import ConditionedBatch
from kairos_train.training import persist
from kairos_train.training.describe import chosen_kernels, peak_flops, sample_flops
from kairos_train.training.ema import Ema
from kairos_train.training.engine import TrainingEngine, build_engine, start_processes
from kairos_train.training.feed import Feed, check_index
from kairos_train.training.initial_weights import build_model
from kairos_train.training.random_state import derive_random_state
from kairos_train.training.step import StepReport
from kairos_train.training.telemetry import Telemetry
from kairos_train.training.validation import validate
from parallel.topology import Topology


@dataclass
class Run:
    """One stage being trained on this rank. A context manager: its end waits for the checkpoint in flight and closes.

    Attributes:
        step: optimiser steps done.
        samples: samples seen by all ranks.
    """

    config: Config
    topology: Topology
    feed: Feed
    loader: ShardLoader
    engine: TrainingEngine
    ema: Ema
    saver: Saver
    telemetry: Telemetry
    step: int
    samples: int

    @property
    def finished(self) -> bool:
        return self.step >= self.config.train.steps

    def next_batches(self) -> tuple[list[ConditionedBatch], float]:
        """The micro-batches of the next step, and the seconds that were waited for data."""
        begin = time.perf_counter()
        raw = [next(self.loader) for _ in range(self.config.train.accumulation)]
        waited = time.perf_counter() - begin
        return [self.feed.condition(batch, step=self.step) for batch in raw], waited

    def check_finite(self, report: StepReport, batches: list[ConditionedBatch]) -> None:
        """Say which samples a non-finite step had, and stop if `train.on_nonfinite` says so. Collective when it is.

        Raises:
            RunStopped: under `stop`; no weight has changed in that step.
        """
        if report.finite:
            return
        keys: list[list[str]] = [[] for _ in range(self.topology.size)]
        dist.all_gather_object(keys, [key for batch in batches for key in batch.keys])
        what = f"step {self.step}: loss {report.loss}, gradient norm {report.grad_norm}"
        where = f"samples {', '.join(sorted({key for rank in keys for key in rank}))}"
        if self.config.train.on_nonfinite == "stop":
            raise RunStopped(f"{what} is not finite; {where}; inspect them, or continue with train.on_nonfinite=skip")
        self.telemetry.say(f"{what} is not finite, the update was skipped; {where}")

    def record(self, report: StepReport, batches: list[ConditionedBatch], *, lr: float, data_wait: float) -> None:
        """Count the step and tell of it."""
        self.step, self.samples = self.step + 1, self.samples + report.samples
        batch = batches[0]
        actions = 0 if batch.action is None else batch.action.shape[1]
        _, ph, pw = self.config.model.video.patch_size
        tokens = batch.latents[0, 0].numel() // (ph * pw) + actions
        flops = sample_flops(self.config, batch.latents.shape[1:], batch.context.shape[1], actions)
        self.telemetry.step(
            self.step,
            report,
            lr=lr,
            flops=report.samples * flops,
            tokens=report.samples * tokens,
            data_wait=data_wait,
        )

    def follow_up(self) -> None:
        """What comes after a step when its time has come: report, validation, checkpoint. The last step has all."""
        train = self.config.train
        self.saver.check()
        if self._due(train.log_every):
            self.loader.sync()
            self.telemetry.report(self.step, corrupt=sum(entry["count"] for entry in self.loader.skipped.values()))
        begin = time.perf_counter()
        if self.config.data.validation_shards and self._due(train.validate_every):
            self._validate("raw")
            with self.ema.in_model():
                self._validate("ema")
        if self._due(train.checkpoint_every):
            state = self.saver, self.engine, self.ema, self.loader, self.feed, self.config
            persist.save(*state, step=self.step, samples=self.samples)
        self.telemetry.pause(time.perf_counter() - begin)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, *, failed: bool = False) -> None:
        """Wait for the checkpoint in flight, close files and loader processes, release the engine.

        Args:
            failed: the run ends by an error; then the checkpoint's failure is not raised on top of it.

        Raises:
            UserError: the last checkpoint could not be written.
        """
        try:
            self.saver.close(failed=failed)
        finally:
            self.telemetry.close()
            self.loader.close()
            self.engine.close()

    def _due(self, every: int) -> bool:
        return every > 0 and (self.finished or self.step % every == 0)

    def _validate(self, weights: str) -> None:
        losses = validate(self.engine, self.feed, self.config)
        self.telemetry.scalars(self.step, {f"validation_{weights}/{stream}": loss for stream, loss in losses.items()})
        text = "  ".join(f"{stream} {loss:.4f}" for stream, loss in losses.items())
        self.telemetry.say(f"step {self.step}/{self.config.train.steps}  validation with {weights} weights  {text}")


def open_run(config: Config) -> Run:
    """Build a stage's run, or resume it from the newest valid checkpoint of `run_dir` (`train.resume`).

    Raises:
        UserError: something in the configuration, the shards or the checkpoint does not fit the rest.
    """
    # First what can be known before any device is taken.
    folders = [*(source.shards for source in sources_of(config.data)), *filter(None, [config.data.validation_shards])]
    index, *_ = indices = [read_index(folder) for folder in folders]
    for each in indices:
        check_index(config, each)
        if config.data.on_corrupt == "stop":
            check_shards(each)
    check_fp8(config)
    reader, damaged = persist.find_resumable(config)
    changes = persist.changed_settings(config, reader) if reader else []

    topology = start_processes(config.train.device, config.parallel)
    changes += persist.changed_layout(config, topology, reader) if reader else []
    derive_random_state(config.seed, 0, topology.rank)
    feed = Feed(config, index, topology.device)
    loader = _open_loader(config, topology, with_frames=feed.needs_frames)
    model = build_model(config, feed.identity, topology)
    table = model_table(config, model)
    engine = build_engine(model, config, topology=topology, table=table, full_shapes=full_shapes(config))
    ema = Ema(engine, config.train.ema_decay)
    step = reader.step if reader else 0
    samples = persist.restore(engine, ema, loader, feed, config, reader) if reader else 0
    saver = persist.open_saver(config, topology)

    run_dir = Path(config.run_dir)
    if topology.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.yaml")
    telemetry = Telemetry(
        run_dir,
        first_step=step,
        steps=config.train.steps,
        peak_flops=peak_flops(config, topology.device),
        world=topology.size,
        enabled=topology.rank == 0,
    )
    for problem in damaged:
        telemetry.say(problem)
    for change in changes:
        telemetry.say(f"resumed with a changed setting: {change}")
    telemetry.say(_headline(config, index, engine, step))
    return Run(config, topology, feed, loader, engine, ema, saver, telemetry, step, samples)


def _open_loader(config: Config, topology: Topology, *, with_frames: bool) -> ShardLoader:
    """Batches of this rank's share of the data; ranks that share a sample get the same."""

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * topology.size
        dist.all_gather_object(values, value)
        return values

    data, rank = config.data, topology.rank
    return ShardLoader(
        sources_of(data),
        batch_size=config.train.micro_batch,
        accumulation=config.train.accumulation,
        seed=config.seed,
        rank=topology.data_rank,
        world_size=topology.degrees.data,
        workers=data.workers,
        tokens_per_micro_batch=data.tokens_per_micro_batch,
        streams=data.streams,
        shuffle_buffer=data.shuffle_buffer,
        temperature=data.temperature,
        on_corrupt=data.on_corrupt,
        max_corrupt=data.max_corrupt,
        quarantine=Path(config.run_dir) / "quarantine.jsonl" if rank == 0 else None,
        gather=gather if topology.size > 1 else None,
        with_frames=with_frames,
        pin_memory=topology.device.type == "cuda",
        timeout=data.timeout,
        cache_dir=data.cache_dir,
        cache_gb=data.cache_gb,
    )


def _headline(config: Config, index: ShardIndex, engine: TrainingEngine, step: int) -> str:
    parameters = sum(torch.Size(shape).numel() for shape in engine.layout.shapes.values())
    kernels = ", ".join(f"{name}={kind}" for name, kind in chosen_kernels(config, engine.topology.device).items())
    return (
        f"{config.run_dir}: stage {config.stage.name}, {parameters / 1e6:.2f} M parameters train on {index.samples} "
        f"samples; {_layout(engine.topology)} on {engine.topology.device.type}, ZeRO {config.train.zero_stage}, "
        f"{config.train.precision}, {kernels}; " + (f"resumed at step {step}" if step else "from step 0")
    )


def _layout(topology: Topology) -> str:
    degrees = topology.degrees
    split = [f"{axis} {n}" for axis, n in asdict(degrees).items() if n > 1]
    return f"{topology.size} process(es)" + (f" ({' × '.join(split)})" if len(split) > 1 else "")
