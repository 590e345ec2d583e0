"""Ranks of the engine tests: a small model in every ZeRO stage and precision trains, saves, resumes and reports."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.checkpoint.saver import Saver
from kairos_train.checkpoint.writing import write_checkpoint
from kairos_train.config.schema import Config
from kairos_train.training.engine.deepspeed_engine import TrainingEngine, build_engine, start_processes
from kairos_train.training.engine.ema import Ema
from kairos_train.training.engine.engine_state import gather_full_state, load_full_state, state_pieces
from kairos_train.training.engine.optimizer import lr_at
from parallel.sharding import ShardingRule, ShardingTable
from parallel.topology import Topology

STEPS, SAVED, MICRO, SAMPLES, WIDTH = 4, 2, 2, 4, 301


class Output(NamedTuple):
    video: Tensor
    action: Tensor | None


class Net(nn.Module):
    """Every kind of parameter, odd sizes (so that partitions are padded), two too large for stage 3 to keep whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 401)
        self.norm = nn.LayerNorm(401)
        self.conv = nn.Conv1d(7, 7, 3, padding=1, groups=7, bias=False)
        self.extra = nn.Linear(401, 5)
        self.fixed = nn.Linear(401, 303)
        self.outer = nn.Linear(303, 5)
        self.modulation = nn.Parameter(torch.randn(1, 6, 5))
        self.A_log = nn.Parameter(torch.randn(7))
        self.register_buffer("scale", torch.rand(5))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.fixed.requires_grad_(False)

    def forward(self, x: Tensor, extra: bool = True) -> Output:
        """x (B, WIDTH) -> (B, 5)."""
        dtype = self.modulation.dtype
        hidden = torch.tanh(self.norm(self.inner(x.to(dtype))))
        mixed = self.conv(hidden[:, None, :].expand(-1, 7, -1)) * torch.exp(self.A_log)[:, None]
        out = self.outer(torch.tanh(self.fixed(hidden + mixed.sum(1))))
        if extra:
            out = out + self.extra(hidden)
        return Output(out.float() * self.scale + self.modulation.sum(1).float(), None)


