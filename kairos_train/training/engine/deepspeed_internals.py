"""Everything that the project takes from DeepSpeed beyond its documentation, and nothing else.

DeepSpeed has no public way to the float32 masters of a rank, to the reduced gradients before a step, or to the moment
when the weights that the model computes with are made from the masters again. Each function here is one such need;
`INTERNALS` declares every name behind it (see `parallel.internals`). All other files use these functions and what
DeepSpeed documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from parallel.internals import Internal

READ = ("0.19.0", "0.19.8")
"""DeepSpeed versions whose definitions of these names agree."""

BF16, STAGE_1_2 = "runtime/bf16_optimizer.py", "runtime/zero/stage_1_and_2.py"
STAGE_3, PARTITIONS = "runtime/zero/stage3.py", "runtime/zero/partition_parameters.py"
ZERO_UTILITIES = "runtime/zero/utils.py"
LINKAGE, FRAGMENT = "utils/mixed_precision_linkage.py", "utils/tensor_fragment.py"
ZERO_1_2, ZERO_3 = "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"

INTERNALS = (
    Internal("_hp_mapping", LINKAGE, None, "stages 1 and 2: a parameter's fragment in this rank's partition", READ),
    Internal("param_group_index", FRAGMENT, "tensor_fragment", "which partition that is", READ),
    Internal("hp_fragment_address", FRAGMENT, "tensor_fragment", "where in the partition", READ),
    Internal("lp_fragment_address", FRAGMENT, "tensor_fragment", "where in the parameter", READ),
    Internal("fragment_address", FRAGMENT, None, "what an address consists of", READ, members=("numel", "start")),
    Internal("fp32_partitioned_groups_flat", STAGE_3, ZERO_3, "stage 3: the masters, outside of a step too", READ),
    Internal("grad_position", STAGE_3, ZERO_3, "stage 3: (flat tensor, start, elements) of a parameter", READ),
    Internal("get_param_id", STAGE_3, ZERO_3, "the key of grad_position", READ, members=("param",)),
    Internal("ds_shape", PARTITIONS, None, "stage 3: a parameter's shape while it is partitioned", READ),
    Internal("ds_tensor", PARTITIONS, None, "stage 3: the storage of a rank's part of a weight", READ),
    Internal("update_lp_params", BF16, "BF16_Optimizer", "weights from masters, stage 1 in bf16", READ),
    Internal("update_lp_params", STAGE_1_2, ZERO_1_2, "weights from masters, stages 1 and 2 otherwise", READ),
    Internal("_partition_all_parameters", STAGE_3, ZERO_3, "before weights are made from masters in stage 3", READ),
    Internal(
        "_reassign_or_swap_out_partitioned_parameters",
        *(STAGE_3, ZERO_3, "weights from masters, stage 3", READ),
        members=("sub_group_id",),
    ),
    Internal("persistent_parameters", STAGE_3, ZERO_3, "stage 3: those that stay whole and are gathered again", READ),
    Internal("all_gather", PARTITIONS, None, "how they are gathered", READ, members=("param_list",), shared=True),
    Internal("fp32_groups_has_gradients", BF16, "BF16_Optimizer", "which gradients count in the norm", READ),
    Internal("bf16_groups", BF16, "BF16_Optimizer", "the parameters of each group", READ),
    Internal("_index_in_param_group", LINKAGE, None, "the key of get_lp_grad_fragment", READ),
    Internal(
        "get_lp_grad_fragment",
        *(FRAGMENT, "tensor_fragment", "stages 1 and 2: reduced gradients before the step", READ),
        members=("index_in_param_group",),
    ),
    Internal("fp32_groups_gradients_flat", BF16, "BF16_Optimizer", "memory of gradients, stage 1 in bf16", READ),
    Internal("averaged_gradients", STAGE_1_2, ZERO_1_2, "memory of gradients, stages 1 and 2 otherwise", READ),
    Internal("grad_partitions_flat_buffer", STAGE_3, ZERO_3, "memory of gradients, stage 3", READ),
    Internal(
        "apply_to_tensors_only",
        *(ZERO_UTILITIES, None, "which tensors of a module's output ZeRO 3 hooks", READ),
        members=("function", "value"),
    ),
    Internal("__compatible_ops__", "ops/__init__.py", None, "keep DeepSpeed from compiling an operator", READ),
    Internal("deepspeed_shm_comm", "ops/op_builder/cpu/comm.py", None, "the name of that operator", READ),
    Internal("shm_comm_op", "comm/torch.py", "TorchBackend", "whether it was compiled all the same", READ),
    Internal("cdb", "comm/comm.py", None, "DeepSpeed's communication backend", READ),
    Internal("all_gather_function", "comm/torch.py", "TorchBackend", "a function of torch that it keeps", READ),
    Internal("reduce_scatter_function", "comm/torch.py", "TorchBackend", "a function of torch that it keeps", READ),
    Internal("mpu", "utils/groups.py", None, "outlives its engine: forget it before another topology", READ),
)

TORCH_LINEAR = nn.functional.linear
"""torch's own. DeepSpeed replaces it by one of other rounding when it makes an engine of stage 3, for the whole process
and for good."""


# --- around an engine ---


def do_not_compile_all_reduce() -> None:
    """Keep DeepSpeed from compiling its all-reduce for inference on CPUs. Call before `deepspeed.initialize`.

    Nothing here uses that operator, and a process that is killed while it compiles leaves a lock file for which all
    later processes on the machine wait for ever.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def restore_torch_linear() -> None:
    """Give torch its own `linear` back once an engine of stage 3 is closed."""
    nn.functional.linear = TORCH_LINEAR


