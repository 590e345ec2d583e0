"""Horizons and contraction of GATED heads: against explicit products, and on a model whose decays are known."""

import numpy as np
import pytest
import torch

from dataloaders.shards import read_index
from evaluation.held_out import spread_batches
from evaluation.losses import conditioned, objective_of
from evaluation.memory_probe import contraction, horizon, measure
from kairos_train.inference.load import load
from kairos_train.inference.predict import Predictor
from kairos_train.model.capture import capture_recurrences, gdn_layers


def tokens(*, strength=1.0, length=20, key_dim=4, seed=0):
    torch.manual_seed(seed)
    k = torch.nn.functional.normalize(torch.randn(2, length, 3, key_dim), dim=-1)
    g = -torch.rand(2, length, 3) * 0.3
    return k, g, torch.rand(2, length, 3) * strength


def explicit(k, g, beta, i, head):
    """(Π‖A_t‖, ‖ΠA_t‖) of one sequence and head, matrix by matrix."""
    bound, product = 1.0, np.eye(k.shape[-1])
    for t in range(k.shape[1]):
        key = k[i, t, head].double().numpy()
        step = np.exp(float(g[i, t, head])) * (np.eye(len(key)) - float(beta[i, t, head]) * np.outer(key, key))
        bound, product = bound * np.linalg.norm(step, 2), step @ product
    return bound, np.linalg.norm(product, 2)


@pytest.mark.parametrize("strength", [1.0, 3.0], ids=["strengths_of_a_sigmoid", "strengths_that_overshoot"])
def test_bound_and_norm_are_those_of_the_explicit_product(strength):
    k, g, beta = tokens(strength=strength)
    found = contraction(k, g, beta)
    for i in range(2):
        for head in range(3):
            bound, norm = explicit(k, g, beta, i, head)
            assert float(found.log_bound[i, head]) == pytest.approx(np.log(bound), rel=1e-5)
            assert float(found.log_norm[i, head]) == pytest.approx(np.log(norm), rel=1e-4)
    assert (found.log_norm <= found.log_bound + 1e-5).all()
    # strengths above 2 turn a key's direction into one that grows, and the bound says so
    assert bool((found.log_bound > g.double().sum(1) + 1e-3).any()) == (strength > 2)
    assert bool((found.largest > 1).any()) == (strength > 2)


def test_norm_stays_in_range_where_decays_underflow():
    k, g, beta = tokens(length=200)
    found = contraction(k, g * 100, beta)
    assert (found.log_norm < -1000).all()
    assert found.log_norm.isfinite().all()


def test_a_head_of_constant_decay_has_the_horizon_that_it_must_have(exported, shards):
    predictor = Predictor(load(exported))
    for layer in gdn_layers(predictor.policy.model).values():
        layer.a_proj.weight.zero_()
        layer.A_log.copy_(torch.log(torch.tensor([0.1, 0.001])))
        layer.dt_bias.copy_(torch.log(torch.expm1(torch.ones(2))))  # softplus of it is 1
    result = measure(predictor, read_index(shards), samples=5, seed=0, batch_size=2)
    (layer,) = result["layers"]
    assert layer["layer"] == 3
    assert (result["windows"], result["frames"], result["tokens_per_frame"]) == (5, 2, 4)
    assert result["seconds_per_frame"] == pytest.approx(4 * 2 / 10)
    for head, decay in zip(layer["heads"], (0.1, 0.001)):
        for name in ("horizon_frames", "token_horizon_frames"):
            assert list(head[name].values()) == pytest.approx([1 / (4 * decay)] * 5, rel=1e-4)
        assert head["decay_per_frame"] == pytest.approx(np.exp(-4 * decay), rel=1e-5)
        assert head["log10_bound"]["median"] == pytest.approx(-8 * decay / np.log(10), rel=1e-4)
        assert head["log10_norm"]["median"] <= head["log10_bound"]["median"] + 1e-6
        assert head["largest_factor"] == pytest.approx(np.exp(-decay), rel=1e-5)


def test_horizons_are_of_the_decays_that_the_layer_computes(exported, shards):
    predictor, index = Predictor(load(exported)), read_index(shards)
    model = predictor.policy.model
    (layer,) = gdn_layers(model).values()
    seen = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(layer.log_decay(inputs[0].flatten(1, 2))))
    result = measure(predictor, index, samples=6, seed=0, batch_size=4)
    hook.remove()
    g = torch.cat(seen).double().numpy()
    expected = -1 / (4 * g.mean(1))
    for head, found in enumerate(result["layers"][0]["heads"]):
        assert found["horizon_frames"]["median"] == pytest.approx(np.median(expected[:, head]), rel=1e-6)
        assert found["horizon_frames"]["q95"] == pytest.approx(np.quantile(expected[:, head], 0.95), rel=1e-6)
        assert found["token_horizon_frames"]["q25"] == pytest.approx(
            np.quantile(-1 / (4 * g[..., head]), 0.25), rel=1e-6
        )


def test_capturing_changes_nothing_and_ends(exported, shards):
    predictor, captured = Predictor(load(exported)), []
    model = predictor.policy.model
    (layer,) = gdn_layers(model).values()
    before = layer.hooks
    batch = next(spread_batches(read_index(shards), count=2, batch_size=2, with_frames=True))
    inputs = conditioned(predictor, objective_of(predictor, seed=0), batch, draw=0).model_inputs()
    expected = model(**inputs)
    with capture_recurrences(model, lambda name, *given: captured.append(name)):
        output = model(**inputs)
    assert captured == ["video_dit.blocks.3.gated_delta"]
    assert torch.equal(output.video, expected.video)
    assert torch.equal(output.action, expected.action)
    with pytest.raises(ZeroDivisionError), capture_recurrences(model, lambda *given: None):
        raise ZeroDivisionError
    assert layer.hooks is before


def test_a_head_that_forgets_nothing_has_a_finite_horizon():
    assert horizon(np.array([0.0, -0.5]), 4).tolist() == [1e12 / 4, 0.5]
