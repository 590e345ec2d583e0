"""Statistics over a dataset against numpy on the windows written out."""

import json

import numpy as np
import pytest

from dataloaders.statistics import NAMES, column_statistics, dataset_statistics
from dataloaders.windows import action_count, cut_actions, windows_of
from kairos_train.config.schema import WindowConfig


def _reference(values: np.ndarray) -> dict[str, np.ndarray]:
    values = values.astype(np.float64)
    return {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
        "q01": np.quantile(values, 0.01, axis=0),
        "q99": np.quantile(values, 0.99, axis=0),
    }


def _episodes(lengths, dim, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, dim)).astype(np.float32).cumsum(0) for n in lengths]


@pytest.mark.parametrize("stride", [1, 3, 20])
def test_actions_count_as_the_windows_show_them(stride):
    window = WindowConfig(frames=5, action_video_freq_ratio=2, stride=stride)
    actions, states = _episodes([30, 7, 2, 53], 3), _episodes([30, 7, 2, 53], 4, seed=1)
    stats = dataset_statistics(states, actions, window=window, state_key="s", action_key="a")
    shown = [[] for _ in range(action_count(window))]
    for episode in actions:
        for w in windows_of(len(episode), window):
            chunk = cut_actions(episode, w.start, window)
            for i in range(w.valid_actions):
                shown[i].append(chunk[i])
    got = stats["action"]["a"]
    total = _reference(np.array([row for step in shown for row in step]))
    for name in NAMES:
        np.testing.assert_allclose(got[f"global_{name}"], total[name], rtol=1e-12, atol=1e-12)
        for i, step in enumerate(shown):
            np.testing.assert_allclose(got[f"stepwise_{name}"][i], _reference(np.array(step))[name], atol=1e-12)


def test_states_count_once_per_frame():
    states = _episodes([30, 7, 1], 4)
    stats = dataset_statistics(states, states, window=WindowConfig(frames=5), state_key="s", action_key="a")
    total = _reference(np.concatenate(states))
    for name in NAMES:
        np.testing.assert_allclose(stats["state"]["s"][f"global_{name}"], total[name], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(stats["state"]["s"][f"stepwise_{name}"], [total[name]], rtol=1e-12, atol=1e-12)
    assert (stats["num_episodes"], stats["num_transition"]) == (3, 38)


def test_large_offset_loses_no_precision_and_constants_have_no_spread():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=10_000)
    values = np.stack([1e8 + noise, np.full(10_000, 0.1, np.float32)], axis=1)
    got = column_statistics(values)
    np.testing.assert_allclose(got["std"][0], noise.std(), rtol=1e-6)
    assert got["std"][1] == 0
    assert got["mean"][1] == np.float32(0.1)
    weighted = column_statistics(values, rng.integers(1, 9, size=10_000))
    assert weighted["std"][1] == 0


def test_step_that_no_window_reaches_takes_the_global_values():
    window = WindowConfig(frames=5, action_video_freq_ratio=1)
    episodes = _episodes([3, 3], 2)
    got = dataset_statistics(episodes, episodes, window=window, state_key="s", action_key="a")["action"]["a"]
    assert got["stepwise_mean"][3] == got["global_mean"]
    assert got["stepwise_mean"][0] != got["global_mean"]


@pytest.mark.parametrize("name", ["libero_plus", "robotwin"])
def test_layout_is_that_of_the_published_files(shared, name):
    published = json.loads((shared / "samples" / "statistics" / f"{name}_dataset_stats.json").read_text())
    dim_a, dim_s = (len(published[g]["default"]["global_min"]) for g in ("action", "state"))
    window = WindowConfig(frames=9, action_video_freq_ratio=4)
    ours = dataset_statistics(
        _episodes([40], dim_s), _episodes([40], dim_a), window=window, state_key="default", action_key="default"
    )

    def shapes(tree):
        if isinstance(tree, dict):
            return {k: shapes(v) for k, v in tree.items()}
        return np.shape(tree)

    assert shapes(json.loads(json.dumps(ours))) == shapes(published)
