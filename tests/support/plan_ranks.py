"""One rank of the tests of `kairos-train plan`: what the real engine holds, and what the real collectives bring."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from support.allocations import activation_peak, loss_of, model_inputs
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from kairos_train.config.compose import load_config
from kairos_train.config.schema import Config
from kairos_train.model.layout import full_shapes, model_table
from kairos_train.plan.layout import Layout, SampleShape
from kairos_train.plan.memory import Memory, memory
from kairos_train.plan.traffic import Received, received
from kairos_train.training.engine.deepspeed_engine import TrainingEngine, build_engine, start_processes, stop_processes
from kairos_train.training.engine.deepspeed_internals import gradient_buffers, kept_collectives, weight_partition
from kairos_train.training.engine.ema import Ema
from kairos_train.training.engine.initial_weights import build_model
from parallel.topology import Topology

TEXT_TOKENS = 8
SECTIONS = ("model", "kernels", "stage", "optimizer", "parallel", "precision", "train", "data.window")


def configure(overrides: list[str]) -> Config:
    common = ["model=tiny", "encoders=weight_free", "data=demo", "train.device=cpu", "train.micro_batch=1"]
    return load_config([*common, *overrides], sections=SECTIONS)


def planned(config: Config, topology: Topology) -> tuple[Memory, Received]:
    layout = Layout.of(config, SampleShape.of(config, TEXT_TOKENS), gpus=topology.size)
    return memory(layout, topology.context_rank), received(layout, topology.context_rank)


# --- memory ---


def held(overrides: list[str]) -> tuple[dict[str, int], dict[str, float]]:
    """Bytes of the tensors that this rank holds in its second step, by category, and what was planned.

    "rest" is whatever is alive besides, right after the backward passes: DeepSpeed's buckets.
    """
    config = configure(overrides)
    topology = start_processes("cpu", config.parallel)
    others = _alive()  # kept until the end, so that their addresses are not used again
    engine, ema = _engine(config, topology)
    counted: Counter[str] = Counter()
    for step in range(2):
        for last in (False, True):
            _backward(engine, config, last=last)
            for name, size in _categories(engine, ema, others).items() if step else ():
                counted[name] = max(counted[name], size)
        engine.step()
        ema.update()
    engine.close()
    return dict(counted), planned(config, topology)[0].categories()


def held_cases(cases: list[list[str]]) -> list[tuple[dict[str, int], dict[str, float]]]:
    return [held(overrides) for overrides in cases]


def _engine(config: Config, topology: Topology) -> tuple[TrainingEngine, Ema]:
    model = build_model(config, topology=topology)
    table = model_table(config, model)
    shapes = full_shapes(config)
    engine = build_engine(model, config.train, config.optimizer, topology=topology, table=table, full_shapes=shapes)
    return engine, Ema(engine, 0.5)


def _backward(engine: TrainingEngine, config: Config, *, last: bool) -> None:
    inputs = model_inputs(config, SampleShape.of(config, TEXT_TOKENS), config.train.micro_batch)
    engine.backward(loss_of(engine(**inputs)), last=last)


def _categories(engine: TrainingEngine, ema: Ema, others: list[Tensor]) -> dict[str, int]:
    parameters, optimizer = list(engine.model.parameters()), engine.optimizer
    weights = _storages([x for p in parameters for x in (p.data, weight_partition(p))])
    states = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x) and x.ndim]
    found = {
        "weights": weights,
        "gradients": _storages([p.grad for p in parameters] + list(gradient_buffers(engine.deepspeed.optimizer))),
        "optimizer": _less(_storages([*engine.master_shards.masters, *states]), weights),
        "ema": _storages(ema.average),
    }
    rest = _less(_storages(_alive()), _storages(others), *found.values())
    return {name: sum(sizes.values()) for name, sizes in {**found, "rest": rest}.items()}


def _alive() -> list[Tensor]:
    gc.collect()
    return [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"]


def _storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Address → bytes, each storage once."""
    storages = [x.untyped_storage() for x in tensors if x is not None]
    return {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}


