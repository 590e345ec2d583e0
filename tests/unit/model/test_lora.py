"""Low-rank adapters: what they add, what trains, what they merge to."""

import pytest
import torch
from support.tiny_export import tiny_config

from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.adapters import MergedWeights
from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.checkpoint.writing import write_checkpoint
from kairos_train.config.compose import to_yaml
from kairos_train.config.schema import LoraConfig
from kairos_train.model.layout import check_layers, full_shapes
from kairos_train.model.lora import is_adapter, merge, scale_of
from kairos_train.training.engine.initial_weights import InitialWeights, build_model, load_initial


def adapted_config(**lora):
    config = tiny_config()
    config.stage.lora = LoraConfig(**{"rank": 3, "alpha": 6.0, **lora})
    return config


def velocities(model):
    rng = torch.Generator().manual_seed(0)
    out = model(
        torch.randn(2, 16, 2, 4, 4, generator=rng),
        torch.randn(2, 5, 24, generator=rng),
        None,
        torch.tensor([300.0, 700.0]),
        [1, 1],
        state=torch.randn(2, 1, 2, generator=rng),
        action=torch.randn(2, 8, 3, generator=rng),
        action_timestep=torch.tensor([300.0, 700.0]),
    )
    return out.video, out.action


def disturb(model):
    """Zero heads, gates and adapters would hide what they do."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def test_fresh_adapters_change_nothing_and_alone_train():
    plain, model = build_model(tiny_config()), build_model(adapted_config())
    for a, b in zip(velocities(plain), velocities(model)):
        assert torch.equal(a, b)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(is_adapter(name) for name in trained if name.startswith("video_dit."))
    assert all(name in trained for name, _ in model.named_parameters() if name.startswith("action_dit."))
    assert {name.split(".", 3)[3] for name in trained if is_adapter(name)} >= {
        *("self_attn.q.lora_a", "cross_attn.o.lora_b", "ffn.0.lora_a", "gated_delta.o_proj.lora_b")
    }
    shapes = full_shapes(adapted_config())
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes


@pytest.mark.parametrize(("rank", "alpha"), [(3, 6.0), (4, 1.0), (1, 8.0)])
def test_an_adapter_adds_alpha_over_its_rank_times_b_a(rank, alpha):
    lora = LoraConfig(rank=rank, alpha=alpha)
    layer = disturb(build_model(adapted_config(rank=rank, alpha=alpha))).video_dit.blocks[0].ffn[0]
    w, bias, a, b = layer.weight, layer.bias, layer.lora_a, layer.lora_b
    assert (a.shape, b.shape) == ((rank, w.shape[1]), (w.shape[0], rank))
    x = torch.randn(5, w.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = x @ w.T + bias + alpha / rank * (x @ a.T) @ b.T
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(merge(w, a, b, scale_of(lora)), w + alpha / rank * b @ a)


def test_merging_computes_in_float32_from_weights_of_any_type():
    rng = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(*shape, generator=rng).bfloat16() for shape in ((6, 5), (3, 5), (6, 3)))
    merged = merge(w, a, b, 0.3)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, w.float() + 0.3 * b.float() @ a.float())


def test_targets_and_streams_are_chosen():
    model = build_model(adapted_config(targets=["ffn.2"], streams=["action"]))
    adapters = {name for name, _ in model.named_parameters() if is_adapter(name)}
    assert adapters == {f"action_dit.blocks.{i}.ffn.2.lora_{x}" for i in range(4) for x in "ab"}
    assert all(p.requires_grad for p in model.video_dit.parameters())
    with pytest.raises(UserError, match=r"targets holds 'ffn\.3'; a layer of the video stream has cross_attn\.k, "):
        check_layers(adapted_config(targets=["ffn.3"]))


def test_streams_are_adapted_together_where_each_has_a_target():
    model = build_model(adapted_config(streams=["video", "action"]))  # GATED targets are the video's only
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(is_adapter(name) for name in trained)
    assert {name.split("_dit.")[0] for name in trained} == {"video", "action"}
    with pytest.raises(UserError, match=r"leaves the action stream nothing; add one of cross_attn\.k, "):
        build_model(adapted_config(targets=["gated_delta.q_proj"], streams=["video", "action"]))


@pytest.fixture
def trained(tmp_path):
    """A model with adapters that are not zero, and its checkpoint."""
    config = adapted_config()
    model = disturb(build_model(config))
    path = write_checkpoint(
        tmp_path, 1, sections={"model": model.state_dict()}, state={}, files={"config.yaml": to_yaml(config)}
    )
    return model, CheckpointReader(path)


def test_merged_weights_are_the_adapted_model(trained):
    model, reader = trained
    merged = build_model(tiny_config())
    load_initial(merged, InitialWeights(MergedWeights(reader), "model", action_init="random"))
    for a, b in zip(velocities(merged), velocities(model)):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
    weights, name = MergedWeights(reader), "video_dit.blocks.0.ffn.0.weight"
    part = (slice(3, 17), slice(1, 9))
    torch.testing.assert_close(weights.read("model", name, part), weights.read("model", name)[part])
    assert not torch.equal(weights.read("model", name), reader.read("model", name))
    assert not any(is_adapter(name) for name in weights.names("model"))


def test_a_stage_goes_on_with_adapters_or_from_what_they_merged_to(trained):
    model, reader = trained
    config = adapted_config()
    config.stage.init_from, config.stage.init_weights = str(reader.path), "raw"
    again = build_model(config)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    config.stage.lora = LoraConfig()
    whole = build_model(config)
    for a, b in zip(velocities(whole), velocities(model)):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
    config.stage.lora = LoraConfig(rank=2)
    with pytest.raises(UserError, match=r"lora_a is \[3, 32\] there, \[2, 32\] in this model"):
        build_model(config)
