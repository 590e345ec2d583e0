"""Statistics over a dataset against numpy on the windows written out."""

import json

import numpy as np
import pytest

from dataloaders.config import WindowConfig
from dataloaders.packing import statistics
from dataloaders.packing.statistics import NAMES, QUANTILES, ColumnSummary, column_statistics, dataset_statistics
from dataloaders.windows import action_count, cut_actions, windows_of


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


def test_a_step_that_one_window_alone_reaches_has_its_own_values_and_one_that_none_does_those_of_all():
    window = WindowConfig(frames=5, action_video_freq_ratio=2, stride=100)  # 8 actions
    actions = _episodes([3, 5], 2)
    stats = dataset_statistics(actions, actions, window=window, state_key="s", action_key="a")["action"]["a"]
    assert stats["stepwise_mean"][4] == pytest.approx(actions[1][4].tolist())
    assert stats["stepwise_std"][4] == [0.0, 0.0]
    for step in (5, 7):
        assert stats["stepwise_mean"][step] == stats["global_mean"]


def test_the_rank_error_counts_every_row_that_a_merged_pair_stands_for(monkeypatch):
    monkeypatch.setattr(statistics, "KEEP", 4)
    summary = ColumnSummary()
    for value in range(13):  # pairs move up at rows 5, 9 and 13, and then of the six pairs again
        summary.add(np.array([[float(value)]]))
    assert summary.rank_error == (1 + 1 + 1 + 2) / 13


def _summary(values, pieces=7):
    summary = ColumnSummary()
    for part in np.array_split(values, pieces):
        summary.add(part)
    return summary


def test_large_offset_loses_no_precision_and_constants_have_no_spread():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=10_000)
    values = np.stack([1e8 + noise, np.full(10_000, 0.1, np.float32)], axis=1)
    for pieces in (1, 7):
        got = column_statistics(_summary(values, pieces))
        np.testing.assert_allclose(got["std"][0], noise.std(), rtol=1e-6)
        assert got["std"][1] == 0
        assert got["mean"][1] == np.float32(0.1)


@pytest.mark.parametrize("order", ["random", "rising", "falling", "waves"])
def test_quantiles_of_many_rows_keep_within_the_stated_error(order, monkeypatch):
    monkeypatch.setattr("dataloaders.packing.statistics.KEEP", 256)
    rng = np.random.default_rng(0)
    values = np.sort(rng.normal(size=60_000)).astype(np.float32)
    values = {"random": rng.permutation(values), "rising": values, "falling": values[::-1]}.get(
        order, values.reshape(200, 300).T.reshape(-1)
    )
    summary = _summary(values[:, None], 431)
    assert 0 < summary.rank_error < 0.05
    got = column_statistics(summary)
    np.testing.assert_allclose(got["mean"], values.mean(dtype=np.float64), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(got["std"], values.std(dtype=np.float64), rtol=1e-9)
    assert (got["min"], got["max"]) == (values.min(), values.max())
    for name, q in QUANTILES.items():
        rank = np.searchsorted(np.sort(values), got[name][0]) / len(values)
        assert abs(rank - q) <= summary.rank_error + 1 / len(values), (name, rank)
    assert len(summary.rows()[0]) < 256 * 12, "memory does not grow with the rows"
    assert summary.rows()[1].sum() == len(values)


def test_quantiles_of_few_rows_are_exact():
    values = np.random.default_rng(0).normal(size=(5000, 3))
    summary = _summary(values)
    assert summary.rank_error == 0
    for name, q in QUANTILES.items():
        np.testing.assert_allclose(column_statistics(summary)[name], np.quantile(values, q, axis=0), rtol=1e-12)


def test_differences_to_the_state_count_as_the_windows_show_them():
    window = WindowConfig(frames=5, action_video_freq_ratio=2, stride=3, action_values="minus_state", absolute_dims=[1])
    actions, states = _episodes([30, 7, 2, 53], 3), _episodes([30, 7, 2, 53], 4, seed=1)
    stats = dataset_statistics(states, actions, window=window, state_key="s", action_key="a")["action"]["a"]
    rows = [
        cut_actions(a, w.start, window, states=s)[: w.valid_actions]
        for a, s in zip(actions, states)
        for w in windows_of(len(a), window)
    ]
    total = _reference(np.concatenate(rows))
    for name in NAMES:
        np.testing.assert_allclose(stats[f"global_{name}"], total[name], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(stats["stepwise_max"][0], np.max([r[0] for r in rows], axis=0), rtol=1e-6)


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
