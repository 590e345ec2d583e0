"""Fixed-noise losses of an export: the training's own numbers, whatever the batching."""

import copy
import dataclasses

import pytest
import torch
from support.tiny_export import feed_of, tiny_config, write_tiny_checkpoint, write_tiny_shards

from dataloaders.loading.loader import fixed_batches
from dataloaders.shards import read_index
from evaluation.held_out import observe, spread_batches
from evaluation.intervals import Z95
from evaluation.losses import SIGMA_BINS, _stream, measure
from kairos_train.basics.errors import UserError
from kairos_train.conditioning.interfaces import Encoders
from kairos_train.inference.load import load
from kairos_train.inference.predict import Predictor
from kairos_train.weights.export import export


def run(exported, shards, **changes):
    settings = {"samples": 1000, "seed": 3, "batch_size": 32, "draws": 1, **changes}
    return measure(Predictor(load(exported)), read_index(shards), **settings)


@pytest.mark.parametrize("encoded", [False, True], ids=["pictures", "encoded"])
def test_losses_are_those_of_the_training_on_the_same_windows_and_noise(exported, shards, tmp_path, encoded):
    shards = write_tiny_shards(tmp_path, encoded=True) if encoded else shards
    policy = load(exported)
    config = copy.deepcopy(policy.config)
    config.seed, config.stage.cfg_dropout = 3, 0.0
    feed = feed_of(config, [read_index(shards)])
    sums, counts = {"video": 0.0, "action": 0.0}, {"video": 0, "action": 0}
    for batch in fixed_batches(shards, batch_size=11, count=1000, with_frames=not encoded):
        noisy = feed.condition(batch, step=-1)  # of validation
        with torch.no_grad():
            output = policy.model(**noisy.model_inputs())
        found = feed.objective.loss_sums(noisy, output.video, output.action)
        for stream, count in (("video", sum(noisy.video_elements())), ("action", noisy.action_steps())):
            sums[stream] += float(getattr(found, stream).sum())
            counts[stream] += count
    result = run(exported, shards)
    for stream in sums:
        assert result["streams"][stream]["loss"] == pytest.approx(sums[stream] / counts[stream], rel=1e-5)
    assert result["total"] == pytest.approx(sum(sums[s] / counts[s] for s in sums), rel=1e-5)
    assert result["windows"] == read_index(shards).samples


def test_equal_weights_give_equal_numbers_whatever_the_batching_and_another_seed_others(exported, shards):
    whole, parts, other = (run(exported, shards, **c) for c in ({}, {"batch_size": 5}, {"seed": 4}))
    for stream, values in whole["streams"].items():
        assert parts["streams"][stream]["loss"] == pytest.approx(values["loss"], rel=1e-5)
        assert [b["draws"] for b in parts["streams"][stream]["bins"]] == [b["draws"] for b in values["bins"]]
        assert abs(other["streams"][stream]["loss"] / values["loss"] - 1) > 1e-3


def test_more_draws_are_more_noises_of_the_same_windows(exported, shards):
    one, three = (run(exported, shards, draws=draws, samples=6)["streams"]["video"] for draws in (1, 3))
    assert sum(b["draws"] for b in one["bins"]) == 6
    assert sum(b["draws"] for b in three["bins"]) == 18
    assert all(a["draws"] <= b["draws"] for a, b in zip(one["bins"], three["bins"]))


def test_bins_and_datasets_are_the_equation_over_their_own_samples():
    rows = [  # dataset, episode, σ, Σ w·e², n
        ("a", 0, 0.05, 6.0, 2),
        ("a", 1, 0.19, 2.0, 2),
        ("b", 0, 0.95, 9.0, 1),
        ("b", 0, 1.0, 1.0, 1),
        ("b", 1, 0.5, 0.0, 0),
    ]
    found = _stream(rows)
    assert found["loss"] == 18 / 6
    assert [b["loss"] for b in found["bins"]] == [2.0, None, None, None, 5.0]
    assert [b["draws"] for b in found["bins"]] == [2, 0, 0, 0, 2]
    assert found["bins"][1]["sigma"] == [1 / SIGMA_BINS, 2 / SIGMA_BINS]
    assert {name: row["loss"] for name, row in found["datasets"].items()} == {"a": 2.0, "b": 5.0}
    # episodes 0 and 1 of each dataset are four units: residuals 6 − 6, 2 − 6, 10 − 6 and 0 of mean 3
    assert found["ci95"] == pytest.approx(Z95 * (4 / 3 * 32) ** 0.5 / 6)
    assert _stream([("a", 0, 0.5, 0.0, 0)])["loss"] == 0.0


def test_a_model_without_actions_or_given_frames_has_the_video_loss_of_its_own_condition(shards, tmp_path):
    config = tiny_config(streams="video", actions=False, conditions={"t2v": 0.5, "null2v": 0.5})
    export(write_tiny_checkpoint(tmp_path / "run", None, config=config), tmp_path / "export", dtype="fp32")
    result = run(tmp_path / "export", shards, samples=6)
    assert result["condition"] == "t2v"
    assert set(result["streams"]) == {"video"}


class SeesPictures:
    """A text encoder that would look at the first frame."""

    def __init__(self, text):
        self._text, self.text_dim = text, text.text_dim
        self.identity = text.identity | {"image": True}

    def encode(self, prompts, images=None):
        raise AssertionError("what is stored is taken")


def test_stored_texts_go_without_the_picture_that_a_model_is_not_given(exported, tmp_path):
    encoded = write_tiny_shards(tmp_path, encoded=True)
    policy = dataclasses.replace(load(exported), encoders=None)
    predictor = Predictor(policy)
    predictor = Predictor(policy, encoders=Encoders(predictor.encoders.video, SeesPictures(predictor.encoders.text)))
    batch = next(spread_batches(read_index(encoded), count=2, batch_size=2, with_frames=False))
    alone = (batch.context + 1, batch.context_mask)
    assert torch.equal(observe(predictor, batch).context, batch.context.float())
    policy.config.stage.conditions = {"t2v": 1.0}
    with pytest.raises(UserError, match=r"lacks context_text\.npy"):
        observe(predictor, batch)
    batch = dataclasses.replace(batch, contexts={"text": alone})
    assert torch.equal(observe(predictor, batch).context, alone[0].float())
