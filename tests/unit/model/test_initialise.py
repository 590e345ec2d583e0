"""Initial values are a function of seed, name and full shape: layouts and processes agree on them."""

import math

import torch
from support.model_factory import make_config

from kairos_train.model import WorldActionModel
from kairos_train.model.initialise import initial_value, initialise


def fresh(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(WorldActionModel(make_config()).named_parameters())


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before():
    torch.manual_seed(3)
    torch.rand(100)
    other = dict(WorldActionModel(make_config()).named_parameters())
    for name, value in fresh(3).items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0)


def test_seeds_and_names_decide():
    first, second = fresh(0), fresh(1)
    q, k = "video_dit.blocks.0.self_attn.q.weight", "video_dit.blocks.0.self_attn.k.weight"
    assert not torch.equal(first[q], second[q])
    assert not torch.equal(first[q], first[k])


def test_a_fresh_adapter_adds_nothing_and_passes_gradients_on():
    a, b = (initial_value(f"blocks.0.self_attn.q.lora_{x}", torch.Size((4, 6)), 0) for x in "ab")
    assert not b.any()
    assert a.abs().min() > 0


def test_a_slice_starts_as_its_part_of_the_whole():
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(6, 4)

    half = Half()
    initialise(half, 5, lambda name, shape: (torch.Size((8, *shape[1:])), (slice(4, 8),)))
    torch.testing.assert_close(half.q.weight.detach(), initial_value("q.weight", torch.Size((8, 6)), 5)[4:])


def test_a_model_on_the_meta_device_is_left_alone():
    with torch.device("meta"):
        model = WorldActionModel(make_config())
    assert all(p.is_meta for p in model.parameters())


def test_values_are_what_their_names_ask_for():
    weights = fresh(0)
    assert weights["video_dit.head.head.weight"].abs().max() == 0
    assert weights["action_dit.head.weight"].abs().max() == 0
    assert (weights["video_dit.blocks.0.self_attn.norm_q.weight"] == 1).all()
    assert (weights["video_dit.blocks.0.cross_attn_norm.weight"] == 1).all()
    assert (weights["video_dit.blocks.0.cross_attn_norm.bias"] == 0).all()
    assert (weights["video_dit.patch_embedding.bias"] == 0).all()
    decay = initial_value("a.A_log", torch.Size((4096,)), 0).exp()
    assert 1 <= decay.min() < 1.2
    assert 15.8 < decay.max() <= 16.001
    dt = torch.nn.functional.softplus(initial_value("a.dt_bias", torch.Size((4096,)), 0))
    assert 9e-4 < dt.min() < 1.1e-3
    assert 0.095 < dt.max() < 0.101
    linear = initial_value("blocks.0.ffn.0.weight", torch.Size((300, 100)), 0)
    assert abs(linear.abs().max() - math.sqrt(6 / 400)) < 1e-4
    assert abs(initial_value("text_embedding.0.weight", torch.Size((300, 100)), 0).std() - 0.02) < 1e-3
    assert abs(initial_value("blocks.0.modulation", torch.Size((1, 6, 2500)), 0).std() - 0.02) < 1e-3
    assert initial_value("blocks.1.gated_delta.q_conv1d.weight", torch.Size((64, 1, 4)), 0).abs().max() <= 0.5
