"""Initial weights (*ours*: the publication does not state them), each a function of (seed, name, full shape) alone.

So a rank that holds a slice of a tensor starts from the same values as a process that holds it whole. Linear layers
are Xavier-uniform with zero biases; embeddings of text and time normal(0.02); the last layer of each stream zero, so
that training starts from velocity 0; modulations normal / √D; convolutions and the first factor of adapters uniform
within 1/√size, the second factor zero.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

DT_RANGE = (1e-3, 1e-1)
"""softplus(dt_bias), log-uniform."""

DECAY_RATE_RANGE = (1.0, 16.0)
"""exp(A_log), uniform."""

LAST_LAYERS = ("video_dit.head.head.", "action_dit.head.")

LocalSlices = Callable[[str, torch.Size], tuple[torch.Size, tuple[slice, ...]]]
"""(name, local shape) → (full shape, the slices of it that are on this rank)."""


def whole(name: str, shape: torch.Size) -> tuple[torch.Size, tuple[slice, ...]]:
    """Every tensor is whole on this rank."""
    return shape, ()


@torch.no_grad()
def initialise(model: nn.Module, seed: int, slices: LocalSlices = whole) -> None:
    """Set every parameter of a world-action model in place, one whole tensor at a time."""
    for name, parameter in model.named_parameters():
        shape, part = slices(name, parameter.shape)
        parameter.copy_(initial_value(name, shape, seed)[part])


def initial_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The initial value of one whole tensor, float32 on the CPU.

    Args:
        name: the public one.
        shape: the full one.
        seed: of the run.
    """
    rng = generator(name, seed)
    value = torch.empty(shape, device="cpu")
    *modules, last = name.split(".")
    if last == "modulation":
        return value.normal_(generator=rng) / shape[-1] ** 0.5
    if last == "A_log":
        return value.uniform_(*DECAY_RATE_RANGE, generator=rng).log()
    if last == "dt_bias":
        dt = value.uniform_(*map(math.log, DT_RANGE), generator=rng).exp()
        return dt + torch.log(-torch.expm1(-dt))  # softplus⁻¹(dt)
    if last in ("bias", "lora_b") or name.startswith(LAST_LAYERS):
        return value.zero_()
    if len(shape) == 1:
        return value.fill_(1.0)  # norms
    if last == "lora_a" or modules[-1].endswith("conv1d"):
        return value.uniform_(-(shape[-1] ** -0.5), shape[-1] ** -0.5, generator=rng)
    if "text_embedding" in modules or "time_embedding" in modules:
        return value.normal_(std=0.02, generator=rng)
    bound = math.sqrt(6 / (shape[0] + shape[1:].numel()))
    return value.uniform_(-bound, bound, generator=rng)


def generator(name: str, seed: int) -> torch.Generator:
    """A random generator on the CPU whose stream depends on the name and the seed alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "little"))
