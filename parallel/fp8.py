"""FP8 in the linear layers of the blocks: which layers take it, and what computes them.

FP8 goes where the arithmetic is: q, k, v, o of self- and cross-attention, both layers of the FFN, q, k, v, g, o
projections of Gated DeltaNet layers. Everything else keeps its precision: it is small, but its errors would not be:
  a_proj, b_proj            H outputs each; a decay's rounding error is raised to the power of the sequence length
  embeddings, heads         first and last layers: the velocity gets their rounding directly
  time MLPs, modulations    computed in float32 already; they scale whole frames
  norms, convolutions       no matrix products
The model asks its parallel hooks for the first of these as `high_precision` layers and makes the others without hooks.

Recipes of Transformer Engine (written for versions 2.9 to 2.20, where `autocast` takes a `recipe`): weights stay in
bfloat16, because ZeRO flattens parameters, and each use quantizes them.
  current   one scale per tensor, from the tensor itself; E4M3 forward, E5M2 gradients
  delayed   one scale per tensor, from the largest magnitudes of earlier steps; E4M3 forward, E5M2 gradients
  block     one scale per 1×128 values (weights 128×128), E4M3 (needs CUDA 12.9 too)
  mxfp8     one power-of-two scale per 32 values, E4M3
and `emulated`, which is `current` without FP8 matrix units (`parallel.fp8_emulated`).

Scales and ranks. Each rank multiplies its own shard with scales of its own and divides them out before sums cross
ranks, in bfloat16. So ranks need not agree on scales: `current`, `block` and `mxfp8` communicate nothing (a column
layer's input is whole on every tensor rank, where it gets the same scale). `delayed` alone keeps state, and reduces its
magnitudes over the tensor group, so that replicas of a tensor stay replicas; checkpoints do not hold its state, and a
resumed run starts without it.

What is rounded more than once (measured: docs/numerics.md, "FP8 rounding"). A context rank projects the three tokens of
a convolution's halo by themselves, with scales of their own: no further from float32 than with the shard's. Weights are
rounded in every micro-batch, to the same values; keeping them would take one or two bytes per parameter on each rank,
and cannot be had under ZeRO 3, which gathers other copies.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kairos_train.basics.errors import UserError
from parallel.config import Fp8Config
from parallel.fp8_emulated import EmulatedFp8Linear

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

RECIPE_CLASSES = {
    "current": "Float8CurrentScaling",
    "delayed": "DelayedScaling",
    "block": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
"""Recipe → its class in transformer_engine.common.recipe."""

CAPABILITIES = {"current": (8, 9), "delayed": (8, 9), "block": (9, 0), "mxfp8": (10, 0)}
"""Minimum compute capability of each recipe."""

MINIMUM_VERSION = (2, 9)
"""Of Transformer Engine: the first with `transformer_engine.pytorch.autocast`."""

INSTEAD = "or use precision.fp8.recipe=emulated (studies only, slower) or precision.fp8.recipe=null"


@dataclass(frozen=True)
class Fp8Policy:
    """Which linear layers of the blocks are computed in FP8, and how.

    Attributes:
        config: `precision.fp8`.
        num_layers: of the model; negative `skip_layers` count from its end.
    """

    config: Fp8Config
    num_layers: int

    @property
    def recipe(self) -> str | None:
        return self.config.recipe

    @property
    def alignment(self) -> int:
        """Both local widths of a layer, and its number of tokens, must be multiples of this.

        Matrix units read FP8 in 16-byte rows, in both orders of the operands (backward transposes them); MXFP8 scales
        32 values together.
        """
        return {None: 1, "emulated": 1, "mxfp8": 32}.get(self.recipe, 16)

    def applies(self, stream: str, layer: int) -> bool:
        """Whether layers of `stream` ("video", "action") at depth `layer` are in FP8; `high_precision` ones are not."""
        skipped = {skip % self.num_layers for skip in self.config.skip_layers}
        return self.recipe is not None and stream in self.config.streams and layer not in skipped


def make_linear(
    policy: Fp8Policy,
    in_features: int,
    out_features: int,
    *,
    bias: bool = True,
    complete: Callable[[Tensor], Tensor] | None = None,
    group: ProcessGroup | None = None,
) -> nn.Linear:
    """One FP8 layer, or one rank's shard of it. Parameters are `weight` and `bias`, as in `nn.Linear`.

    Args:
        in_features, out_features: local widths, after the split.
        complete: of a row layer: completes the sum over tensor ranks (all-reduce, or reduce-scatter over tokens); the
            bias follows, once. None: the product is complete.
        group: tensor ranks, None when there is one. Recipe `delayed` uses it.

    Raises:
        UserError: a width that the recipe cannot take.
    """
    for features in (in_features, out_features):
        if fault := width_fault(policy, features):
            raise UserError(fault)
    if policy.recipe == "emulated":
        assert complete is None, "recipe emulated is for whole tensors"
        return EmulatedFp8Linear(in_features, out_features, bias=bias)
    return TransformerEngineLinear(policy, in_features, out_features, bias=bias, complete=complete, group=group)


class TransformerEngineLinear(nn.Linear):
    """`nn.Linear` whose products Transformer Engine computes in FP8, without communication.

    The module owns its parameters, so that checkpoints, ZeRO and the sharding table see a plain linear layer and no
    `_extra_state`. The first forward pass makes Transformer Engine's module (it needs CUDA), which borrows them.
    x (…, I) in bfloat16 → (…, O), or what `complete` returns for it.
    """

    def __init__(
        self,
        policy: Fp8Policy,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        complete: Callable[[Tensor], Tensor] | None,
        group: ProcessGroup | None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.policy, self.complete, self.group = policy, complete, group
        self._borrower: tuple[nn.Module, ...] = ()  # in a tuple: not a submodule

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        with _layer_autocast(self.policy, self.group):
            y = self._engine()(pad_rows(rows, self.policy.alignment))
        y = cut_rows(y, rows.shape[0]).view(*x.shape[:-1], self.out_features)
        if self.complete is None:
            return y
        y = self.complete(y)
        return y if self.bias is None else y + self.bias

    def _engine(self) -> nn.Module:
        """Transformer Engine's layer on this module's parameters."""
        if not self._borrower:
            from transformer_engine.pytorch import Linear

            fused_bias = self.bias is not None and self.complete is None
            self._borrower = (
                # On the meta device, so that it owns no memory.
                Linear(
                    self.in_features, self.out_features, bias=fused_bias, params_dtype=self.weight.dtype, device="meta"
                ),
            )
        (engine,) = self._borrower
        if engine.weight is not self.weight:  # at first, and after `to` has made new parameters
            engine.weight = self.weight
            if engine.use_bias:
                engine.bias = self.bias
        return engine


def pad_rows(x: Tensor, multiple: int) -> Tensor:
    """Tokens (S, I) → (S', I): zero rows appended up to a multiple, at least one whole multiple.

    Exact. Zero rows raise no maximum, hence no scale; other rows of x Wᵀ do not depend on them; `cut_rows` drops their
    outputs, so that their gradients are zero and add nothing to dW = gᵀx and db = Σ g. A rank without tokens still
    computes one tile: its zero gradients must exist, or the ranks' gradient reductions would not match.
    """
    rows = max(-(-x.shape[0] // multiple), 1) * multiple
    return x if rows == x.shape[0] else F.pad(x, (0, 0, 0, rows - x.shape[0]))


def cut_rows(y: Tensor, rows: int) -> Tensor:
    """(S', O) → (S, O): the inverse of `pad_rows`."""
    return y[:rows]


@contextlib.contextmanager
def forward_autocast(policy: Fp8Policy, group: ProcessGroup | None = None) -> Iterator[None]:
    """The autocast context of each forward pass. Only recipe `delayed` needs it: its scales move on when it ends.

    Args:
        group: tensor ranks, None when there is one.
    """
    if policy.recipe != "delayed":
        yield
        return
    from transformer_engine.pytorch import autocast

    with autocast(enabled=True, recipe=_recipe(policy.recipe, group is not None), amax_reduction_group=group):
        yield


@contextlib.contextmanager
def _layer_autocast(policy: Fp8Policy, group: ProcessGroup | None) -> Iterator[None]:
    """The autocast context of one layer, all that recipes without state need; recomputation enters it too."""
    if policy.recipe == "delayed":
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        if not FP8GlobalStateManager.is_fp8_enabled():
            raise RuntimeError("recipe delayed: call the model within parallel.fp8.forward_autocast")
        yield
        return
    from transformer_engine.pytorch import autocast

    with autocast(enabled=True, recipe=_recipe(policy.recipe, group is not None)):
        yield


@lru_cache
def _recipe(name: str, reduces: bool) -> object:
    """Transformer Engine's recipe, one for all layers and calls."""
    from transformer_engine.common import recipe

    kind = getattr(recipe, RECIPE_CLASSES[name])
    # Without a group Transformer Engine would reduce over all processes, of which some may run other layers.
    return kind(reduce_amax=reduces) if name == "delayed" else kind()


# --- what a recipe requires ---


def width_fault(policy: Fp8Policy, features: int) -> str | None:
    """Why a rank cannot have layers of this width in the recipe; None: it can."""
    if features % policy.alignment == 0:
        return None
    return (
        f"precision.fp8.recipe={policy.recipe} needs layer widths in multiples of {policy.alignment}, but a rank has "
        f"{features}; use a smaller parallel.tensor, leave the layers out with precision.fp8.streams or skip_layers, "
        f"{INSTEAD}"
    )


def require(policy: Fp8Policy, *, recompute: str = "none", context: int = 1) -> None:
    """Raise unless the recipe can run in this process. Reads properties of the GPU and allocates nothing on it.

    Args:
        recompute: `train.recompute`.
        context: `parallel.context`.

    Raises:
        UserError: no capable GPU, no Transformer Engine, or a combination that the recipe cannot do.
    """
    if policy.recipe in (None, "emulated"):
        return
    named = f"precision.fp8.recipe={policy.recipe}"
    if policy.recipe == "delayed" and recompute != "none":
        raise UserError(
            f"{named} with train.recompute={recompute}: layers would be computed again with later scales; "
            "use precision.fp8.recipe=current or train.recompute=none"
        )
    if policy.recipe == "delayed" and context > 1:
        raise UserError(
            f"{named} with parallel.context={context}: Gated DeltaNet projections run twice in a pass (their "
            "halo), and one amax history cannot follow both; use precision.fp8.recipe=current or parallel.context=1"
        )
    if not torch.cuda.is_available():
        raise UserError(f"{named} needs a CUDA GPU and this machine shows none; train on one, {INSTEAD}")
    if fault := capability_fault(policy, torch.cuda.get_device_capability()):
        raise UserError(fault)
    if fault := _transformer_engine_fault(policy):
        raise UserError(fault)


def capability_fault(policy: Fp8Policy, capability: tuple[int, int]) -> str | None:
    """Why a GPU of this compute capability cannot run the recipe; None: it can."""
    least = CAPABILITIES[policy.recipe]
    if capability >= least:
        return None
    possible = [name for name, floor in CAPABILITIES.items() if capability >= floor]
    return (
        f"precision.fp8.recipe={policy.recipe} needs compute capability {least[0]}.{least[1]}, this GPU has "
        f"{capability[0]}.{capability[1]}; use {', '.join([*possible, 'emulated', 'null'])}"
    )


def _transformer_engine_fault(policy: Fp8Policy) -> str | None:
    install = "`pip install --no-build-isolation 'transformer_engine[pytorch]>=2.9'`"
    named = f"precision.fp8.recipe={policy.recipe}"
    if importlib.util.find_spec("transformer_engine") is None:
        return f"{named}: Transformer Engine is not installed; {install}, {INSTEAD}"
    try:
        import transformer_engine
        import transformer_engine.pytorch as engine
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"{named}: Transformer Engine does not load ({reason}); reinstall it: {install}, {INSTEAD}"
    version = transformer_engine.__version__
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < MINIMUM_VERSION:
        return f"{named}: Transformer Engine {version} is too old; {install}, {INSTEAD}"
    probe = {"block": engine.is_fp8_block_scaling_available, "mxfp8": engine.is_mxfp8_available}
    available, reason = probe.get(policy.recipe, engine.is_fp8_available)(return_reason=True)
    return None if available else f"{named}: {reason.rstrip('.')}; use another recipe, {INSTEAD}"
