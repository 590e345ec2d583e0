"""States and actions to the model's range and back."""

import json

import numpy as np
import pytest
import torch

from dataloaders import config
from kairos_train.basics.errors import UserError
from kairos_train.inference.normalization import MIN_RANGE, MODES, Normalizer, action_range, from_statistics

STATS = {
    "global_min": [-2.0, 1.0, 0.5],
    "global_max": [4.0, 3.0, 0.50005],
    "global_q01": [-1.0, 1.5, 0.5],
    "global_q99": [3.0, 2.5, 0.5],
    "global_mean": [1.0, 2.0, 0.5],
    "global_std": [2.0, 0.25, 0.0],
}


@pytest.mark.parametrize(("mode", "low", "high"), [("minmax", "min", "max"), ("quantile", "q01", "q99")])
def test_bounds_map_to_plus_and_minus_one(mode, low, high):
    normalizer = Normalizer(STATS, mode)
    bounds = torch.tensor([STATS[f"global_{low}"], STATS[f"global_{high}"]])
    torch.testing.assert_close(normalizer.normalize(bounds)[:, :2], torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))


def test_constant_dimension_maps_to_zero_with_scale_one():
    normalizer = Normalizer(STATS, "minmax")
    out = normalizer.normalize(torch.tensor([[1.0, 2.0, 0.5], [1.0, 2.0, 2.5]]))
    assert out[0, 2] == 0
    torch.testing.assert_close(out[1, 2], torch.tensor(2.0))  # an unseen value is neither amplified nor lost
    torch.testing.assert_close(normalizer.unnormalize(torch.zeros(3))[2], torch.tensor(0.5))


def test_a_range_is_flat_below_1e_4_and_no_wider():
    stats = {"global_min": [0.0, 0.0], "global_max": [0.99e-4, 1.01e-4]}
    out = Normalizer(stats, "minmax").normalize(torch.tensor([0.5e-4, 0.505e-4 + 0.101e-4]))
    torch.testing.assert_close(out, torch.tensor([0.5e-4, 0.2]))


def test_zscore_adds_1e_8_to_the_std():
    stats = {"global_mean": [0.0], "global_std": [2e-4]}  # a dimension that moves less counts as a constant
    out = Normalizer(stats, "zscore").normalize(torch.tensor([2e-4]))
    torch.testing.assert_close(out, torch.tensor([2e-4 / (2e-4 + 1e-8)]))


def test_zscore_subtracts_mean_and_divides_by_std():
    out = Normalizer(STATS, "zscore").normalize(torch.tensor([5.0, 2.25, 0.5]))
    torch.testing.assert_close(out, torch.tensor([2.0, 1.0, 0.0]))


@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize("mode", ["minmax", "quantile", "zscore"])
def test_a_dimension_that_never_moved_is_neither_amplified_nor_driven(mode, stepwise):
    """Dimension 0 moves, 1 is a constant, 2 moves by less than a reading's noise."""
    low, high = np.array([-2.0, 0.1, 0.5]), np.array([2.0, 0.1, 0.50002])
    fields = {"min": low, "max": high, "q01": low, "q99": high, "mean": (low + high) / 2, "std": (high - low) / 4}
    stats = {f"global_{k}": v.tolist() for k, v in fields.items()}
    stats |= {f"stepwise_{k}": [(v + step).tolist() for step in (0, 1)] for k, v in fields.items() if k != "std"}
    stats["stepwise_std"] = [fields["std"].tolist()] * 2
    normalizer = Normalizer(stats, mode, stepwise=stepwise)
    step = torch.tensor([0.0, 1.0 if stepwise else 0.0])[:, None]  # (A, 1)
    near = torch.tensor([0.0, 0.1001, 0.50101]) + step
    assert normalizer.normalize(near)[:, 1:].abs().max() < 2e-3
    driven = normalizer.unnormalize(torch.full((5, 2, 3), 0.7))
    torch.testing.assert_close(driven[..., 1], (0.1 + step[:, 0]).expand(5, 2))
    assert (driven[..., 2] - step[:, 0]).min() >= 0.5 - 1e-6
    assert (driven[..., 2] - step[:, 0]).max() <= 0.50002 + 1e-6
    assert (driven[..., 0] - step[:, 0]).min() > 0.6, "what moves is driven"
    inside = torch.tensor([1.5, 0.1, 0.50001]) + step
    torch.testing.assert_close(normalizer.unnormalize(normalizer.normalize(inside)), inside, atol=1e-6, rtol=0)


def test_inference_which_needs_no_loader_means_what_the_loader_means():
    assert config.MIN_RANGE == MIN_RANGE
    assert all(map(config.NORMALIZATION.holds, MODES))


