"""What each rank does in the tests of state passing and of the convolutions' halo.

Every rank also computes the whole sequence on its own, by one call of the rule, and reports how far it departs from it.

Shapes: B batch, S tokens, H heads, K key width, V value width, D width, F frames, L tokens per frame.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from kairos_train.basics.errors import UserError
from kairos_train.model.activations import ActivationPolicy
from kairos_train.model.gated_delta_net import GatedDeltaNet
from kairos_train.model.hooks import SingleDevice
from kairos_train.model.kernels.delta_rule import gated_delta_rule
from parallel.exchange import halo, state_exchange, state_passing
from parallel.traffic import Traffic

HEADS, KEYS, VALUES = 5, 8, 6
"""Five heads make groups of 2, 1, 1, 1 on the ring."""

AFTER_CUT = 64
NAMES = ("q", "k", "v", "g", "beta", "initial state")


@dataclass(frozen=True)
class Case:
    """One sequence on the ranks of the world.

    Attributes:
        tokens: of each rank.
        decay: "zero" (g = 0), "slow" (−0.03 … 0) or "fast" (−1).
        padding: neutral tokens, with random q, k and v, after those of each rank.
        backend: of the shards' recurrence; the whole sequence runs in plain torch.
    """

    tokens: tuple[int, ...]
    decay: str
    method: str
    batch: int = 1
    padding: int = 0
    initial_state: bool = True
    dtype: torch.dtype = torch.float64
    backend: str = "torch"


def draw(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v, g, β of the whole sequence and the initial state; gradients of o and of the state after each rank."""
    generator = torch.Generator().manual_seed(sum(case.tokens))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch, total, ranks = case.batch, sum(case.tokens), len(case.tokens)
    q, k = (torch.nn.functional.normalize(randn(batch, total, HEADS, KEYS), dim=-1) for _ in range(2))
    noise = torch.rand(batch, total, HEADS, generator=generator, dtype=torch.float64)
    g = {"zero": 0 * noise, "slow": -0.03 * noise, "fast": -torch.ones_like(noise)}[case.decay]
    beta = torch.rand(batch, total, HEADS, generator=generator, dtype=torch.float64)
    state = randn(batch, HEADS, KEYS, VALUES) * case.initial_state
    inputs = [q, k, randn(batch, total, HEADS, VALUES), g, beta, state]
    cotangents = [randn(batch, total, HEADS, VALUES), randn(ranks, batch, HEADS, KEYS, VALUES)]
    cast = [[x.to(case.dtype) for x in group] for group in (inputs, cotangents)]
    return cast[0], cast[1]


def whole(case: Case) -> dict[str, Tensor]:
    """Everything by name, from one call over all tokens; states at the cuts from calls over prefixes."""
    inputs, (d_outputs, d_states) = draw(case)
    inputs = [x.requires_grad_() for x in inputs]
    *sequences, state = inputs
    outputs, _ = gated_delta_rule(*sequences, state)
    ends = list(accumulate(case.tokens))
    states = [gated_delta_rule(*(x[:, :end] for x in sequences), state)[1] for end in ends]
    gradients = torch.autograd.grad((outputs, *states), inputs, (d_outputs, *d_states))
    found = {f"gradient of {name}": x for name, x in zip(NAMES, gradients, strict=True)}
    return {"output": outputs.detach(), "state": torch.stack(states).detach(), **found}


def sharded(case: Case, traffic: Traffic | None = None) -> dict[str, Tensor]:
    """The same by name on this rank, padding removed; of padding the sum of absolute gradients."""
    rank = dist.get_rank()
    (*sequences, state), (d_outputs, d_states) = draw(case)
    here = slice(sum(case.tokens[:rank]), sum(case.tokens[: rank + 1]))
    generator = torch.Generator().manual_seed(rank)
    leaves = []
    for name, x in zip(NAMES, sequences, strict=False):
        extra = torch.randn(x.shape[0], case.padding, *x.shape[2:], generator=generator).to(x.dtype)
        neutral = name in ("g", "beta")
        leaves.append(torch.cat([x[:, here], 0 * extra if neutral else extra], 1).requires_grad_())
    state.requires_grad_()
    outputs, after = state_passing.start(
        partial(gated_delta_rule, backend=case.backend),
        *leaves,
        initial_state=state if case.initial_state else None,
        group=dist.group.WORLD,
        method=case.method,
        traffic=traffic,
    )()
    tokens = case.tokens[rank]
    loss = (outputs[:, :tokens] * d_outputs[:, here]).sum() + (after * d_states[rank]).sum()
    loss.backward()
    found = {f"gradient of {name}": x.grad[:, :tokens] for name, x in zip(NAMES, leaves, strict=False)}
    found["padding"] = sum(x.grad[:, tokens:].abs().sum() for x in leaves[:3])
    if rank == 0 and case.initial_state:
        found["gradient of initial state"] = state.grad
    return {"output": outputs[:, :tokens].detach(), "state": after.detach(), **found}


