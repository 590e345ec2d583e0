"""Where the float32 state of a parameter lies, for every ZeRO stage.

Each process has a few flat float32 tensors, the ones that its optimiser updates. Parameter by parameter, a fragment
says which range of the flattened parameter lies where in them:

    stage 0     one tensor per parameter, complete on every process
    stage 1, 2  one partition per parameter group; a parameter may lie across partitions (`_hp_mapping`)
    stage 3     one tensor per sub-group, with an equal part of every parameter, the last one padded (`grad_position`)

Moments and moving averages have the layout of the masters, so that one mapping serves them all. Padding is never read.
Partitions are over all processes of the run: tensor or context parallel groups are not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kairos_train.training.optimizer import MasterAdamW


@dataclass(frozen=True)
class Fragment:
    """`numel` elements, from `inside` on in the flattened parameter, from `start` on in flat tensor number `flat`."""

    flat: int
    start: int
    inside: int
    numel: int


class MasterLayout:
    """The float32 masters of this process and the way between them and whole parameters.

    Args:
        deepspeed: the DeepSpeed engine.
        optimizer: the torch optimiser given to it.
        stage: its ZeRO stage.
    """

    def __init__(self, deepspeed: Any, optimizer: torch.optim.Optimizer, *, stage: int) -> None:
        self.stage = stage
        self.parameters: dict[str, nn.Parameter] = {
            name: p for name, p in deepspeed.module.named_parameters() if p.requires_grad
        }
        self._optimizer = optimizer
        self._wrapper = deepspeed.optimizer
        self._replicated = stage == 0
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.parameters.items()}
        self._flats: list[Tensor] = self._find_flats()
        self._fragments = {name: self._find_fragment(name, p) for name, p in self.parameters.items()}

    @property
    def masters(self) -> list[Tensor]:
        """The float32 masters of this process."""
        return [flat.detach() for flat in self._flats]

    def moments(self, key: str) -> list[Tensor]:
        """`exp_avg` or `exp_avg_sq`, in the layout of `masters`; zeros before the first step."""
        return [self._state_of(flat)[key] for flat in self._flats]

    @property
    def updates(self) -> int:
        """Updates that AdamW has made, its counter for the bias correction."""
        counts = {int(self._state_of(flat)["step"]) for flat in self._flats}
        if len(counts) != 1:
            raise RuntimeError(f"AdamW has different step counters: {sorted(counts)}")
        return counts.pop()

    @updates.setter
    def updates(self, count: int) -> None:
        for flat in self._flats:
            self._state_of(flat)["step"].fill_(count)

    def gather(self, name: str, tensors: Sequence[Tensor]) -> Tensor | None:
        """One whole parameter out of `tensors`, which are in the layout of `masters`. Collective.

        Bits are moved, not numbers: what is summed over processes are integers of which all but one are zero, so that
        negative zeros survive.

        Returns:
            float32 on the CPU of rank 0, None elsewhere.
        """
        fragment = self._fragments[name]
        whole = torch.zeros(self._numel(name), dtype=torch.int32, device=tensors[0].device)
        if fragment is not None:
            part = tensors[fragment.flat].view(-1).narrow(0, fragment.start, fragment.numel)
            whole.narrow(0, fragment.inside, fragment.numel).copy_(part.view(torch.int32))
        if not self._replicated and dist.get_world_size() > 1:
            dist.reduce(whole, 0)
        return whole.view(torch.float32).view(self.shapes[name]).cpu() if dist.get_rank() == 0 else None

    def scatter(self, name: str, whole: Tensor, tensors: Sequence[Tensor]) -> None:
        """Write this process's fragment of `whole` (float32, full shape) into `tensors` in the layout of `masters`."""
        fragment = self._fragments[name]
        if fragment is not None:
            part = whole.reshape(-1).narrow(0, fragment.inside, fragment.numel)
            tensors[fragment.flat].view(-1).narrow(0, fragment.start, fragment.numel).copy_(part)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the parameters that the model computes with those of the masters. Collective."""
        wrapper = self._wrapper
        if isinstance(wrapper, MasterAdamW):
            wrapper.refresh()
        elif self.stage in (1, 2):
            wrapper.update_lp_params()
        elif self.stage == 3:
            wrapper._partition_all_parameters()
            for index in range(len(self._flats)):
                wrapper._reassign_or_swap_out_partitioned_parameters(index)
            if wrapper.persistent_parameters:  # small ones stay whole on every process
                wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)

    def _numel(self, name: str) -> int:
        return torch.Size(self.shapes[name]).numel()

    def _find_flats(self) -> list[Tensor]:
        if self.stage == 0:
            return [p for group in self._optimizer.param_groups for p in group["params"]]
        if self.stage == 3:
            return list(self._wrapper.fp32_partitioned_groups_flat)  # its param_groups are filled during a step only
        return [group["params"][0] for group in self._optimizer.param_groups]

    def _find_fragment(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        """None: this process holds nothing of the parameter."""
        if self.stage == 0:
            known = self._optimizer.low_precision if isinstance(self._optimizer, MasterAdamW) else self._flats
            flat = next(i for i, other in enumerate(known) if other is parameter)
            return Fragment(flat=flat, start=0, inside=0, numel=self._numel(name))
        if self.stage == 3:
            flat, start, numel = self._wrapper.grad_position[self._wrapper.get_param_id(parameter)]
            inside = numel * dist.get_rank()
            numel = min(numel, self._numel(name) - inside)  # the rest is padding
            return Fragment(flat=flat, start=start, inside=inside, numel=numel) if numel > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        return Fragment(
            flat=mapping.param_group_index,
            start=mapping.hp_fragment_address.start,
            inside=mapping.lp_fragment_address.start,
            numel=mapping.lp_fragment_address.numel,
        )

    def _state_of(self, flat: Tensor) -> dict[str, Tensor]:
        """AdamW's state of one flat tensor, made as AdamW itself makes it when there is none yet."""
        state = self._optimizer.state[flat]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(flat, memory_format=torch.preserve_format).detach()
            state["exp_avg_sq"] = torch.zeros_like(flat, memory_format=torch.preserve_format).detach()
        return state