def test_statistics_without_a_range_tell_a_constant_by_its_std():
    normalizer = Normalizer({"global_mean": [0.1, 0.1], "global_std": [0.0, 1.0]}, "zscore")
    assert normalizer.normalize(torch.tensor([0.2, 0.2])).tolist() == pytest.approx([0.1, 0.1])
    assert normalizer.unnormalize(torch.tensor([3.0, 3.0])).tolist() == pytest.approx([0.1, 3.1])


def test_the_range_of_actions_is_widened_by_a_share_of_it():
    stats = {"action": {"arm": STATS}}
    low, high = action_range(stats, key="arm", kind="quantile", margin=0.5)
    assert low.tolist() == pytest.approx([-3.0, 1.0, 0.5])
    assert high.tolist() == pytest.approx([5.0, 3.0, 0.5])
    low, high = action_range(stats, key="arm", kind="minmax")
    assert (low.tolist(), high.tolist()) == (pytest.approx(STATS["global_min"]), pytest.approx(STATS["global_max"]))


@pytest.mark.parametrize("mode", ["minmax", "quantile", "zscore"])
def test_outliers_are_clamped_to_five(mode):
    out = Normalizer(STATS, mode).normalize(torch.tensor([[1e6, -1e6, 0.5]]))
    assert out.tolist()[0][:2] == [5.0, -5.0]


def test_none_changes_nothing():
    x = torch.tensor([[100.0, -7.0, 0.125]])
    normalizer = Normalizer(STATS, "none")
    assert torch.equal(normalizer.normalize(x), x)
    assert torch.equal(normalizer.unnormalize(x), x)


@pytest.mark.parametrize("name", ["libero_plus", "robotwin"])
@pytest.mark.parametrize("group", ["action", "state"])
@pytest.mark.parametrize("mode", ["minmax", "quantile", "zscore"])
def test_published_statistics_round_trip_within_their_bounds(shared, name, group, mode):
    path = shared / "samples" / "statistics" / f"{name}_dataset_stats.json"
    stats = {k: np.array(v) for k, v in json.loads(path.read_text())[group]["default"].items()}
    rng = np.random.default_rng(0)
    low, high = stats["global_min"], stats["global_max"]
    if mode != "minmax":  # stay where nothing is clamped
        low = np.maximum(low, stats["global_mean"] - 1.9 * stats["global_std"])
        high = np.minimum(high, stats["global_mean"] + 1.9 * stats["global_std"])
    if mode == "quantile":
        low, high = np.maximum(low, stats["global_q01"]), np.minimum(high, stats["global_q99"])
    raw = torch.from_numpy(rng.uniform(low, high, size=(5, 32, len(low)))).float()
    normalizer = from_statistics(path, group=group, key="default", mode=mode)
    out = normalizer.normalize(raw)
    assert out.dtype == torch.float32
    assert out.abs().max() <= (2 if mode == "zscore" else 1) + 1e-4
    torch.testing.assert_close(normalizer.unnormalize(out), raw, atol=2e-5, rtol=1e-5)


def test_stepwise_statistics_map_each_step_by_its_own(shared):
    path = shared / "samples" / "statistics" / "robotwin_dataset_stats.json"
    content = json.loads(path.read_text())
    normalizer = from_statistics(content, group="action", key="default", mode="minmax", stepwise=True)
    lowest = torch.tensor(content["action"]["default"]["stepwise_min"])  # (32, 14)
    torch.testing.assert_close(normalizer.normalize(lowest[None]), torch.full((1, 32, 14), -1.0))
    torch.testing.assert_close(normalizer.normalize(lowest[:7]), torch.full((7, 14), -1.0))
    with pytest.raises(UserError, match="32 steps"):
        normalizer.normalize(torch.zeros(1, 33, 14))


def test_reduced_precision_input_is_normalised_in_float32():
    out = Normalizer(STATS, "minmax").normalize(torch.ones(2, 3, dtype=torch.bfloat16))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[0, 0], torch.tensor(0.0))


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"3 dimensions.*\(2, 4\)"):
        Normalizer(STATS, "minmax").normalize(torch.zeros(2, 4))
    with pytest.raises(UserError, match="minmax, quantile, zscore, none"):
        Normalizer(STATS, "max")
    with pytest.raises(UserError, match="lacks global_q99"):
        Normalizer({"global_q01": [0.0]}, "quantile")
    with pytest.raises(UserError, match="equal"):
        Normalizer({"global_min": [0.0, 1.0], "global_max": [1.0]}, "minmax")
    for bad in (float("nan"), float("-inf")):
        with pytest.raises(UserError, match="not finite"):
            Normalizer({"global_min": [bad], "global_max": [1.0]}, "minmax")
    with pytest.raises(UserError, match="no action statistics for key 'actions'; it has default"):
        from_statistics({"action": {"default": STATS}}, group="action", key="actions", mode="minmax")
    with pytest.raises(UserError, match="cannot be read"):
        from_statistics(tmp_path / "absent.json", group="state", key="default", mode="minmax")