def departures(case: Case) -> dict[str, float]:
    """Largest departure of this rank from the whole, by name, as a share of the largest number of that name."""
    rank, expected, got = dist.get_rank(), whole(case), sharded(case)
    start, errors = sum(case.tokens[:rank]), {"padding": float(got.pop("padding"))}
    for name, x in got.items():
        want = expected[name]
        scale = want.abs().max().clamp_min(1e-30)
        if name == "state":
            want = want[rank]
        elif name != "gradient of initial state":
            want = want[:, start : start + x.shape[1]]
        error = (x - want).abs() / scale
        errors[name] = float(error.max()) if error.numel() else 0.0
        if rank and x.ndim and name not in ("state", "gradient of initial state"):
            cut = error[:, :AFTER_CUT]
            errors[f"{name} after the cut"] = float(cut.max()) if cut.numel() else 0.0
    return errors


def run_cases(cases: list[Case], mutation: str | None = None) -> list[dict[str, float]]:
    with mutated(mutation):
        return [departures(case) for case in cases]


def methods_apart(case: Case, methods: tuple[str, ...]) -> dict[str, float]:
    """Largest departure of `methods` from `serial`, by name."""
    reference, errors = sharded(case), {}
    for method in methods:
        got = sharded(Case(**{**vars(case), "method": method}))
        for name, x in got.items():
            if name != "padding" and x.numel():
                error = float((x - reference[name]).abs().max() / reference[name].abs().max().clamp_min(1e-30))
                errors[f"{name} by {method}"] = error
    return errors


# --- mutations: one small function each ---


def mutated(name: str | None) -> contextlib.AbstractContextManager[object]:
    """A broken exchange."""
    if name is None:
        return contextlib.nullcontext()
    module, function, replacement = MUTATIONS[name]
    return mock.patch.object(module, function, replacement)


def swapped(tokens: tuple[int, ...], rank: int) -> tuple[int | None, int | None]:
    return NEIGHBOURS(tokens, rank)[::-1]


