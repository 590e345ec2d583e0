"""What is summed or sent goes over the group that it belongs to, and no other.

No processes: torch's collectives are replaced by ones that write down the group, and answer as a second rank with the
same numbers would make them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kairos_train.config.schema import StageConfig
from kairos_train.objective.flow_matching import FlowMatching
from kairos_train.training.engine.deepspeed_engine import _broadcast_first
from kairos_train.training.step import LossMeter, global_counts
from parallel.config import Fp8Config, ParallelConfig
from parallel.exchange import state_exchange, state_passing
from parallel.fp8 import Fp8Policy
from parallel.gradient_sync import gradient_norm, sum_partial_gradients
from parallel.hooks import action_hooks, video_hooks
from parallel.sharding import ShardingRule, ShardingTable, set_attributes
from parallel.topology import Degrees, Topology


@dataclass(frozen=True)
class Group:
    """In place of a process group of two."""

    kind: str

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 1


def place(**changes) -> Topology:
    """The last rank of 2 × 2 × 2, where each group is another one."""
    groups = {f"{kind}_group": Group(kind) for kind in ("tensor", "context", "gradient", "data")}
    at = {"rank": 7, "size": 8, "tensor_rank": 1, "context_rank": 1, "data_rank": 1, "degrees": Degrees(2, 2, 2)}
    return replace(Topology.single(torch.device("cpu")), **{**at, **groups, **changes})


@pytest.fixture
def told(monkeypatch) -> list[str]:
    """The kinds of the groups that collectives were called on."""
    kinds: list[str] = []

    def all_reduce(x, op=dist.ReduceOp.SUM, group=None):
        kinds.append(group.kind)
        x.mul_(2)

    def broadcast(x, source, group=None):
        kinds.append(f"{group.kind} from {source}")

    def all_to_all_single(received, sent, receive_counts, send_counts, group=None):
        kinds.append(group.kind)
        received.zero_()

    def all_gather(out, x, group=None):
        kinds.append(group.kind)
        out.view(2, -1).copy_(x.view(1, -1).expand(2, -1))

    def reduce_scatter(out, x, group=None):
        kinds.append(group.kind)
        out.copy_(2 * x.view(2, -1)[1].view_as(out))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "broadcast", broadcast)
    monkeypatch.setattr(dist, "all_to_all_single", all_to_all_single)
    for old, new, function in (
        ("all_gather_into_tensor", "all_gather_single", all_gather),
        ("reduce_scatter_tensor", "reduce_scatter_single", reduce_scatter),
    ):
        monkeypatch.setattr(dist, old, function)
        monkeypatch.setattr(dist, new, function, raising=False)
    return kinds


def a_batch():
    values = {"latents": torch.zeros(1, 4, 3, 4, 4), "context": torch.zeros(1, 2, 5)}
    values |= {"context_mask": torch.ones(1, 2, dtype=torch.bool), "state": torch.zeros(1, 1, 2)}
    values |= {"actions": torch.zeros(1, 6, 2), "action_mask": torch.arange(6)[None] < 4}
    flow = FlowMatching(StageConfig(history_frames=1, conditions={"ti2v": 1.0}), seed=0, patch=(2, 2))
    return flow, flow.condition(keys=["a"], step=0, **values)


def test_counts_are_of_all_data_ranks_and_of_one_context(told):
    """Every context rank counts the whole samples: a sum over context ranks would count each of them twice."""
    _, batch = a_batch()
    assert global_counts([batch, batch], place()) == (2 * 2 * 2 * 64, 2 * 2 * 4)
    assert told == ["data"]


def test_sums_of_the_loss_are_of_all_that_hold_other_frames_or_samples(told):
    flow, batch = a_batch()
    meter = LossMeter(place(context_rank=0))
    meter.add(batch, flow.loss_sums(batch, batch.video_target + 1, batch.action_target + 1), range(3))
    before = meter.work.clone()
    meter.reduce()
    assert told == ["gradient"]
    assert torch.equal(meter.work, 2 * before)
    assert meter.bins["video"][:, 1].sum() == 2 * 2 * 64
    assert meter.bins["action"][:, 1].sum() == 2 * 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("split", "whole", "partial"):
            setattr(self, name, nn.Parameter(torch.tensor([3.0, 4.0])))


RULES = (
    ShardingRule("split", "column"),
    ShardingRule("whole", "replicated_full"),
    ShardingRule("partial", "replicated_partial"),
)


@pytest.mark.parametrize(("rank", "squares"), [(0, 25 + 25 + 25), (1, 25)])
def test_the_gradient_norm_counts_copies_on_the_first_tensor_rank_alone(told, rank, squares):
    net, topology = Net(), place(tensor_rank=rank)
    set_attributes(net, ShardingTable.of(RULES, dict(net.named_parameters()), tensor=2))
    for p in net.parameters():
        p.grad = p.detach().clone()
    assert gradient_norm(net, topology).item() == pytest.approx((2 * squares) ** 0.5)
    assert told == ["tensor"]


def test_the_gradient_norm_of_bfloat16_gradients_is_summed_in_float32(told):
    net = nn.Linear(64, 64, bias=False).bfloat16()
    set_attributes(net, ShardingTable.of([ShardingRule(".*", "column")], ["weight"], tensor=2))
    net.weight.grad = torch.full_like(net.weight, 0.1)
    norm = gradient_norm(net, place())
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx((2 * 64 * 64) ** 0.5 * float(net.weight.grad[0, 0]), rel=2e-5)


def test_gradients_of_partial_copies_alone_are_summed_over_tensor_ranks(told):
    net = Net()
    net.register_parameter("frozen", nn.Parameter(torch.ones(1), requires_grad=False))
    table = ShardingTable.of(
        (*RULES, ShardingRule("frozen", "replicated_partial")), dict(net.named_parameters()), tensor=2
    )
    handles = sum_partial_gradients(net, table, place())
    assert len(handles) == 1
    sum(p.sum() for p in net.parameters()).backward()
    assert told == ["tensor"]
    assert [p.grad.tolist() for p in (net.split, net.whole, net.partial)] == [[1, 1], [1, 1], [2, 2]]
    assert sum_partial_gradients(net, table, place(tensor_group=None)) == []


def test_partial_gradients_in_bfloat16_are_summed_in_float32(monkeypatch):
    dtypes = []
    monkeypatch.setattr(dist, "all_reduce", lambda x, group=None: dtypes.append(x.dtype))
    net = nn.Linear(4, 4, bias=False).bfloat16()
    table = ShardingTable.of([ShardingRule("weight", "replicated_partial")], ["weight"], tensor=2)
    sum_partial_gradients(net, table, place())
    net.weight.sum().backward()
    assert (dtypes, net.weight.grad.dtype) == ([torch.float32], torch.bfloat16)


def test_the_gradient_of_a_state_leaves_its_rank_in_float32(monkeypatch):
    sent = []

    def return_gradient(transition, later, own, group, method, traffic):
        sent.append(own)
        return torch.zeros_like(own)

    monkeypatch.setattr(state_exchange, "return_gradient", return_gradient)
    generator = torch.Generator().manual_seed(0)
    base, reads = (torch.randn(1, 40, 2, width, generator=generator).bfloat16() for width in (5, 3))
    own, transition, state_in = (torch.randn(1, 2, 3, width, generator=generator) for width in (5, 3, 5))
    call = state_passing._Call(lambda *_: None, Group("context"), "ring", None)
    out, after = state_passing._Compose.apply(
        call, base.requires_grad_(), own.requires_grad_(), reads, transition, state_in, own.new_empty(0)
    )
    d_out, d_after = (
        torch.randn(out.shape, generator=generator).bfloat16(),
        torch.randn(after.shape, generator=generator),
    )
    torch.autograd.grad((out, after), (base, own), (d_out, d_after), allow_unused=True)
    exact = torch.einsum("bshk,bshv->bhkv", reads.double(), d_out.double()) + transition.double().mT @ d_after.double()
    assert sent[0].dtype == torch.float32
    torch.testing.assert_close(sent[0].double(), exact, rtol=1e-5, atol=1e-5)


def test_weights_of_the_first_are_given_to_all_that_hold_the_same(told):
    net = nn.Linear(2, 2)
    _broadcast_first(net, place())
    assert told == ["gradient from 1", "gradient from 1"]  # ranks 1, 3, 5 and 7 are of the second tensor rank


def hooks(stream: str = "video", **parallel):
    config, fp8 = ParallelConfig(tensor=2, context=2, **parallel), Fp8Policy(Fp8Config(), 1)
    return video_hooks(place(), config, fp8) if stream == "video" else action_hooks(place(), config, fp8)


@pytest.mark.parametrize("stream", ["video", "action"])
def test_norms_and_widths_are_of_tensor_ranks(told, stream):
    given = hooks(stream)
    x = torch.full((1, 3, 4, 6), 2.0, requires_grad=True)
    mean = given.mean_square(x)
    assert torch.equal(mean, torch.full((1, 3, 4, 1), 4.0)), "the mean over twice the width, both halves alike"
    mean.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2 * 2 * 2.0 / 12)), "backward sums as forward does"
    for enter in (given.enter_heads, given.enter_context):
        x.grad = None
        assert torch.equal(enter(x), x)
        enter(x).sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 2.0))
    assert told == ["tensor"] * 4
    assert given.local_heads(6) == 3


def test_tokens_are_shared_over_tensor_ranks_by_the_video_stream_alone(told):
    video, action = (hooks(stream, sequence=True) for stream in ("video", "action"))
    x = torch.arange(8.0).view(1, 1, 4, 2)
    assert torch.equal(video.split_tokens(x), x[:, :, 2:])
    assert torch.equal(action.split_tokens(x), x)
    assert video.enter_heads(x).shape == video.join_tokens(x).shape == (1, 1, 8, 2)
    assert told == ["tensor"] * 2
    assert action.enter_heads(x).shape == action.join_tokens(x).shape == x.shape


def test_frames_and_halos_are_of_context_ranks_and_of_the_video_stream_alone(told):
    video, action = hooks(), hooks("action")
    assert (video.local_frames(5), action.local_frames(5)) == (range(3, 5), range(5))
    reads = tuple(tuple(g for g in range(5) if abs(g - f) < 2) for f in range(5))
    exchange = video.exchange_frames(5, reads, (), period=1, hidden=4, kv=8)
    assert (exchange.group.kind, exchange.rank, exchange.query_frames, exchange.key_frames) == (
        *("context", 1),
        *((3, 4), (2, 3, 4)),
    )
    k, v = exchange.collect(torch.ones(1, 2, 3, 2, 2), torch.ones(1, 2, 3, 2, 2))
    assert k.shape == v.shape == (1, 3, 3, 2, 2)
    assert video.previous_tokens(torch.ones(1, 8, 4), 3, 4, 5).shape == (1, 3, 4)
    assert told == ["context"] * 2
    assert action.exchange_frames(5, reads, (), period=1, hidden=4, kv=8).group is None
    assert action.previous_tokens(torch.ones(1, 8, 4), 3, 4, 5) is None