def forget_mpu() -> None:
    """Let the next engine of this process have another topology."""
    from deepspeed.utils import groups

    groups.mpu = None


# --- masters ---


@dataclass(frozen=True)
class Fragment:
    """`numel` elements, from `inside` on in the flattened parameter, from `start` on in flat tensor number `flat`."""

    flat: int
    start: int
    inside: int
    numel: int


def local_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of a tensor rank's part of a parameter, also while stage 3 has it partitioned over the gradient group."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def partitioned_masters(wrapper: Any) -> list[Tensor]:
    """Stage 3: the flat float32 masters of this rank. The `param_groups` of the optimizer have them in a step only.

    Args:
        wrapper: DeepSpeed's optimizer around the torch one.
    """
    return list(wrapper.fp32_partitioned_groups_flat)


def partitioned_fragment(wrapper: Any, parameter: nn.Parameter, numel: int, rank: int) -> Fragment | None:
    """Stage 3: the fragment of a parameter on this rank; None: all of it is padding.

    Args:
        numel: elements of the parameter, partitioned or not.
        rank: in the gradient group, over which DeepSpeed partitions.
    """
    flat, start, size = wrapper.grad_position[wrapper.get_param_id(parameter)]
    inside = size * rank
    size = min(size, numel - inside)
    return Fragment(flat=flat, start=start, inside=inside, numel=size) if size > 0 else None


def linked_fragment(parameter: nn.Parameter) -> Fragment | None:
    """Stages 1 and 2: the fragment of a parameter on this rank; None: there is none."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    return Fragment(
        flat=mapping.param_group_index,
        start=mapping.hp_fragment_address.start,
        inside=mapping.lp_fragment_address.start,
        numel=mapping.lp_fragment_address.numel,
    )


def refresh_linked(wrapper: Any) -> None:
    """Stages 1 and 2: make the weights that the model computes with from the masters. Collective."""
    wrapper.update_lp_params()


def refresh_partitioned(wrapper: Any) -> None:
    """Stage 3: make the weights that the model computes with from the masters. Collective."""
    wrapper._partition_all_parameters()
    for index in range(len(wrapper.fp32_partitioned_groups_flat)):
        wrapper._reassign_or_swap_out_partitioned_parameters(index)
    if wrapper.persistent_parameters:  # small ones stay whole on every process
        wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)


# --- gradients between the last backward pass of a step and the step ---


def count_all_gradients(wrapper: Any) -> None:
    """Let every parameter count in the gradient norm; only DeepSpeed's optimizer of stage 1 in bf16 needs it.

    That one counts a parameter only on ranks that had a gradient for it themselves. Gradients are reduced by now: ranks
    that count differently would clip differently.
    """
    if hasattr(wrapper, "fp32_groups_has_gradients"):
        wrapper.fp32_groups_has_gradients = [[True] * len(group) for group in wrapper.bf16_groups]


def gradient_fragment(parameter: nn.Parameter) -> Tensor | None:
    """Stages 1 and 2: the reduced float32 gradient of a parameter's fragment, a flat view; None: there is no fragment.

    Raises:
        RuntimeError: DeepSpeed holds something else than the whole gradient or the fragment.
    """
    fragment = linked_fragment(parameter)
    if fragment is None:
        return None
    gradient = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).reshape(-1)
    if gradient.numel() == parameter.numel():  # whole on every rank, or wholly here
        return gradient.narrow(0, fragment.inside, fragment.numel)
    if gradient.numel() != fragment.numel:
        raise RuntimeError(f"DeepSpeed holds {gradient.numel()} elements of a gradient, its partition {fragment.numel}")
    return gradient


# --- what DeepSpeed sees and holds, for tests and measurements ---


def hooked_tensors(output: Any) -> list[Tensor]:
    """The tensors in a module's output that ZeRO 3 hooks: it gathers weights in the order in which gradients come."""
    from deepspeed.runtime.zero.utils import apply_to_tensors_only

    found: list[Tensor] = []

    def hook(x: Tensor) -> Tensor:
        found.append(x)
        return x

    apply_to_tensors_only(hook, output)
    return found


def weight_partition(parameter: nn.Parameter) -> Tensor | None:
    """Stage 3: this rank's part of a weight; None in other stages."""
    return getattr(parameter, "ds_tensor", None)


def gradient_buffers(wrapper: Any) -> Iterator[Tensor]:
    """Reduced gradients that are no longer with their parameters, in any stage."""
    if hasattr(wrapper, "grad_partitions_flat_buffer"):
        yield wrapper.grad_partitions_flat_buffer
        return
    yield from getattr(wrapper, "fp32_groups_gradients_flat", ())
    for group in getattr(wrapper, "averaged_gradients", {}).values():
        yield from group or ()


def kept_collectives() -> list[tuple[Any, str]]:
    """(object, attribute) of every function of `torch.distributed` that DeepSpeed has kept for itself."""
    from deepspeed.comm import comm

    return [(comm.cdb, name) for name in ("all_gather_function", "reduce_scatter_function")]


def compiled_all_reduce() -> Any:
    """The operator that `do_not_compile_all_reduce` prevents; None where it did."""
    from deepspeed.comm import comm

    return comm.cdb.shm_comm_op