def negated(x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return SHIFT(-x, *args, **kwargs)


NEIGHBOURS, SHIFT = halo.neighbours, halo.shift
MUTATIONS: dict[str, tuple[object, str, Callable]] = {
    "A dropped": (state_exchange, "carry", lambda a, s, b: b),
    "A transposed": (state_exchange, "carry", lambda a, s, b: a.mT @ s + b),
    "A dropped backward": (state_exchange, "carry_back", lambda a, d, c: c),
    "A not transposed backward": (state_exchange, "carry_back", lambda a, d, c: a @ d + c),
    "fold order swapped": (state_exchange, "oldest_first", lambda rank: reversed(range(rank))),
    "fold order swapped backward": (state_exchange, "newest_first", lambda rank, ranks: range(rank + 1, ranks)),
    "reverse exchange skipped": (state_exchange, "return_gradient", lambda a, later, own, *_: torch.zeros_like(own)),
    "halo from the wrong side": (halo, "neighbours", swapped),
    "halo sign wrong": (halo, "shift", negated),
}


# --- a whole layer ---


class ContextHooks(SingleDevice):
    """Frames over the ranks of the world."""

    def __init__(self, frames: tuple[int, ...], method: str, traffic: Traffic | None = None) -> None:
        self.frames, self.method, self.traffic = frames, method, traffic

    def previous_tokens(self, x: Tensor, count: int, tokens_per_frame: int, frames: int) -> Tensor:
        tokens = [n * tokens_per_frame for n in self.frames]
        return halo.previous_tokens(x, count, tokens=tokens, group=dist.group.WORLD, traffic=self.traffic)

    def start_recurrence(self, recurrence_fn, q, k, v, g, beta, state):
        return state_passing.start(
            recurrence_fn,
            *(q, k, v, g, beta),
            initial_state=state,
            group=dist.group.WORLD,
            method=self.method,
            traffic=self.traffic,
        )


def make_layer(hooks: SingleDevice) -> GatedDeltaNet:
    """The same weights on every rank, decays near zero."""
    generator = torch.Generator().manual_seed(7)
    layer = GatedDeltaNet(
        dim=12, heads=HEADS, key_dim=KEYS, value_dim=VALUES, conv_size=4, eps=1e-6, hooks=hooks, backend="torch"
    ).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(0, 1 if name == "o_norm.weight" else 0.4, generator=generator)
        layer.A_log -= 4
    return layer


def layer_departures(
    frames: tuple[int, ...],
    tokens_per_frame: int,
    method: str,
    batch: int,
    mutation: str | None = None,
    recompute: str = "none",
) -> dict[str, float]:
    """Departure of a Gated DeltaNet layer: its output here, the gradient of its input here, summed gradients of all
    weights."""
    rank, total = dist.get_rank(), sum(frames)
    generator = torch.Generator().manual_seed(total)
    x, weight = (torch.randn(batch, total, tokens_per_frame, 12, generator=generator).double() for _ in range(2))
    here = slice(sum(frames[:rank]), sum(frames[: rank + 1]))

    reference, whole_x = make_layer(SingleDevice()), x.clone().requires_grad_()
    expected = reference(whole_x, total)
    (expected * weight).sum().backward()

    traffic = Traffic()
    layer, local_x = make_layer(ContextHooks(frames, method, traffic)), x[:, here].clone().requires_grad_()
    with mutated(mutation):
        output = RECOMPUTE[recompute](layer)(local_x, total)
        (output * weight[:, here]).sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    for gradient in gradients.values():
        dist.all_reduce(gradient)

    def apart(got: Tensor, want: Tensor, scale: Tensor) -> float:
        return float((got - want).abs().max() / scale.abs().max()) if got.numel() else 0.0

    errors = {"output": apart(output, expected[:, here], expected)}
    errors["gradient of x"] = apart(local_x.grad, whole_x.grad[:, here], whole_x.grad)
    for name, p in reference.named_parameters():
        errors[f"gradient of {name}"] = apart(gradients[name], p.grad, p.grad)
    return {**errors, **{f"calls {kind}": float(n) for kind, n in traffic.calls.items()}}


RECOMPUTE: dict[str, Callable] = {
    "none": lambda layer: layer,
    "all": lambda layer: partial(ActivationPolicy("block").run, layer, weights=layer),
    "all but states": lambda layer: partial(ActivationPolicy("selective").run, layer, weights=layer),
}


def layers(cases: list[tuple]) -> list[dict[str, float]]:
    return [layer_departures(*case) for case in cases]


# --- bytes, and calls that are refused ---


def counted_bytes(tokens: int, method: str) -> dict[str, int]:
    """Bytes received in one forward and backward with `tokens` per rank, in float32."""
    traffic = Traffic()
    sharded(Case((tokens,) * dist.get_world_size(), "slow", method, dtype=torch.float32), traffic)
    return dict(traffic.received)


def refused_halo(tokens: tuple[int, ...]) -> str:
    x = torch.zeros(1, tokens[dist.get_rank()], 2)
    try:
        halo.previous_tokens(x, 3, tokens=tokens, group=dist.group.WORLD)
    except UserError as error:
        return str(error)
    return "accepted"


def halo_of_positions(tokens: tuple[int, ...], dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """Which positions of the sequence (counted from 1) arrive, and the gradient that each own token gets back."""
    start = sum(tokens[: dist.get_rank()])
    x = torch.arange(start + 1.0, start + tokens[dist.get_rank()] + 1).to(dtype).view(1, -1, 1).requires_grad_()
    before = halo.previous_tokens(x, 3, tokens=tokens, group=dist.group.WORLD)
    before.backward(torch.tensor([1.0, 2.0, 3.0]).to(dtype).view(1, 3, 1))
    return before.flatten().tolist(), x.grad.flatten().tolist()
