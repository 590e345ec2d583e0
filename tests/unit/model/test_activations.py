"""What is kept for backward changes memory, never numbers."""

import pytest
import torch
from support.model_factory import make_inputs, make_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from kairos_train.model.activations import KEPT, ActivationPolicy
from parallel.exchange import state_exchange


def gradients(policy: ActivationPolicy) -> tuple[dict[str, torch.Tensor], int]:
    """Every gradient, and the bytes that the graph kept between forward and backward."""
    model = make_model(activations=policy)
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        video, action = model(**make_inputs())
    (video.pow(2).sum() + action.pow(2).sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}, sum(kept.values())


@pytest.fixture(scope="module")
def everything_kept() -> tuple[dict[str, torch.Tensor], int]:
    return gradients(ActivationPolicy())


def test_every_operator_that_sends_or_receives_a_state_is_kept():
    assert {operator.name().partition(".")[0] for operator in state_exchange.KEPT_OPERATORS} <= set(KEPT)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
def test_gradients_do_not_depend_on_the_policy(everything_kept, recompute, offload):
    got, _ = gradients(ActivationPolicy(recompute, offload))
    for name, expected in everything_kept[0].items():
        torch.testing.assert_close(got[name], expected, rtol=0, atol=0, msg=name)


def test_recomputing_blocks_keeps_far_less(everything_kept):
    assert gradients(ActivationPolicy("block"))[1] < everything_kept[1] / 3


def test_offloading_moves_no_weights(monkeypatch):
    moved = []

    class Recorded(torch.autograd.graph.save_on_cpu):
        def __init__(self, **options):
            super().__init__(**options)
            pack = self.pack_hook
            self.pack_hook = lambda x: moved.append(x) or pack(x)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Recorded)
    model = make_model(activations=ActivationPolicy(offload=True))
    model(**make_inputs())
    weights = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}
    assert [weights[at] for x in moved if (at := x.untyped_storage().data_ptr()) in weights] == []
    assert sum(x.numel() for x in moved) > 1000


def test_offloading_holds_no_weight_that_is_released_between_the_passes():
    """As ZeRO 3 does with every layer's, of which it gathers another copy for backward."""
    layer, x = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 3, bias=False)), torch.ones(2, 4)
    y = ActivationPolicy(offload=True).run(layer, x, weights=layer)
    expected = torch.autograd.grad(layer(x).sum(), [*layer.parameters()])
    flat = torch.cat([torch.zeros(5), *(p.detach().flatten() for p in layer.parameters())])
    held, offset = [StorageWeakRef(p.untyped_storage()) for p in layer.parameters()], 5
    for p in layer.parameters():
        p.data = torch.empty(0)
    assert all(storage.expired() for storage in held)
    for p, shape in zip(layer.parameters(), [(6, 4), (6,), (3, 6)], strict=True):
        p.data = flat[offset : (offset := offset + torch.Size(shape).numel())].view(shape)
    for ours, exact in zip(torch.autograd.grad(y.sum(), [*layer.parameters()]), expected, strict=True):
        assert torch.equal(ours, exact)


class CountAttention(TorchDispatchMode):
    """Counts softmax attention's forward calls."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.calls += "scaled_dot_product" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("recompute", "times"), [("none", 1), ("block", 2), ("selective", 1)])
def test_selective_recomputation_leaves_attention_alone(recompute, times):
    model = make_model(activations=ActivationPolicy(recompute)).float()
    with CountAttention() as forward:
        video, action = model(**make_inputs(dtype=torch.float32))
    loss = video.pow(2).sum() + action.pow(2).sum()
    with CountAttention() as backward:
        loss.backward()
    assert forward.calls > 0
    assert forward.calls + backward.calls == times * forward.calls
