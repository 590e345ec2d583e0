"""The model in DeepSpeed: processes, precision, ZeRO stage, backward and step.

One loss equation for every stage and parallel layout: a process passes `backward` the loss of its micro-batch as
local_sum · dp·cp / N_valid_of_the_whole_step, and the engine averages gradients over the dp·cp processes that hold the
same parameters and adds them over the micro-batches. Tensor ranks compute the same loss. DeepSpeed partitions, reduces,
clips and updates; this project does without its data loader, schedulers, batch arithmetic and checkpoints.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kairos_train.basics.errors import UserError
from kairos_train.config.schema import OptimizerConfig, TrainConfig
from kairos_train.training.engine import deepspeed_internals
from kairos_train.training.engine.master_shards import MasterShards
from kairos_train.training.engine.optimizer import Masters, build_optimizer, parameter_groups, set_lr
from kairos_train.training.engine.ownership import Ownership
from parallel.audit import audit
from parallel.config import ParallelConfig
from parallel.gradient_sync import gradient_norm, sum_partial_gradients
from parallel.mpu import DeepSpeedMpu
from parallel.sharding import Shape, ShardingTable, set_attributes
from parallel.topology import TIMEOUT, Degrees, Topology

LARGEST_BUCKET = 500_000_000  # elements reduced at once


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did."""

    norm: float  # 2-norm of the whole gradient before clipping; inf when it was not finite
    stepped: bool  # False: the gradient was not finite; the engine dropped it and changed no weight or moment


def device_kind(device: str) -> str:
    """What `train.device` comes to on this machine, "cpu" or "cuda", without taking it.

    Raises:
        UserError: no such name, or there is no CUDA device though it is asked for.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"train.device={device!r}: must be 'auto', 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda: this machine shows no CUDA device; use 'cpu' or 'auto'")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def start_processes(device: str, parallel: ParallelConfig | None = None) -> Topology:
    """Join the run's process group and take a position in its parallel layout. Collective.

    The group is torchrun's, or one of this process alone without torchrun.

    Only this function sets environment variables: DeepSpeed reads the local rank from there and, on a machine with GPUs
    that trains on the CPU, its accelerator.

    Args:
        device: "auto", "cpu" or "cuda". On CUDA each process takes the GPU of its local rank.
        parallel: degrees of tensor and context parallelism; None: all processes are data-parallel.

    Raises:
        UserError: there is no CUDA device though `device` names it, this process imported DeepSpeed for another device
            before, or the number of processes does not divide by the degrees.
    """
    kind = device_kind(device)
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("DS_ACCELERATOR", kind)
    # DeepSpeed calls collectives by their old names, several times a step.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    own = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(own)
    if not dist.is_initialized():
        launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        alone = {} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=TIMEOUT, **alone)
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != kind:
        raise UserError(
            f"train.device={device!r}: DeepSpeed already runs on {get_accelerator().device_name()!r} in this process;"
            " start a fresh one, without DS_ACCELERATOR in its environment"
        )
    return Topology.build(Degrees.of(parallel or ParallelConfig(), dist.get_world_size()), own)


def stop_processes() -> None:
    """Leave the process group at the end of a run that went well; the interpreter may end after this.

    Gloo's threads still hold the tensors of the last collective when it returns, and need the interpreter's lock to
    release them. A thread that asks for the lock while the interpreter shuts down aborts the process (exit code -6):
    the pause, without the lock, lets them finish.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.1)


class TrainingEngine:
    """The model under DeepSpeed. Built by `build_engine`.

    One optimiser step:

        engine.set_lr(lr)
        for i, micro_batch in enumerate(micro_batches):
            loss = ...engine(...)...              # the scaled loss described at the top of this file
            engine.backward(loss, last=i == len(micro_batches) - 1)
        result = engine.step()

    Every method is collective.

    Attributes:
        model: the wrapped module. Under ZeRO stage 3 its parameters are empty outside of its forward pass.
        optimizer: the torch optimizer underneath.
        deepspeed: the DeepSpeed engine.
        topology: this process among the others.
        ownership: which part of each tensor this process holds and writes.
        master_shards: the float32 masters of this process.
        frozen: float32 values, on the CPU, of the parameters that do not train and that this process writes.
    """

    def __init__(
        self,
        deepspeed: Any,
        optimizer: torch.optim.Optimizer,
        *,
        stage: int,
        topology: Topology,
        ownership: Ownership,
        frozen: dict[str, Tensor],
        hooks: Sequence[RemovableHandle],
    ) -> None:
        self.deepspeed = deepspeed
        self.optimizer = optimizer
        self.stage = stage
        self.topology = topology
        self.ownership = ownership
        self.model: nn.Module = deepspeed.module
        self.master_shards = MasterShards(deepspeed, optimizer, stage=stage, ownership=ownership)
        self.frozen = frozen
        self._hooks = hooks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass.

        Raises:
            TypeError: the output is no tensor, tuple, named tuple, list or dictionary. DeepSpeed's hooks look into
                nothing else: stage 1 in bf16 would add up the gradients of earlier micro-batches again.
        """
        output = self.deepspeed(*args, **kwargs)
        if not isinstance(output, Tensor | tuple | list | dict):
            raise TypeError(f"the model returned a {type(output).__name__}; under DeepSpeed it must be a (named) tuple")
        return output

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`; `last` marks the step's last micro-batch, whose backward reduces gradients."""
        if isinstance(self.optimizer, Masters):
            for parameter in self.optimizer.low_precision:
                if parameter.grad is None:  # DeepSpeed would fill in zeros of the parameter's own dtype
                    parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self) -> StepResult:
        """Clip and update, unless the norm of the whole gradient is not finite: then nothing changes."""
        if self.stage == 0:
            return self._step_unpartitioned()
        deepspeed_internals.count_all_gradients(self.deepspeed.optimizer)
        self.deepspeed.step()
        norm = float(self.deepspeed.get_global_grad_norm())
        return StepResult(norm=norm, stepped=self.deepspeed.was_step_applied())

    def _step_unpartitioned(self) -> StepResult:
        """Stage 0: DeepSpeed clips and steps without a check, so this takes the norm first."""
        norm = float(gradient_norm(self.model, self.topology))
        if math.isfinite(norm):
            self.deepspeed.step()
            return StepResult(norm=norm, stepped=True)
        self.deepspeed.zero_grad()
        return StepResult(norm=math.inf, stepped=False)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        set_lr(self.optimizer, lr)

    def close(self) -> None:
        """Release hooks and DeepSpeed's buffers, restore torch's `linear`; the process groups stay."""
        for hook in self._hooks:
            hook.remove()
        self.deepspeed.destroy()
        deepspeed_internals.restore_torch_linear()


