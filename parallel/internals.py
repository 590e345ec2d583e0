"""Names of other packages that their documentation does not promise, each used in one file alone.

    DeepSpeed       `kairos_train.training.engine.deepspeed_internals`, which declares them beside their use
    Megatron-core   `parallel.megatron_linear`, declared here: that file cannot be imported without Megatron

`tests/unit/training/test_deepspeed_contract.py` looks up every declaration in the installed package, so that an upgrade
that moves a name fails by that name; `tests/unit/test_layers.py` keeps the names out of all other files.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Internal:
    """One undocumented name.

    Attributes:
        name: of the attribute, function or variable.
        file: where the package defines it, relative to the package.
        owner: the class that defines it or assigns it to itself; None: the module, or whatever object it assigns to.
        why: what this project needs it for.
        versions: first and last version of the package in which somebody read the definition.
        members: the arguments or fields that are used, in their order.
        shared: other code uses the same name for its own things, so that a search cannot keep it to one file.
    """

    name: str
    file: str
    owner: str | None
    why: str
    versions: tuple[str, str]
    members: tuple[str, ...] = ()
    shared: bool = False


LAYERS, READ = "core/tensor_parallel/layers.py", ("0.16.0", "0.16.1")
PRODUCT = ("input", "weight", "bias", "gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel")
PRODUCT += ("grad_output_buffer", "wgrad_deferral_limit", "tp_group")
"""Arguments of the functions that `_forward_impl` passes its own to."""

MEGATRON = (
    Internal("_forward_impl", LAYERS, "ColumnParallelLinear", "the product alone, without its collectives", READ),
    Internal("_forward_impl", LAYERS, "RowParallelLinear", "the product alone, without its collectives", READ),
    Internal("linear_with_grad_accumulation_and_async_allreduce", LAYERS, None, "that product", READ, PRODUCT),
    Internal("linear_with_frozen_weight", LAYERS, None, "that product where the weight is frozen", READ, PRODUCT),
)
