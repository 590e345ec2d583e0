"""What the ranks of the checkpoint tests do: train a small split net in any layout, save it, load it, go on."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kairos_train.basics.errors import MachineFault
from kairos_train.checkpoint.canonical import CheckpointReader, checkpoint_path
from kairos_train.checkpoint.intact import find_intact
from kairos_train.checkpoint.saver import Saver
from kairos_train.checkpoint.writing import whole_pieces
from kairos_train.config.schema import Config
from kairos_train.training.engine.deepspeed_engine import TrainingEngine, build_engine, start_processes
from kairos_train.training.engine.ema import Ema
from kairos_train.training.engine.engine_state import gather_full_state, load_full_state, state_pieces
from kairos_train.training.engine.optimizer import lr_at
from parallel.collectives import copy_to, reduce_from
from parallel.config import ParallelConfig
from parallel.sharding import ShardingRule, ShardingTable
from parallel.topology import Topology

STEPS, SAVED, MICRO, SAMPLES = 4, 2, 2, 8
INPUT, HEADS, HEAD, MIDDLE = 301, 4, 334, 304  # two weights are too large for stage 3 to keep whole, on 4 tensor ranks
RULES = (
    ShardingRule("inner.(weight|bias)", "column"),
    ShardingRule("gain", "head"),
    ShardingRule("shared", "replicated_partial"),
    ShardingRule("fixed", "row"),
    ShardingRule("outer.(weight|bias)|modulation|offset", "replicated_full"),
)


@dataclass(frozen=True)
class Layout:
    """How the processes of a world train."""

    tensor: int = 1
    context: int = 1
    stage: int = 1
    precision: str = "fp32"
    optimizer: str = "adamw"


class Net(nn.Module):
    """Every kind of parameter, trainable and frozen; one tensor rank's part of it.

    x (B, INPUT) → heads, split → frozen row weight, summed over ranks → (B, 5).
    """

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        self.group, tensor = topology.tensor_group, topology.degrees.tensor
        self.heads = HEADS // tensor
        self.inner = nn.Linear(INPUT, HEADS * HEAD // tensor)
        self.gain = nn.Parameter(torch.empty(HEADS * HEAD // tensor))
        self.shared = nn.Parameter(torch.empty(HEAD))
        self.fixed = nn.Parameter(torch.empty(MIDDLE, HEADS * HEAD // tensor), requires_grad=False)
        self.offset = nn.Parameter(torch.empty(MIDDLE), requires_grad=False)
        self.outer = nn.Linear(MIDDLE, 5)
        self.modulation = nn.Parameter(torch.empty(1, 6, 5))
        self.register_buffer("scale", torch.empty(5))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = copy_to(x.to(self.modulation.dtype), self.group)
        hidden = torch.tanh(self.inner(x)) * self.gain
        hidden = (hidden.unflatten(-1, (self.heads, HEAD)) * self.shared).flatten(-2)
        middle = torch.tanh(reduce_from(F.linear(hidden, self.fixed), self.group) + self.offset)
        return ((self.outer(middle) + self.modulation.sum(1)).float() * self.scale,)


def full_values(seed: int) -> dict[str, Tensor]:
    """Of the whole net; every name with the randomness of its own."""
    alone = Net(Topology.single(torch.device("cpu")))
    values = {}
    for number, (name, tensor) in enumerate(alone.state_dict().items()):
        rng = torch.Generator().manual_seed(1000 * seed + number)
        values[name] = torch.randn(tensor.shape, generator=rng) / max(1, tensor[0].numel()) ** 0.5
    return values


def build(layout: Layout, seed: int) -> tuple[TrainingEngine, Config]:
    config = Config()
    config.train.zero_stage, config.train.precision = layout.stage, layout.precision
    config.optimizer.name = layout.optimizer
    config.parallel = ParallelConfig(tensor=layout.tensor, context=layout.context)
    config.optimizer.lr, config.optimizer.warmup_steps, config.optimizer.gradient_clip = 1e-2, 3, 1.0
    topology = start_processes("cpu", config.parallel)
    first = topology.ranks("gradient")[0] == topology.rank
    net, values = Net(topology), full_values(seed if first else seed + 50)  # the others are given the first one's
    table = ShardingTable.of(RULES, [name for name, _ in net.named_parameters()], tensor=layout.tensor)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(values[name][table.slices(name, values[name].shape, topology.tensor_rank)])
        net.scale.copy_(values["scale"])
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    engine = build_engine(net, config.train, config.optimizer, topology=topology, table=table, full_shapes=shapes)
    return engine, config


def train_step(engine: TrainingEngine, config: Config, step: int) -> tuple[float, float]:
    """Loss and gradient norm of a step whose samples are dealt over the gradient group, some of them padding."""
    rng = torch.Generator().manual_seed(100 + step)
    x, mask = torch.randn(MICRO, SAMPLES, INPUT, generator=rng), torch.rand(MICRO, SAMPLES, generator=rng) < 0.7
    mask[:, 0] = True
    ranks = engine.topology.ranks("gradient")
    mine, valid = slice(ranks.index(engine.topology.rank), None, len(ranks)), int(mask.sum())
    engine.set_lr(lr_at(step, config.optimizer, STEPS))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(MICRO):
        kept = mask[i, mine]
        part = ((engine(x[i, mine])[0] - 1) ** 2).sum(1)[kept].sum()
        total += part.detach().double()
        engine.backward(part * len(ranks) / valid, last=i == MICRO - 1)
    result = engine.step()
    if engine.topology.gradient_group is not None:
        dist.all_reduce(total, group=engine.topology.gradient_group)
    return float(total) / valid, result.norm


def digests(engine: TrainingEngine, ema: Ema) -> dict[str, str]:
    """Of all sections, bit for bit, on rank 0. Collective."""
    sections, optimizer = gather_full_state(engine, ema.average)
    found = {"optimizer": str(optimizer)} if sections else {}
    for section, tensors in sections.items():
        content = hashlib.sha256()
        for name in sorted(tensors):
            content.update(f"{name} {tuple(tensors[name].shape)}".encode() + tensors[name].numpy().tobytes())
        found[section] = content.hexdigest()
    return found


def save(saver: Saver, engine: TrainingEngine, ema: Ema, step: int) -> None:
    state = {"optimizer": {"updates": engine.master_shards.updates}, "ema": ema.state_dict()}
    rank = engine.topology.rank
    rng = whole_pieces({f"rank{rank}.torch": torch.full((3,), rank, dtype=torch.uint8)})
    sections = {**state_pieces(engine, ema.average), "rng": rng}
    saver.save(step, sections, own_state={"rank": rank}, state=state, files={"config.yaml": "seed: 0\n"})


def train(folder: Path | None, layout: Layout, *, background: bool = True) -> dict:
    """All steps without interruption, with a checkpoint after SAVED of them while the others go on."""
    engine, config = build(layout, seed=1)
    ema = Ema(engine, 0.5)
    rank, size = engine.topology.rank, engine.topology.size
    saver = Saver(folder, rank=rank, size=size, background=background) if folder else None
    report = {"steps": []}
    for step in range(STEPS):
        report["steps"].append(train_step(engine, config, step))
        ema.update()
        if saver and step + 1 == SAVED:
            report["saved"] = digests(engine, ema)
            save(saver, engine, ema, SAVED)
    report["final"] = digests(engine, ema)
    if saver:
        saver.close()
    engine.close()
    return report


def resume(folder: Path, layout: Layout) -> dict:
    """Load the checkpoint into a net of other values, validate with the average, go on."""
    engine, config = build(layout, seed=2)
    ema = Ema(engine, 0.9)
    reader = CheckpointReader(checkpoint_path(folder, SAVED))
    load_full_state(engine, reader)
    ema.load(reader)
    ema.decay = 0.5
    report = {"loaded": digests(engine, ema)}
    x = torch.randn(SAMPLES, INPUT, generator=torch.Generator().manual_seed(9))
    with ema.in_model(), torch.no_grad():
        report["averaged"] = engine(x)[0]
    report["after_averaging"] = digests(engine, ema)
    report["steps"] = []
    for step in range(SAVED, STEPS):
        report["steps"].append(train_step(engine, config, step))
        ema.update()
    engine.close()
    return report


def written_by_one() -> dict[str, int]:
    """Bytes that this rank would write of each section of a net whose gradient group holds copies."""
    engine, _ = build(Layout(tensor=2, stage=0), seed=1)
    pieces = state_pieces(engine, engine.master_shards.masters)
    engine.close()
    return {section: sum(p.tensor.nbytes for p in held) for section, held in pieces.items()}


def newest_intact(parent: Path, unreadable: Path) -> tuple[Path | None, list[str]] | str:
    """What a run continues from, where the last rank's disk does not read one file; or the fault that is raised."""
    rank, size = dist.get_rank(), dist.get_world_size()
    stat = os.stat

    def failing(path, **how):
        if str(path) == str(unreadable) and rank == size - 1:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return stat(path, **how)

    os.stat = failing
    try:
        return find_intact(parent, start_processes("cpu", ParallelConfig()))
    except MachineFault as fault:
        return str(fault)
    finally:
        os.stat = stat


def save_on_a_full_disk(folder: Path) -> list[str | None]:
    """Three saves; in the second, the disk of rank 1 takes no more than a few bytes. What each of them raised."""
    rank, size = dist.get_rank(), dist.get_world_size()
    saver = Saver(folder, rank=rank, size=size)
    tensors = {f"rank{rank}": torch.arange(5000.0)}
    told = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in (1, 2, 3):
        if step == 2 and rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        message = None
        try:
            saver.save(step, {"model": whole_pieces(tensors)}, own_state={}, state={}, files={})
            saver.close()
        except MachineFault as error:
            message = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        told.append(message)
        dist.barrier()
    return told


def save_without_rank_one(folder: Path) -> str | None:
    """Rank 1 never writes. What rank 0 raised."""
    rank, size = dist.get_rank(), dist.get_world_size()
    saver = Saver(folder, rank=rank, size=size, patience=0.3)
    if rank == 0:
        saver.save(1, {"model": whole_pieces({"a": torch.ones(3)})}, own_state={}, state={}, files={})
    try:
        saver.close()
    except MachineFault as error:
        return str(error)
    return None