def build_engine(
    model: nn.Module,
    train: TrainConfig,
    optimizer: OptimizerConfig,
    *,
    topology: Topology,
    table: ShardingTable,
    full_shapes: Mapping[str, Shape],
) -> TrainingEngine:
    """Put a model, with its float32 weights, under DeepSpeed. Collective.

    The first rank of each gradient group gives its weights and buffers to the whole group. Parameters that do not
    require gradients never change. In bf16 the masters start from float32 weights, not from their bfloat16 rounding,
    which costs 4 bytes per parameter of host memory on every process until this returns.

    Args:
        model: this tensor rank's shard of the model, replicated parameters with the same values on all tensor ranks.
        train: precision, ZeRO stage, batches.
        optimizer: the update.
        topology: of all processes.
        table: how tensor ranks hold each parameter of the model.
        full_shapes: of the parameters of the whole model.

    Raises:
        UserError: a ZeRO stage or precision that does not exist.
        ShardingError: the model does not fit the table, or copies differ between tensor ranks.
    """
    if train.zero_stage not in (0, 1, 2, 3):
        raise UserError(f"train.zero_stage={train.zero_stage}: must be 0, 1, 2 or 3")
    if train.precision not in ("bf16", "fp32"):
        raise UserError(f"train.precision={train.precision!r}: must be 'bf16' or 'fp32'")
    model.to(topology.device)
    _broadcast_first(model, topology)
    audit(model, table, topology, full_shapes=full_shapes)
    set_attributes(model, table)
    hooks = sum_partial_gradients(model, table, topology)
    named = dict(model.named_parameters())
    ownership = Ownership(table, topology, {name: tuple(p.shape) for name, p in named.items()})
    frozen = _float32_copies({n: p for n, p in named.items() if not p.requires_grad and n in ownership.copies})
    trainable = {name: p for name, p in named.items() if p.requires_grad}
    float32 = _float32_copies(trainable) if train.precision == "bf16" else {}
    masters = train.precision == "bf16" and train.zero_stage == 0
    if masters:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    groups = parameter_groups(model, optimizer.weight_decay)
    built = build_optimizer(groups, optimizer, masters=masters)
    settings = _deepspeed_config(model, train, clip=optimizer.gradient_clip)
    engine = _initialize(model, built, settings, topology)
    wrapped = TrainingEngine(
        engine, built, stage=train.zero_stage, topology=topology, ownership=ownership, frozen=frozen, hooks=hooks
    )
    for name, tensor in float32.items():
        wrapped.master_shards.scatter(name, tensor, wrapped.master_shards.masters)
    wrapped.master_shards.refresh()
    return wrapped


def _broadcast_first(model: nn.Module, topology: Topology) -> None:
    """Broadcast the first rank's weights to all ranks with the same shards: never across tensor ranks."""
    if topology.gradient_group is None:
        return
    first = topology.ranks("gradient")[0]
    for tensor in [*model.parameters(), *model.buffers()]:
        content = tensor.detach().reshape(-1).view(torch.uint8)  # bytes: backends do not know every dtype
        dist.broadcast(content, first, group=topology.gradient_group)
        tensor.data.copy_(content.view(tensor.dtype).view(tensor.shape))


def _float32_copies(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in parameters.items()}


def _deepspeed_config(model: nn.Module, train: TrainConfig, *, clip: float) -> dict[str, Any]:
    """DeepSpeed's configuration. Without `train_batch_size`: DeepSpeed would count every process as data-parallel."""
    bucket = min(LARGEST_BUCKET, sum(p.numel() for p in model.parameters()))
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": clip,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,  # plain gradient descent, tested here
        # Buckets are allocated at full size: for a small model DeepSpeed's default would be 2 GB.
        "zero_optimization": {
            "stage": train.zero_stage,
            "reduce_bucket_size": bucket,
            "stage3_param_persistence_threshold": train.stage3_param_persistence_threshold,
            "stage3_max_live_parameters": train.stage3_max_live_parameters,
            "stage3_max_reuse_distance": train.stage3_max_live_parameters,
        },
        "timers": {"throughput": {"enabled": False}},  # it synchronises the device in every step
    }
    if train.precision == "bf16" and train.zero_stage > 0:
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return settings


def _initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], topology: Topology
) -> Any:
    """`deepspeed.initialize`, without its lines on standard output."""
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed

        deepspeed_internals.do_not_compile_all_reduce()
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, mpu=DeepSpeedMpu(topology), dist_init_required=None
        )
    return engine
