"""What each rank does in the tests of `parallel`: topology, regions, linear layers, gradient sums, audit, DeepSpeed.

Every model here exists twice in one class: with `Topology.single` it is the reference, else a rank's share of it.
Shapes: B batch, F frames, L tokens per frame, D width, W hidden width, H heads, E head width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kairos_train.training.engine import deepspeed_internals
from parallel import collectives
from parallel.audit import audit
from parallel.gradient_sync import gradient_norm, sum_partial_gradients
from parallel.linear import column_linear, row_linear
from parallel.mpu import DeepSpeedMpu
from parallel.sharding import ShardingError, ShardingRule, ShardingTable, set_attributes
from parallel.topology import AXES, Degrees, Topology

CPU = torch.device("cpu")
SINGLE = Topology.single(CPU)


def topology(tensor: int = 2, context: int = 1, data: int = 2) -> Topology:
    return Topology.build(Degrees(tensor=tensor, context=context, data=data), CPU)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Equal numbers in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- topology and adapter ---


def groups(tensor: int, context: int, data: int) -> dict[str, Any]:
    """Ranks of each group as torch has them, coordinates, and what DeepSpeed is told."""
    t = topology(tensor, context, data)
    mpu = DeepSpeedMpu(t)
    found = {kind: getattr(t, f"{kind}_group") for kind in AXES}
    return {
        "ranks": {kind: group and tuple(dist.get_process_group_ranks(group)) for kind, group in found.items()},
        "alone": dist.get_process_group_ranks(t.self_group),
        "coordinates": (t.tensor_rank, t.context_rank, t.data_rank),
        "model": (mpu.get_model_parallel_rank(), dist.get_process_group_ranks(mpu.get_model_parallel_group())),
        "data": (mpu.get_data_parallel_rank(), dist.get_process_group_ranks(mpu.get_data_parallel_group())),
        "sizes": (mpu.get_tensor_model_parallel_world_size(), mpu.get_data_parallel_world_size()),
        "firsts": (mpu.get_tensor_model_parallel_src_rank(), mpu.get_data_parallel_group_ranks()[0]),
    }


def groups_of_two_calls() -> tuple[bool, bool, int]:
    """Whether the same layout is the same object, whether another is another one, and how many groups that made."""
    first, other = topology(), topology(tensor=1, context=2)
    before = dist.get_pg_count()
    again = topology()
    return again is first, other is first, dist.get_pg_count() - before


def wrong_size() -> str:
    try:
        Topology.build(Degrees(tensor=3), CPU)
    except ValueError as error:
        return str(error)
    return ""


# --- regions ---


def region(
    name: str, dim: int | None, shape: tuple[int, ...], dtype: torch.dtype, *, contiguous: bool = False
) -> tuple[Tensor, ...]:
    """Input, output, gradient of the output, gradient of the input; all differ by rank."""
    t = topology()
    where = () if dim is None else (dim,)

    def numbers(seed: int, *shape: int) -> Tensor:
        if contiguous:
            return random(seed, *shape, dtype=dtype)
        return random(seed, *reversed(shape), dtype=dtype).permute(*reversed(range(len(shape))))

    x = numbers(t.rank, *shape).requires_grad_()
    before = x.detach().clone()
    out = getattr(collectives, name)(x, *where, t.tensor_group)
    gradient = numbers(10 + t.rank, *out.shape)
    kept = gradient.clone()
    out.backward(gradient)
    assert torch.equal(x, before), "a region changed its input"
    assert torch.equal(gradient, kept), "a region changed the gradient that it was given"
    return x.detach(), out.detach(), gradient, x.grad


def uneven_tokens() -> str:
    try:
        collectives.scatter_sums(torch.ones(2, 3), 1, topology().tensor_group)
    except ValueError as error:
        return str(error)
    return ""


# --- linear layers ---

MLP_RULES = (ShardingRule(r"up\.\w+", "column"), ShardingRule(r"down\.weight", "row"))


class Mlp(nn.Module):
    """Column, SiLU, row, on tokens that are shared between ranks on the way in and out if `sequence`."""

    def __init__(self, dim: int, hidden: int, topology: Topology, *, sequence: bool, bias: bool = True) -> None:
        super().__init__()
        self.group, self.sequence = topology.tensor_group, sequence
        self.up = column_linear(dim, hidden, bias=bias, topology=topology)
        self.down = row_linear(hidden, dim, bias=bias, topology=topology, sequence=sequence)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, L, D) → the same, whole on every rank."""
        if not self.sequence:
            return self.down(F.silu(self.up(collectives.copy_to(x, self.group))))
        x = collectives.split_tokens(x, 2, self.group)
        x = self.down(F.silu(self.up(collectives.gather_tokens(x, 2, self.group))))
        return collectives.join_tokens(x, 2, self.group)