def _less(sizes: dict[int, int], *known: dict[int, int]) -> dict[int, int]:
    return {address: size for address, size in sizes.items() if not any(address in k for k in known)}


def activations_here(overrides: list[str], size: int) -> list[tuple[int, float]]:
    """Peak bytes of every rank's forward and backward, and what was planned: all ranks, one after another, here."""
    config = configure(overrides)
    found = []
    for rank in range(size):
        with nothing_sent(rank, size):
            topology = start_processes("cpu", config.parallel)
            measured = activation_peak(config, SampleShape.of(config, TEXT_TOKENS), config.train.micro_batch, topology)
            found.append((measured, planned(config, topology)[0].activations))
    return found


@contextmanager
def nothing_sent(rank: int, size: int) -> Iterator[None]:
    """This process as `rank` of `size` in torch's group whose collectives do nothing, at once.

    A thread of gloo keeps the tensors of a collective until its turn comes, and torch's profiler does not see what it
    frees: a peak measured there depends on what else the machine does.
    """
    stop_processes()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    exchange, dist.all_to_all_single = dist.all_to_all_single, lambda *_, **__: None  # this group refuses empty inputs
    try:
        yield
    finally:
        dist.all_to_all_single = exchange
        stop_processes()


# --- traffic ---


def counted_traffic(overrides: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes that reach this rank in one optimiser step, by group, and what was planned."""
    config = configure(overrides)
    topology = start_processes("cpu", config.parallel)
    engine, _ = _engine(config, topology)
    step = range(config.train.accumulation)
    for i in step:  # stage 3 learns the order of the layers
        _backward(engine, config, last=i == step[-1])
    engine.step()
    with counting() as by_group:
        for i in step:
            _backward(engine, config, last=i == step[-1])
        engine.step()
    engine.close()
    groups = {"tensor": topology.tensor_group, "context": topology.context_group, "data": topology.gradient_group}
    found = {name: by_group[group.group_name] if group is not None else 0.0 for name, group in groups.items()}
    return found, planned(config, topology)[1].by_group


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Group name → bytes that collectives bring to this rank, by the formulas of `kairos_train.plan.traffic`."""
    counts: Counter[str] = Counter()

    def bytes_of(x: Any) -> int:
        if isinstance(x, Tensor):
            return x.numel() * x.element_size()
        return sum(map(bytes_of, x)) if isinstance(x, list) else 0

    def counted(function: Callable[..., Any], size: Callable[..., float]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values()]
            group = next((x for x in given if isinstance(x, dist.ProcessGroup)), dist.group.WORLD)
            counts[group.group_name] += size(group, [x for x in given if isinstance(x, Tensor | list)])
            return function(*args, **kwargs)

        return wrapper

    def whole(group: dist.ProcessGroup, given: list[Any]) -> float:
        """The largest tensor of an all-gather or reduce-scatter is the whole."""
        return max(map(bytes_of, given)) * (group.size() - 1) / group.size()

    def twice(group: dist.ProcessGroup, given: list[Any]) -> float:
        return 2 * whole(group, given)

    def arriving(group: dist.ProcessGroup, given: list[Any]) -> float:
        return bytes_of(given[0])  # nobody sends to itself here

    gathers = ("all_gather", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor")
    sizes = {"all_reduce": twice, "all_to_all_single": arriving, "reduce_scatter_single": whole}
    sizes |= dict.fromkeys(gathers, whole)
    places = [(dist, name, size) for name, size in sizes.items() if hasattr(dist, name)]
    places += [(owner, name, whole) for owner, name in kept_collectives()]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    kept.append((dist, "batch_isend_irecv", dist.batch_isend_irecv))

    def batch(operations: list[Any]) -> Any:
        for operation in operations:
            if operation.op is dist.irecv:
                counts[operation.group.group_name] += bytes_of(operation.tensor)
        return kept[-1][2](operations)

    try:
        for owner, name, size in places:
            setattr(owner, name, counted(getattr(owner, name), size))
        dist.batch_isend_irecv = batch
        yield counts
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)
