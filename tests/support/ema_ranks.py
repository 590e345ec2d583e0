"""The one rank of the tests of the moving average: a small engine whose masters the test sets."""

from __future__ import annotations

import torch
from torch import nn

from kairos_train.config.schema import Config
from kairos_train.training.engine.deepspeed_engine import TrainingEngine, build_engine, start_processes
from kairos_train.training.engine.ema import Ema
from kairos_train.training.engine.initial_weights import InitialAverage
from parallel.sharding import ShardingRule, ShardingTable


def make_engine() -> TrainingEngine:
    config = Config()
    config.train.zero_stage, config.train.precision = 0, "fp32"
    net = nn.Linear(2, 2, bias=False)
    table = ShardingTable.of([ShardingRule(".*", "replicated_full")], ["weight"], tensor=1)
    topology = start_processes("cpu")
    return build_engine(
        net, config.train, config.optimizer, topology=topology, table=table, full_shapes={"weight": (2, 2)}
    )


def set_masters(engine: TrainingEngine, value: float) -> None:
    for master in engine.master_shards.masters:
        master.fill_(value)
    engine.master_shards.refresh()


def averages(decay: float, values: list[float], start: tuple[float, int] | None = None, **options: bool) -> list[float]:
    """The average after the start at the first value and after each update with the next one.

    Args:
        start: value and updates of an average to go on from.
    """
    engine = make_engine()
    set_masters(engine, values[0])
    if start is not None:
        options["start"] = InitialAverage(lambda name, part: torch.full((2, 2), start[0])[part], start[1])
    ema, found = Ema(engine, decay, **options), []
    found.append(ema.average[0].mean().item())
    for value in values[1:]:
        set_masters(engine, value)
        ema.update()
        found.append(ema.average[0].mean().item())
    assert ema.state_dict() == {"updates": len(values) - 1 + (start[1] if start else 0)}
    engine.close()
    return found


def exchanged() -> list[list[float]]:
    """Masters, average and what the model computes with: before, within and after `in_model`."""
    engine = make_engine()
    set_masters(engine, 1.0)
    ema = Ema(engine, 0.5)
    set_masters(engine, 5.0)

    def seen() -> list[float]:
        held = (engine.master_shards.masters[0], ema.average[0], next(engine.model.parameters()))
        return [x.detach().mean().item() for x in held]

    found = [seen()]
    with ema.in_model():
        found.append(seen())
    found.append(seen())
    engine.close()
    return found