def table_of(model: nn.Module, rules: tuple[ShardingRule, ...], t: Topology) -> ShardingTable:
    names = [name for name, _ in model.named_parameters()]
    return ShardingTable.of(rules, names, tensor=t.degrees.tensor)


def fill(model: nn.Module, table: ShardingTable, t: Topology) -> None:
    """Parameters by name, as slices of the same full tensors in any layout."""
    for i, (name, parameter) in enumerate(model.named_parameters()):
        shape = table.full_shape(name, tuple(parameter.shape))
        full = random(1000 + i, *shape) / shape[-1] ** 0.5
        parameter.data.copy_(full[table.slices(name, shape, t.tensor_rank)])


def mlp_gradients(
    *,
    sharded: bool,
    sequence: bool,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    frozen: bool = False,
    bias: bool = True,
) -> dict[str, Any]:
    """Output and gradients of Σ out·c, by name, and how each parameter is split."""
    t = topology() if sharded else SINGLE
    with default_dtype(dtype):
        model = Mlp(shape[-1], 12, t, sequence=sequence and sharded, bias=bias)
    rules = (*MLP_RULES, ShardingRule(r"down\.bias", "replicated_partial" if sequence else "replicated_full"))
    table = table_of(model, rules, t)
    fill(model, table, t)
    model.requires_grad_(not frozen)
    sum_partial_gradients(model, table, t)
    x = random(1, *shape, dtype=dtype).requires_grad_()
    out = model(x)
    (out * random(2, *shape, dtype=dtype)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    splits = {name: shard.dim for name, shard in table.entries.items()}
    return {
        "out": out.detach(),
        "x": x.grad,
        "gradients": gradients,
        "splits": splits,
        "state": list(model.state_dict()),
    }


def meta_layers() -> list[tuple[Any, ...]]:
    """Device, dtype and shape of parameters made on the meta device, and a strict round trip of state dicts."""
    t = topology()
    with torch.device("meta"), default_dtype(torch.bfloat16):
        made = [column_linear(4, 6, bias=True, topology=t), row_linear(6, 4, bias=True, topology=t, sequence=True)]
    found = [(p.device.type, p.dtype, tuple(p.shape)) for layer in made for p in layer.parameters()]
    real = Mlp(4, 6, t, sequence=True)
    real.load_state_dict(Mlp(4, 6, t, sequence=True).state_dict(), strict=True)
    return found


def full_width_norm(*, sharded: bool) -> tuple[Tensor, ...]:
    """RMSNorm over a width that ranks share: output, gradients of input and weight."""
    t = topology() if sharded else SINGLE
    width = 8 // t.degrees.tensor
    own = slice(t.tensor_rank * width, (t.tensor_rank + 1) * width)
    full, weight = random(1, 2, 3, 8).requires_grad_(), random(2, 8)[own].requires_grad_()
    x = collectives.copy_to(full, t.tensor_group)[..., own]
    squares = collectives.reduce_both(x.pow(2).sum(-1, keepdim=True), t.tensor_group)
    out = x * torch.rsqrt(squares / 8 + 1e-6) * weight
    (out * random(3, 2, 3, 8)[..., own]).sum().backward()
    return out.detach(), full.grad, weight.grad


# --- gradient sums ---


def summed_gradient(*, recompute: str, dtype: torch.dtype, wide: bool) -> dict[str, Tensor]:
    """A weight on every rank, used twice by two micro-batches of tokens, half of them on each tensor rank.

    Returns:
        The gradient with hooks, and after their removal; and the gradient that one process has.
    """
    t = topology()
    model = nn.ParameterDict({"partial": torch.ones(4, dtype=dtype), "full": torch.ones(4, dtype=dtype)})
    frozen = model["frozen"] = nn.Parameter(torch.ones(4), requires_grad=False)
    rules = (ShardingRule("partial|frozen", "replicated_partial"), ShardingRule("full", "replicated_full"))
    handles = sum_partial_gradients(model, table_of(model, rules, t), t)
    if wide:
        model["partial"].grad_dtype = torch.float32

    def gradients(tokens: slice) -> dict[str, Tensor]:
        model.zero_grad()
        for micro_batch in range(2):
            x = random(micro_batch, 6, 4, dtype=dtype)[tokens].requires_grad_()

            def layer(x: Tensor) -> Tensor:
                return torch.tanh(x * model["partial"]) * model["partial"] + model["full"] * frozen.to(dtype)

            run = (
                layer
                if recompute == "none"
                else functools.partial(checkpoint, layer, use_reentrant=recompute == "reentrant")
            )
            run(run(x)).sum().backward()
        return {name: p.grad.clone() for name, p in model.items() if p.grad is not None}

    own = slice(3 * t.tensor_rank, 3 * t.tensor_rank + 3)
    hooked = gradients(own)
    for handle in handles:
        handle.remove()
    return {"hooked": hooked, "unhooked": gradients(own), "single": gradients(slice(None))}


# --- audit ---


def audited(fault: str) -> str:
    """The audit's complaint on this rank about a model with one fault."""
    t = topology()
    model = Mlp(4, 6, t, sequence=False)
    rules = (*MLP_RULES, ShardingRule(r"down\.bias", "replicated_full"))
    table = table_of(model, rules, t)
    fill(model, table, t)
    shapes = {name: table.full_shape(name, tuple(p.shape)) for name, p in model.named_parameters()}
    if fault == "missing entry":
        model.extra = nn.Parameter(torch.ones(1))
    if fault == "missing entry on one rank" and t.rank == 2:
        model.extra = nn.Parameter(torch.ones(1))
    if fault == "tensor copy" and t.tensor_rank == 1:  # on all data ranks alike
        model.down.bias.data[0] = torch.nextafter(model.down.bias.data[0], torch.tensor(9.0))
    if fault == "split copy" and t.data_rank == 1 and t.tensor_rank == 0:
        model.up.weight.data[0, 0] += 1
    if fault == "shape" and t.rank == 1:
        model.down.weight = nn.Parameter(torch.ones(4, 6))
    if fault == "frozen" and t.rank == 2:
        model.up.bias.requires_grad_(False)
    if fault == "order" and t.rank == 0:
        model.up, model.down = model._modules.pop("up"), model._modules.pop("down")
        model._modules = dict(reversed(model._modules.items()))
    try:
        audit(model, table, t, full_shapes=shapes)
    except ShardingError as error:
        return str(error)
    return "passed"


# --- under DeepSpeed ---

HEADS, HEAD, DIM = 4, 2, 6
TOY_RULES = (
    ShardingRule(r"(mlp|frozen)\.up\.\w+", "column"),
    ShardingRule(r"(mlp|frozen)\.down\.weight", "row"),
    ShardingRule(r"(mlp|frozen)\.down\.bias|norm\.\w+|head\.\w+", "replicated_partial"),
    ShardingRule(r"q\.weight", "column"),
    ShardingRule("q_norm", "head"),
    ShardingRule("head_norm", "replicated_partial"),
    ShardingRule(r"o\.weight", "row"),
    ShardingRule(r"embed\.\w+", "replicated_full"),
)


class Toy(nn.Module):
    """Parameters of every kind, trained and frozen, between an embedding and a head; tokens are shared by ranks."""

    def __init__(self, t: Topology) -> None:
        super().__init__()
        self.group, sequence = t.tensor_group, t.tensor_group is not None
        self.heads = HEADS // t.degrees.tensor
        self.embed = nn.Linear(3, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.q = column_linear(DIM, HEADS * HEAD, bias=False, topology=t)
        self.q_norm = nn.Parameter(torch.empty(self.heads * HEAD))
        self.head_norm = nn.Parameter(torch.empty(HEAD))
        self.o = row_linear(HEADS * HEAD, DIM, bias=False, topology=t, sequence=sequence)
        for name in ("mlp", "frozen"):
            block = self.add_module(name, nn.Module()) or getattr(self, name)
            block.up = column_linear(DIM, 8, bias=True, topology=t)
            block.down = row_linear(8, DIM, bias=True, topology=t, sequence=sequence)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, L, 3) → the same, whole on every rank."""
        x = collectives.split_tokens(self.embed(x), 2, self.group)
        q = self.q(collectives.gather_tokens(self.norm(x), 2, self.group))
        squares = collectives.reduce_both(q.pow(2).sum(-1, keepdim=True), self.group)
        q = q * torch.rsqrt(squares / (HEADS * HEAD) + 1e-6) * self.q_norm
        q = torch.tanh(q.unflatten(-1, (self.heads, HEAD)) * self.head_norm).flatten(-2)
        x = x + self.o(q)
        for block in (self.mlp, self.frozen):
            x = x + block.down(F.silu(block.up(collectives.gather_tokens(x, 2, self.group))))
        return collectives.join_tokens(self.head(x), 2, self.group)


STEPS, CLIP, LR = 3, 0.5, 0.1
SAMPLES, ACCUMULATION = 4, 2


def toy_loss(model: Any, step: int, samples: range, dtype: torch.dtype) -> Tensor:
    """Squared errors of some samples of a step, divided by the tokens of all."""
    x = random(50 + step, SAMPLES, 2, 4, 3)[samples.start : samples.stop]
    out = model(x.to(dtype)).double()
    return (out - x.roll(1, -1)).pow(2).sum() / (SAMPLES * 2 * 4)


def toy_reference() -> tuple[list[float], dict[str, Tensor]]:
    """Gradient norms and last weights of plain torch in one process."""
    model = Toy(SINGLE)
    fill(model, table_of(model, TOY_RULES, SINGLE), SINGLE)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer, norms = torch.optim.SGD(trainable, lr=LR, momentum=0.9), []
    for step in range(STEPS):
        optimizer.zero_grad()
        toy_loss(model, step, range(SAMPLES), torch.float32).backward()
        norms.append(float(nn.utils.clip_grad_norm_(trainable, CLIP)))
        optimizer.step()
    return norms, {name: p.detach() for name, p in model.named_parameters()}


def toy_under_deepspeed(stage: int, precision: str, degrees: tuple[int, int, int]) -> dict[str, Any]:
    """The same steps under DeepSpeed: this rank's norms, weights, and how each is split."""
    import deepspeed

    t = topology(*degrees)
    copies = t.degrees.context * t.degrees.data
    copy = t.data_rank * t.degrees.context + t.context_rank
    model = Toy(t)
    table = table_of(model, TOY_RULES, t)
    fill(model, table, t)
    set_attributes(model, table)
    sum_partial_gradients(model, table, t)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIP,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    if precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR, momentum=0.9)
    deepspeed_internals.do_not_compile_all_reduce()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=DeepSpeedMpu(t))
    dtype, norms = torch.bfloat16 if precision == "bf16" else torch.float32, []
    share = SAMPLES // copies // ACCUMULATION
    for step in range(STEPS):
        for micro_batch in range(ACCUMULATION):
            first = (copy * ACCUMULATION + micro_batch) * share
            engine.set_gradient_accumulation_boundary(micro_batch == ACCUMULATION - 1)
            loss = toy_loss(engine, step, range(first, first + share), dtype) * copies
            engine.backward(loss.float(), scale_wrt_gas=False)
        if stage == 0:
            norms.append(float(gradient_norm(model, t)))
        engine.step()
        if stage > 0:
            norms.append(float(engine.get_global_grad_norm()))
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.destroy()
    deepspeed_internals.forget_mpu()
    deepspeed_internals.restore_torch_linear()
    return {"norms": norms, "weights": weights, "splits": {name: shard.dim for name, shard in table.entries.items()}}
