"""Ranks of the tests of what is measured while training: real steps of a small model in a layout, measured."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.parallel_training_ranks import make_config, topology

from kairos_train.config.operation_schema import MonitorConfig
from kairos_train.config.schema import Config
from kairos_train.model import ModelOutput
from kairos_train.model.layout import full_shapes, model_table
from kairos_train.objective.flow_matching import FlowMatching
from kairos_train.training.engine.deepspeed_engine import TrainingEngine, build_engine
from kairos_train.training.engine.initial_weights import build_model
from kairos_train.training.measure.block_norms import block_kind, block_squares
from kairos_train.training.measure.collective_times import METHODS, CollectiveTimes
from kairos_train.training.measure.monitor import Monitor
from kairos_train.training.measure.stragglers import BusyTimes
from kairos_train.training.parity.compare import make_batches, perturb, reference_config
from kairos_train.training.step import global_counts, scaled_loss


class Training:
    """Steps of a layout, with a place between backward and update."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.topology = topology(config.parallel.tensor, config.parallel.context)
        model = build_model(config, topology=self.topology)
        table = model_table(config, model)
        perturb(model, table, self.topology, config.seed)
        self.engine: TrainingEngine = build_engine(
            model,
            config.train,
            config.optimizer,
            topology=self.topology,
            table=table,
            full_shapes=full_shapes(config),
        )
        self.objective = FlowMatching(config.stage, seed=config.seed, patch=tuple(config.model.video.patch_size[1:]))

    def accumulate(self, step: int) -> None:
        batches = make_batches(self.config, self.objective, step, self.topology)
        counts, degrees = global_counts(batches, self.topology), self.topology.degrees
        for i, batch in enumerate(batches):
            output = ModelOutput(*self.engine(**batch.model_inputs()))
            frames = self.engine.model.local_frames(batch.latents.shape[2])
            sums = self.objective.loss_sums(batch, output.video, output.action, frames)
            loss = degrees.data * degrees.context * scaled_loss(self.config.stage, sums, counts, degrees.context)
            self.engine.backward(loss, last=i == len(batches) - 1)

    def update(self) -> float:
        self.engine.set_lr(1e-3)
        return self.engine.step().norm


def block_norms(overrides: str, steps: int = 2) -> list[tuple[dict[str, float], float]]:
    """Of each step: norms by kind, and the norm that DeepSpeed clips by."""
    training, found = Training(make_config(overrides)), []
    for step in range(steps):
        training.accumulate(step)
        norms = block_squares(training.engine).norms(training.topology)
        found.append((norms, training.update()))
    training.engine.close()
    return found


def plain_block_norms(overrides: str, ranks: int, steps: int = 2) -> list[dict[str, float]]:
    """The same of one process, straight from `.grad`."""
    training, found = Training(reference_config(make_config(overrides), ranks)), []
    for step in range(steps):
        training.accumulate(step)
        squares: dict[str, float] = {}
        for name, p in training.engine.model.named_parameters():
            if p.grad is not None:
                kind = block_kind(name, training.engine.model.kinds)
                squares[kind] = squares.get(kind, 0.0) + float(p.grad.double().pow(2).sum())
        found.append({f"grad_norm/{kind}": total**0.5 for kind, total in squares.items()})
        training.update()
    training.engine.close()
    return found


def collectives(overrides: str) -> dict[str, Any]:
    """One step, timed and profiled at once: what was counted, and how many collectives torch itself has seen
    among several ranks."""
    training = Training(make_config(overrides))
    training.accumulate(0)
    training.update()
    alone, before = training.topology.self_group, _methods()
    times, first = CollectiveTimes(training.topology), alone._get_sequence_number_for_group()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler, times:
        training.accumulate(1)
        training.update()
    training.engine.close()
    seen = sum(event.name.startswith("c10d::") for event in profiler.events())
    seen -= alone._get_sequence_number_for_group() - first  # groups of one, in which nobody waits
    return {
        "seconds": times.seconds,
        "calls": times.calls,
        "elapsed": times.elapsed,
        "seen": seen,
        "restored": _methods() == before,
    }


def late_rank(late: int, seconds: float) -> tuple[list[tuple[int, str, float]], float, dict[str, float]]:
    """Collectives to which one rank comes late: the stragglers, seconds of waiting here, and values for metrics."""
    here = topology(1, 1)
    busy = BusyTimes(here, factor=1.3)
    with CollectiveTimes(here) as times:
        if here.rank == late:
            time.sleep(seconds)
        for _ in range(3):
            dist.all_reduce(torch.ones(1), group=here.gradient_group)
    comparison = busy.compare(times.busy)
    stragglers = [(s.rank, s.host, s.factor) for s in comparison.stragglers]
    return stragglers, times.seconds["gradient"], comparison.values()


def monitored(overrides: str) -> dict[str, Any]:
    """Two steps, the second of them timed, and what is reported of them."""
    training = Training(make_config(overrides))
    monitor = Monitor(training.engine, MonitorConfig(), Path(tempfile.mkdtemp()))
    norms = []
    for number in (1, 2):
        with monitor.step(number, timed=number == 2):
            with monitor.clock.phase("forward_backward"):
                training.accumulate(number)
            monitor.before_update()
            with monitor.clock.phase("update"):
                norms.append(training.update())
    measured, again = monitor.report(steps=2), monitor.report(steps=1)
    training.engine.close()
    return {"values": measured.values, "norms": norms, "again": again.values}


def unmeasured_norms(overrides: str) -> list[float]:
    """The same steps without a monitor."""
    training, norms = Training(make_config(overrides)), []
    for number in (1, 2):
        training.accumulate(number)
        norms.append(training.update())
    training.engine.close()
    return norms


def failing_step() -> bool:
    """Whether torch is as it was after a step that raised."""
    before = _methods()
    try:
        with CollectiveTimes(topology(1, 1)):
            dist.all_reduce(torch.ones(1), group=topology(1, 1).gradient_group)
            raise RuntimeError("out of memory")
    except RuntimeError:
        dist.all_reduce(torch.ones(1))
    return _methods() == before


def asynchronous_and_batched() -> dict[str, dict[str, float]]:
    """Collectives that are waited for later, point-to-point batches, object gathers, and a group of one."""
    here = topology(1, 1)
    other = (here.rank + 1) % here.size
    x = torch.ones(4)
    with CollectiveTimes(here) as times:
        works = [dist.all_reduce(x.clone(), group=here.gradient_group, async_op=True) for _ in range(3)]
        if here.rank:
            time.sleep(0.2)
        works.append(dist.all_reduce(x.clone(), group=here.gradient_group, async_op=True))
        for work in works:
            work.wait()
        pair = [
            dist.P2POp(dist.isend, x, group=here.gradient_group, group_peer=other),
            dist.P2POp(dist.irecv, torch.empty(4), group=here.gradient_group, group_peer=other),
        ]
        for work in dist.batch_isend_irecv(pair):
            work.wait()
        dist.all_reduce(x.clone(), group=here.self_group)
        dist.all_gather_object([None] * here.size, "x")
    return {"seconds": times.seconds, "calls": times.calls}


def _methods() -> list[Any]:
    """What the classes hold, which is not what looking a method up gives."""
    held = vars(dist.ProcessGroup)
    return [held[name] for name in METHODS if name in held] + [vars(dist.Work)["wait"]]
