"""Where the float32 state of a parameter is, for every ZeRO stage and parallel layout.

Each process has a few flat float32 tensors, which its optimiser updates. For each parameter, a fragment says which
range of the flattened parameter is where in them:

    stage 0     one tensor per parameter, complete on every process
    stage 1, 2  one partition per parameter group; a parameter may span partitions
    stage 3     one tensor per sub-group, with an equal part of every parameter, the last one padded

Partitions are over the gradient group (context × data). DeepSpeed partitions this tensor rank's shard of a parameter,
whose position in the full tensor the sharding table knows:

    fragment (range of the local shard) → boxes in the local shard → boxes in the full tensor

Moments and moving averages are sharded as the masters, so that one mapping serves them all. Nobody reads padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kairos_train.checkpoint import boxes
from kairos_train.checkpoint.boxes import Box
from kairos_train.checkpoint.writing import Piece
from kairos_train.training.engine import deepspeed_internals
from kairos_train.training.engine.deepspeed_internals import Fragment
from kairos_train.training.engine.optimizer import Masters
from kairos_train.training.engine.ownership import Ownership


class MasterShards:
    """The float32 masters of this process and their positions in the full parameters.

    Args:
        deepspeed: the DeepSpeed engine.
        optimizer: the torch optimiser given to it.
        stage: its ZeRO stage.
        ownership: which part of each tensor this process holds, and which process writes it.

    Attributes:
        parameters: those that train, by name.
        shapes: full shapes of them.
        local_shapes: shapes of this tensor rank's shards of them.
    """

    def __init__(self, deepspeed: Any, optimizer: torch.optim.Optimizer, *, stage: int, ownership: Ownership) -> None:
        self.stage = stage
        self.parameters: dict[str, nn.Parameter] = {
            name: p for name, p in deepspeed.module.named_parameters() if p.requires_grad
        }
        self._ownership = ownership
        self._optimizer = optimizer
        self._wrapper = deepspeed.optimizer
        self.local_shapes = {name: deepspeed_internals.local_shape(p) for name, p in self.parameters.items()}
        self.shapes = {name: ownership.full_shape(name, shape) for name, shape in self.local_shapes.items()}
        self._written = ownership.copies if stage == 0 else ownership.partitions
        self._flats: list[Tensor] = self._find_flats()
        self._fragments = {name: self._find_fragment(name, p) for name, p in self.parameters.items()}

    @property
    def masters(self) -> list[Tensor]:
        """The float32 masters of this process."""
        return [flat.detach() for flat in self._flats]

    @property
    def moment_names(self) -> tuple[str, ...]:
        """The names that `moments` takes: AdamW's two, none of an optimiser without moments."""
        return ("exp_avg", "exp_avg_sq") if isinstance(self._optimizer, torch.optim.AdamW) else ()

    def moments(self, key: str) -> list[Tensor]:
        """One of `moment_names`, sharded as `masters`; zeros before the first step."""
        return [self._state_of(flat)[key] for flat in self._flats]

    @property
    def updates(self) -> int:
        """AdamW's step counter for its bias correction; 0 of an optimiser without moments."""
        if not self.moment_names:
            return 0
        counts = {int(self._state_of(flat)["step"]) for flat in self._flats}
        if len(counts) != 1:
            raise RuntimeError(f"AdamW has different step counters: {sorted(counts)}")
        return counts.pop()

    @updates.setter
    def updates(self, count: int) -> None:
        for flat in self._flats if self.moment_names else ():
            self._state_of(flat)["step"].fill_(count)

    def pieces(self, tensors: Sequence[Tensor]) -> list[Piece]:
        """What this process writes of the parameters in `tensors`, which are sharded as `masters`.

        Views, nothing is copied. The pieces of all processes are the full tensors, each element once.
        """
        return [
            Piece(name, self.shapes[name], boxes.offset_of(box), part)
            for name in self.parameters
            if name in self._written
            for box, part in self._parts(name, tensors)
        ]

    @torch.no_grad()
    def fill(self, read: Callable[[str, tuple[slice, ...]], Tensor], tensors: Sequence[Tensor]) -> None:
        """Set all of `tensors`, sharded as `masters`, from full tensors.

        Args:
            read: name and slices of the full tensor → that box of it. Called for local boxes only.
        """
        for name in self.parameters:
            for box, part in self._parts(name, tensors):
                part.copy_(read(name, boxes.slices_of(box, [0] * len(box))))

    @torch.no_grad()
    def scatter(self, name: str, local: Tensor, tensors: Sequence[Tensor]) -> None:
        """Set the fragment of one parameter from `local` (float32), this tensor rank's shard of it."""
        fragment = self._fragments[name]
        if fragment is not None:
            part = local.reshape(-1).narrow(0, fragment.inside, fragment.numel)
            tensors[fragment.flat].view(-1).narrow(0, fragment.start, fragment.numel).copy_(part)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the weights that the model computes with from the masters. Collective."""
        wrapper = self._wrapper
        if isinstance(wrapper, Masters):
            wrapper.refresh()
        elif self.stage in (1, 2):
            deepspeed_internals.refresh_linked(wrapper)
        elif self.stage == 3:
            deepspeed_internals.refresh_partitioned(wrapper)

    def _parts(self, name: str, tensors: Sequence[Tensor]) -> Iterator[tuple[Box, Tensor]]:
        """Boxes of the full tensor that are in `tensors`, as views of them."""
        fragment = self._fragments[name]
        if fragment is None:
            return
        flat, at = tensors[fragment.flat].view(-1), fragment.start
        offset = self._ownership.offset(name, self.shapes[name])
        for box in boxes.boxes_of_range(self.local_shapes[name], fragment.inside, fragment.numel):
            size = boxes.volume(box)
            yield boxes.shift(box, offset), flat.narrow(0, at, size).view(boxes.shape_of(box))
            at += size

    def _find_flats(self) -> list[Tensor]:
        if self.stage == 0:
            return [p for group in self._optimizer.param_groups for p in group["params"]]
        if self.stage == 3:
            return deepspeed_internals.partitioned_masters(self._wrapper)
        return [group["params"][0] for group in self._optimizer.param_groups]

    def _find_fragment(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        """None: this process holds no part of the parameter."""
        whole = torch.Size(self.local_shapes[name]).numel()
        if self.stage == 0:
            parameters = self._optimizer.low_precision if isinstance(self._optimizer, Masters) else self._flats
            flat = next(i for i, other in enumerate(parameters) if other is parameter)
            return Fragment(flat=flat, start=0, inside=0, numel=whole)
        if self.stage == 3:
            return deepspeed_internals.partitioned_fragment(self._wrapper, parameter, whole, self._ownership.copy)
        return deepspeed_internals.linked_fragment(parameter)

    def _state_of(self, flat: Tensor) -> dict[str, Tensor]:
        """AdamW's state of one flat tensor; created as AdamW itself would when there is none yet."""
        state = self._optimizer.state[flat]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(flat, memory_format=torch.preserve_format).detach()
            state["exp_avg_sq"] = torch.zeros_like(flat, memory_format=torch.preserve_format).detach()
        return state
