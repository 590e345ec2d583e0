"""Open-loop errors of a tiny random policy on real shards: the arithmetic, the baselines, and what they cost."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_export import tiny_config, write_tiny_checkpoint, write_tiny_shards

from dataloaders.loading.loader import fixed_batches
from dataloaders.shards import read_index
from evaluation.held_out import open_shards, spread_batches, window_seed
from evaluation.intervals import Z95
from evaluation.open_loop import _errors, _predictions, evaluate, format_table
from kairos_train.basics.errors import UserError
from kairos_train.inference.load import load
from kairos_train.inference.normalization import from_statistics
from kairos_train.inference.predict import Predictor
from kairos_train.weights.export import export


@pytest.fixture(scope="module")
def everything(shards):
    return next(fixed_batches(shards, batch_size=1000, count=1))


def run(exported, shards, **changes):
    return evaluate(exported, **{"shards": shards, "out": None, "samples": 1000, "steps": 3, "seed": 5, **changes})


def test_baselines_are_what_their_names_say(exported, shards, everything):
    result = run(exported, shards)
    assert result["windows"] == len(everything.keys) == read_index(shards).samples
    assert result["episodes"] == 4
    valid = everything.action_mask
    assert not valid.all()
    raw = everything.actions[valid]
    statistics = json.loads((shards / "dataset_stats.json").read_text())
    mean = torch.tensor(statistics["action"]["action"]["global_mean"], dtype=torch.float32)
    normalise = from_statistics(statistics, group="action", key="action", mode="minmax").normalize
    for name, constant in (("hold", torch.zeros(3)), ("mean", mean)):
        row = result["rows"][name]
        assert math.isclose(row["mse_raw"], (raw - constant).square().mean(), rel_tol=1e-5)
        assert math.isclose(row["mae_raw"], (raw - constant).abs().mean(), rel_tol=1e-5)
        assert math.isclose(row["mse"], (normalise(raw) - normalise(constant)).square().mean(), rel_tol=1e-5)
        step = everything.actions[:, 6][valid[:, 6]]
        assert math.isclose(row["mse_raw_per_step"][6], (step - constant).square().mean(), rel_tol=1e-5)


def test_the_model_row_is_what_the_predictor_predicts_whatever_the_batching(exported, shards, everything):
    policy = load(exported)
    predictor = Predictor(policy, sampler=policy.sampler.replaced(steps=3))
    errors = []
    for i, key in enumerate(everything.keys):
        frame, state = everything.frames[i, 0].numpy(), everything.state[i, 0].numpy()
        chunk = predictor.predict(frame, state, everything.meta[i]["task"], seed=window_seed(5, key)).actions
        errors.append(np.square(chunk - everything.actions[i].numpy())[everything.action_mask[i].numpy()])
    expected = np.concatenate(errors).mean()
    for batch_size in (32, 7):
        row = run(exported, shards, batch_size=batch_size)["rows"]["model"]
        assert math.isclose(row["mse_raw"], expected, rel_tol=1e-4)


def test_the_blind_row_sees_text_and_noise_but_no_observation(exported, shards):
    predictor, index = Predictor(load(exported)), read_index(shards)
    batch = next(spread_batches(index, count=6, batch_size=6, with_frames=True))
    changed = dataclasses.replace(batch, frames=255 - batch.frames, state=batch.state + 1)
    before, after = (_predictions(predictor, b, 0) for b in (batch, changed))
    assert torch.equal(before["blind"], after["blind"])
    assert (before["model"] - after["model"]).abs().amax((1, 2)).min() > 1e-6
    other_text = _predictions(predictor, dataclasses.replace(batch, text=["other"] * 6), 0)
    assert (before["blind"] - other_text["blind"]).abs().amax((1, 2)).min() > 1e-6


def test_encoded_shards_give_the_same_errors_as_pictures(exported, shards, tmp_path):
    encoded = write_tiny_shards(tmp_path, encoded=True)
    assert read_index(encoded).encoders is not None
    for name, row in run(exported, encoded)["rows"].items():
        assert math.isclose(row["mse"], run(exported, shards)["rows"][name]["mse"], rel_tol=1e-2), name


def test_windows_are_spread_over_all_shards_and_the_same_every_time(shards):
    index = read_index(shards)
    assert len(index.shards) >= 3
    keys = [b.keys for b in spread_batches(index, count=5, batch_size=2, with_frames=False)]
    assert [len(k) for k in keys] == [2, 2, 1]
    assert keys == [b.keys for b in spread_batches(index, count=5, batch_size=2, with_frames=False)]
    order = [key for b in fixed_batches(shards, batch_size=4, count=99, with_frames=False) for key in b.keys]
    positions = [order.index(key) for batch in keys for key in batch]
    assert (positions[0], positions[-1]) == (0, index.samples - 1)
    assert np.diff(positions).max() - np.diff(positions).min() <= 1


def test_errors_are_averaged_over_valid_actions_with_episodes_as_units():
    recorded, valid = torch.zeros(3, 2, 1), torch.tensor([[True, True], [True, False], [True, False]])
    predicted = torch.tensor([[[1.0], [3.0]], [[2.0], [99.0]], [[2.0], [99.0]]])
    errors = _errors(predicted, recorded, valid, ["a", "b", "b"])
    assert errors["mse"] == (1 + 9 + 4 + 4) / 4
    assert errors["mae"] == (1 + 3 + 2 + 2) / 4
    assert errors["mse_per_step"] == [3.0, 9.0]
    # residuals of the two episodes: 10 - 2·4.5 = 1 and 8 - 2·4.5 = -1
    assert math.isclose(errors["mse_ci95"], Z95 * math.sqrt(2 / 1 * 2) / 4)
    assert _errors(predicted, recorded, valid, ["a"] * 3)["mse_ci95"] is None
    none_late = _errors(predicted, recorded, torch.tensor([[True, False]] * 3), ["a", "b", "b"])
    assert none_late["mse_per_step"][1] is None


def test_files_and_table_carry_every_row(exported, shards, tmp_path):
    result = run(exported, shards, out=tmp_path / "eval", samples=6)
    assert result["windows"] == 6
    assert json.loads((tmp_path / "eval" / "open_loop.json").read_text()) == result
    assert Image.open(tmp_path / "eval" / "open_loop.png").size == (600, 400)
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["open_loop.json", "open_loop.png"]
    table = format_table(result)
    for name, row in result["rows"].items():
        assert name in table
        assert f"{row['mse']:.4f}" in table
    assert "6 windows" in table


def test_what_cannot_be_evaluated_is_refused(exported, shards, tmp_path):
    video = write_tiny_checkpoint(tmp_path / "run", None, config=tiny_config(streams="video", actions=False))
    export(video, tmp_path / "video")
    with pytest.raises(UserError, match="without actions"):
        run(tmp_path / "video", shards)
    with pytest.raises(UserError, match="samples=0"):
        run(exported, shards, samples=0)
    policy = load(exported)
    policy.config.data.window.frames = 9
    with pytest.raises(UserError, match=r"window\.frames is 5, the model was trained with 9"):
        open_shards(shards, policy)
    damaged = shards.parent / "damaged"
    damaged.mkdir()
    for file in shards.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[: -2048 if file.name == "shard-000001.tar" else None])
    with pytest.raises(UserError, match=r"shard-000001\.tar"):
        run(exported, damaged)
