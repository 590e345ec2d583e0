"""What each rank does in the tests of the frame exchange.

Shapes: B batch, F frames, n of them on a rank, L tokens per frame, D width, H heads, E head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from kairos_train.model.kernels.attention import Windows, window_attention
from kairos_train.model.kernels.windows import WindowSpec, frames_read
from parallel.exchange import frame_exchange, frame_plan
from parallel.exchange.frame_exchange import FrameExchange
from parallel.exchange.frame_plan import FramePlan
from parallel.traffic import Traffic

TOKENS, WIDTH, HEADS = 3, 5, 2


@dataclass(frozen=True)
class Case:
    """One windowed layer on the ranks of the world; all read the first `on_all_ranks` frames' keys, as actions do."""

    rule: WindowSpec
    frames: int
    history: tuple[int, ...]
    choice: str
    on_all_ranks: int = 0


def plan_of(case: Case) -> FramePlan:
    # Not from the cache: a mutated plan must not outlive its test.
    return frame_plan.plan_frames.__wrapped__(
        case.frames,
        frames_read(case.rule, case.frames, case.history),
        tuple(range(case.on_all_ranks)),
        ranks=dist.get_world_size(),
        period=case.rule.step(case.frames),
        hidden=TOKENS * WIDTH,
        kv=2 * TOKENS * HEADS * 4,
        choice=case.choice,
    )


class Layer:
    """x → q, k, v → windowed attention → o, and a loss over o and over the keys that all ranks need."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(case.frames)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.case, batch = case, len(case.history)
        self.x = randn(batch, case.frames, TOKENS, WIDTH)
        self.weight = randn(WIDTH, 3 * HEADS * 4).requires_grad_()
        self.target = randn(batch, case.frames, TOKENS, HEADS * 4)
        self.shared_target = randn(2, batch, case.on_all_ranks, TOKENS, HEADS, 4)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, n, L, D) → q, k, v (B, n, L, H, E)."""
        return (x @ self.weight).unflatten(-1, (3, HEADS, 4)).unbind(-3)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, queries: tuple, keys: tuple, backend: str) -> Tensor:
        """(B, n, L, H·E)."""
        windows = Windows(self.case.rule, self.case.history, self.case.frames, queries, keys)
        out = window_attention(q, k, v, windows=windows, backend=backend)
        return out.reshape(*q.shape[:3], HEADS * 4)

    def shared_loss(self, k: Tensor, v: Tensor, keys: tuple) -> Tensor:
        at = [keys.index(f) for f in range(self.case.on_all_ranks)]
        return (torch.stack([k[:, at], v[:, at]]) * self.shared_target).sum()

    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        """Dense masked attention of everything: outputs, gradients of x and of the weight."""
        x, frames = self.x.clone().requires_grad_(), tuple(range(self.case.frames))
        q, k, v = self.project(x)
        out = self.attend(q, k, v, frames, frames, "dense")
        loss = (out * self.target).sum() + self.shared_loss(k, v, frames)
        return out.detach(), *torch.autograd.grad(loss, (x, self.weight))

    def sharded(self, plan: FramePlan, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same from this rank's frames, windows gathered."""
        exchange = FrameExchange(plan, dist.group.WORLD, rank)
        own = list(plan.owned[rank])
        x = self.x[:, own].requires_grad_()
        q, k, v = self.project(exchange.move(x))
        k, v = exchange.collect(k, v)
        out = self.attend(q, k, v, exchange.query_frames, exchange.key_frames, "gathered")
        out = exchange.restore(out)
        # Every rank reads these keys: each has its share in the loss.
        shared = self.shared_loss(k, v, exchange.key_frames) / plan.ranks
        grads = torch.autograd.grad((out * self.target[:, own]).sum() + shared, (x, self.weight))
        dist.all_reduce(grads[1])
        return out.detach(), *grads


def worst_errors(cases: list[Case], mutation: str | None = None) -> list[float]:
    """Of each case the largest deviation from dense attention, of outputs and gradients; NaN counts as infinite."""
    rank, errors = dist.get_rank(), []
    with mutated(mutation):
        for case in cases:
            layer, plan = Layer(case), plan_of(case)
            own = list(plan.owned[rank])
            (out, dx, dw), here = layer.whole(), layer.sharded(plan, rank)
            pairs = zip((out[:, own], dx[:, own], dw), here, strict=True)
            worst = max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)
            errors.append(worst if worst == worst else float("inf"))
    return errors


@contextlib.contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """One broken function, by the name of the mistake."""
    positions = frame_plan.positions

    def next_frame(frames, wanted):
        return tuple((i + 1) % len(frames) for i in positions(frames, wanted))

    def drop(total, returned, send):
        pass

    def overwrite(total, returned, send):
        for part, index in frame_exchange._parts(send, total.device):
            total[:, index] = returned[part].transpose(0, 1)

    broken = {
        "gradients not returned": (frame_exchange, "add_returned", drop),
        "gradients overwritten": (frame_exchange, "add_returned", overwrite),
        "frame off by one": (frame_plan, "positions", next_frame),
    }
    with contextlib.ExitStack() as stack:
        if name is not None:
            stack.enter_context(mock.patch.object(*broken[name]))
        yield