def make_net(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net()


def build(seed: int, config: Config, world: Topology) -> TrainingEngine:
    net = make_net(seed)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    table = ShardingTable.of([ShardingRule(".*", "replicated_full")], shapes, tensor=1)
    return build_engine(net, config.train, config.optimizer, topology=world, table=table, full_shapes=shapes)


def make_config(stage: int, precision: str) -> Config:
    config = Config()
    config.train.zero_stage, config.train.precision = stage, precision
    config.train.micro_batch, config.train.accumulation = SAMPLES, MICRO
    config.optimizer.lr, config.optimizer.warmup_steps, config.optimizer.weight_decay = 1e-2, 3, 0.1
    config.optimizer.gradient_clip = 10.0
    return config


def make_batch(step: int) -> tuple[Tensor, Tensor]:
    """x (MICRO, SAMPLES, WIDTH) and mask (MICRO, SAMPLES) of a global step; in step 1 all odd samples are padding."""
    rng = torch.Generator().manual_seed(100 + step)
    x = torch.randn(MICRO, SAMPLES, WIDTH, generator=rng)
    mask = torch.rand(MICRO, SAMPLES, generator=rng) < 0.8
    mask[0, 0] = True
    if step == 1:
        mask[:, 1::2] = False
    return x, mask


def local_sum(net: nn.Module | TrainingEngine, x: Tensor, mask: Tensor) -> Tensor:
    return ((net(x).video - 1) ** 2).sum(1)[mask].sum() * (1 if mask.any() else 0)


def train_step(engine: TrainingEngine, config: Config, step: int, *, poison: bool = False) -> tuple[str, str, bool]:
    """One optimiser step on this process' samples; returns global loss and norm, exactly, and whether it stepped."""
    world = engine.topology
    x, mask = make_batch(step)
    x, mask, valid = x[:, world.rank :: world.size], mask[:, world.rank :: world.size], int(mask.sum())
    engine.set_lr(lr_at(step, config.optimizer, STEPS))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(MICRO):
        part = local_sum(engine, x[i], mask[i])
        total += part.detach().double()
        if poison and i == 0 and world.rank == world.size - 1:
            part = part * float("inf")
        engine.backward(part * world.size / valid, last=i == MICRO - 1)
    result = engine.step()
    dist.all_reduce(total)
    return (total.item() / valid).hex(), result.norm.hex(), result.stepped


def digest(tensors: dict[str, Tensor]) -> str:
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(name.encode() + tensors[name].numpy().tobytes())
    return content.hexdigest()


def digest_state(engine: TrainingEngine, ema: Ema) -> dict[str, str]:
    """Digests of all sections, on rank 0. Collective."""
    sections, optimizer = gather_full_state(engine, ema.average)
    if engine.topology.rank != 0:
        return {}
    return {name: digest(tensors) for name, tensors in sections.items()} | {"optimizer": str(optimizer)}


def save(folder: Path, engine: TrainingEngine, ema: Ema) -> None:
    state = {"optimizer": {"updates": engine.master_shards.updates}, "ema": ema.state_dict()}
    world = engine.topology
    saver = Saver(folder, rank=world.rank, size=world.size, background=False)
    saver.save(SAVED, state_pieces(engine, ema.average), own_state={}, state=state, files={})


def evaluate(engine: TrainingEngine) -> str:
    with torch.no_grad():
        return local_sum(engine, make_batch(9)[0][0], torch.ones(SAMPLES, dtype=torch.bool)).item().hex()


def train(folder: Path, stage: int, precision: str) -> dict:
    """Four steps, with a checkpoint and a step of non-finite gradients after the second."""
    config, world = make_config(stage, precision), start_processes("cpu")
    name = f"{stage}-{precision}-{world.size}"
    engine = build(0 if world.rank == 0 else 5, config, world)
    ema = Ema(engine, 0.5)
    report = {"initial": digest_state(engine, ema), "steps": []}
    for step in range(STEPS):
        report["steps"].append(train_step(engine, config, step))
        ema.update()
        if step + 1 == SAVED:
            save(folder / name, engine, ema)
            report["before_poison"] = digest_state(engine, ema)
            report["poisoned"] = train_step(engine, config, 7, poison=True)
            report["after_poison"] = digest_state(engine, ema)
    report["final"] = digest_state(engine, ema)
    plain = evaluate(engine)
    with ema.in_model():
        report["averaged"] = evaluate(engine)
    report["plain"] = [plain, evaluate(engine)]
    report["after_averaging"] = digest_state(engine, ema)
    sections, _ = gather_full_state(engine, ema.average)
    if world.rank == 0:
        flat = {f"{section}/{k}": v for section in ("model", "ema") for k, v in sections[section].items()}
        save_file(flat, folder / f"final-{name}.safetensors")
    if precision == "bf16" and stage < 2:  # the others hang without the dummy pass that the training step makes
        report["norms_of_ranks"] = unequal_use(engine)
    engine.close()
    return report


def unequal_use(engine: TrainingEngine) -> list[float]:
    """Norms that the ranks see after a step in which only rank 0 used a layer."""
    engine.backward(engine(make_batch(0)[0][0], engine.topology.rank == 0).video.sum(), last=True)
    norms = torch.zeros(engine.topology.size, dtype=torch.float64)
    norms[engine.topology.rank] = engine.step().norm
    dist.all_reduce(norms)
    return norms.tolist()


def resume(folder: Path, stage: int, precision: str, sources: list[str]) -> dict[str, dict]:
    """Continue the checkpoints of other cases, one after the other in one engine."""
    config, world = make_config(stage, precision), start_processes("cpu")
    engine = build(11, config, world)
    ema = Ema(engine, 0.5)
    reports = {}
    for name in sources:
        reader = CheckpointReader(folder / name / f"step-{SAVED:08d}")
        load_full_state(engine, reader)
        ema.load(reader)
        report = {"loaded": digest_state(engine, ema), "steps": []}
        for step in range(SAVED, STEPS):
            report["steps"].append(train_step(engine, config, step))
            ema.update()
        report["final"] = digest_state(engine, ema)
        reports[name] = report
    engine.close()
    return reports


def refuse(folder: Path, stage: int, precision: str) -> dict:
    """Messages about checkpoints of other models and stages, and the engine's state before and after."""
    engine = build(11, make_config(stage, precision), start_processes("cpu"))
    ema = Ema(engine, 0.5)
    held, optimizer = gather_full_state(engine)
    sections = {section: {name: tensor + 1 for name, tensor in tensors.items()} for section, tensors in held.items()}
    model, moments = sections["model"], sections["exp_avg"]
    variants = [
        {"model": {**model, "scale": torch.ones(6)}},
        {"model": {name: tensor for name, tensor in model.items() if name != "fixed.weight"}},
        {"model": {**model, "other.weight": torch.ones(2)}},
        {"exp_avg": {name: tensor for name, tensor in moments.items() if name != "norm.bias"}},
        {"exp_avg": {**moments, "fixed.weight": model["fixed.weight"]}},
    ]
    messages, before = [], digest_state(engine, ema)
    for number, variant in enumerate(variants):
        path = write_checkpoint(
            folder, number, sections={**sections, **variant}, state={"optimizer": optimizer}, files={}
        )
        try:
            load_full_state(engine, CheckpointReader(path))
        except UserError as error:
            messages.append(str(error))
    engine.model.register_forward_hook(lambda module, inputs, output: SimpleNamespace(video=output.video))
    output = ""
    try:
        evaluate(engine)
    except TypeError as error:
        output = str(error)
    report = {"messages": messages, "before": before, "after": digest_state(engine, ema), "output": output}
    engine.close()
    return report