def full_plan(frames: int, **sizes: int) -> FramePlan:
    everything = tuple(range(frames))
    sizes = {"period": 1, "hidden": 1, "kv": 2, **sizes}
    return frame_plan.plan_frames(frames, (everything,) * frames, (), ranks=dist.get_world_size(), **sizes)


def gradients_of_keys_read_on_all_ranks(dtype: torch.dtype, weights: list[float]) -> list[list[float]]:
    """Rank r's loss is weights[r] · (sum of all keys) − (of all values); gradients of its own frame's key and value."""
    rank = dist.get_rank()
    k, v = (torch.zeros(1, 1, 2, dtype=dtype, requires_grad=True) for _ in range(2))
    exchange = FrameExchange(full_plan(dist.get_world_size()), dist.group.WORLD, rank)
    keys, values = exchange.collect(k, v)
    (weights[rank] * keys - values).sum().backward()
    assert k.grad.dtype == v.grad.dtype == dtype
    return [k.grad.flatten().tolist(), v.grad.flatten().tolist()]


def numbers_of_frames(dtype: torch.dtype, case: Case) -> tuple[bool, bool, bool]:
    """Whether frames filled with their number arrive where the plan says, in every dtype."""
    rank, plan = dist.get_rank(), plan_of(case)
    exchange = FrameExchange(plan, dist.group.WORLD, rank)

    def filled(frames: tuple[int, ...]) -> Tensor:
        return torch.tensor(frames, dtype=dtype).view(1, -1, 1).expand(2, -1, 4)

    moved = exchange.move(filled(plan.owned[rank]))
    k, v = exchange.collect(moved, -moved)
    keys = filled(plan.keys[rank])
    return (
        torch.equal(moved, filled(plan.queries[rank])),
        torch.equal(k, keys) and torch.equal(v, -keys),
        torch.equal(exchange.restore(moved), filled(plan.owned[rank])),
    )


def counted_bytes(case: Case) -> dict[str, int]:
    """What reaches this rank in one forward and backward: counted at the collective, reported, and by formula."""
    rank, plan, reported = dist.get_rank(), plan_of(case), Traffic()
    counted, all_to_all = [], dist.all_to_all_single

    def count(output, input, output_split_sizes, input_split_sizes, group):
        assert output_split_sizes[rank] == 0, "a rank sends nothing to itself"
        counted.append(output.numel() * output.element_size())
        all_to_all(output, input, output_split_sizes, input_split_sizes, group=group)

    exchange = FrameExchange(plan, dist.group.WORLD, rank, reported)
    x = torch.zeros(1, len(plan.owned[rank]), TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with mock.patch.object(dist, "all_to_all_single", count):
        moved = exchange.move(x)
        k, v = (moved.new_zeros(*moved.shape[:3], HEADS, 4).requires_grad_() for _ in range(2))
        keys, values = exchange.collect(k, v)
        restored = exchange.restore(moved)
        forward = sum(counted)
        (restored.sum() + keys.sum() + values.sum()).backward()
    return {
        "counted": forward,
        "formula": 2 * plan.received(rank),
        "counted_backward": sum(counted) - forward,
        "formula_backward": 2 * plan.returned(rank),
        "reported": sum(n for kind, n in reported.received.items() if not kind.endswith("backward")),
        "reported_backward": sum(n for kind, n in reported.received.items() if kind.endswith("backward")),
    }


def exchange_without_need(case: Case) -> bool:
    """Whether tensors of a layer whose windows stay on their rank are passed on as they are, without a collective."""
    plan = plan_of(case)
    exchange = FrameExchange(plan, dist.group.WORLD, dist.get_rank())
    x = torch.zeros(1, len(exchange.query_frames), 2)
    with mock.patch.object(dist, "all_to_all_single", side_effect=AssertionError("a collective")):
        k, v = exchange.collect(x, x)
        return exchange.move(x) is x and k is x and v is x and exchange.restore(x) is x


def refusals() -> list[str]:
    """Messages of calls that do not fit the plan."""
    rank, messages = dist.get_rank(), []
    plan = full_plan(4)
    exchange = FrameExchange(plan, dist.group.WORLD, rank)
    wrong = torch.zeros(1, 4, 2)
    for call in (
        lambda: exchange.collect(wrong, wrong),
        lambda: exchange.collect(wrong, wrong.double()),
        lambda: FrameExchange(plan, None, rank),
    ):
        try:
            call()
        except ValueError as error:
            messages.append(str(error))
    return messages
