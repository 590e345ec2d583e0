"""Long horizons: recordings put together from windows, and rollouts judged against them."""

import numpy as np
import pytest
import torch

from dataloaders.loading.batch import collate, decode_sample
from dataloaders.shards import read_index, read_shard
from evaluation.episodes import WindowPosition, choose, places, read
from evaluation.held_out import observe, window_seed
from evaluation.intervals import Z95
from evaluation.quality import QualityModel, ssim
from evaluation.rollout import psnr
from evaluation.video import DriftSettings, measure
from kairos_train.basics.errors import UserError
from kairos_train.inference.load import load
from kairos_train.inference.predict import Predictor

DRIFT = DriftSettings(videos=3, chunks=3)


@pytest.fixture(scope="module")
def predictor(exported):
    policy = load(exported)
    return Predictor(policy, sampler=policy.sampler.replaced(steps=2, guidance=1.0))


@pytest.fixture(scope="module")
def judged(predictor, shards):
    return measure(predictor, read_index(shards), DRIFT, seed=4)


# --- recordings ---


def place(number, start, valid=3, episode="a"):
    return WindowPosition(number, f"{episode}-{start}", ("set", episode), start, valid)


def test_recordings_are_the_episodes_frames_in_their_order(shards):
    index = read_index(shards)
    truth: dict[tuple, list[np.ndarray]] = {}
    for shard in index.shards:
        for raw in read_shard(index.folder, shard):
            sample = decode_sample(raw, index, with_frames=True)
            for i in range(sample.meta["valid_frames"]):
                truth.setdefault((sample.meta["episode"], sample.meta["start"] + 2 * i), []).append(sample.frames[i])
    recordings = choose(places(index), count=4, frames=99, ratio=2)
    assert [recording.first.episode[1] for recording in recordings] == [0, 1, 2, 3]
    for recording, (sample, frames) in zip(recordings, read(index, recordings)):
        assert sample.key == recording.first.key
        assert recording.first.start == 0
        assert len(frames) == recording.frames == 11, "22 raw frames, every other one"
        assert len({f.tobytes() for f in frames}) > 6, "the square moves"
        for number, frame in enumerate(frames):
            same = truth[recording.first.episode[1], 2 * number]
            assert any(np.array_equal(frame, other) for other in same)


def test_a_recording_ends_where_its_frames_do_not_follow_each_other():
    windows = [place(0, 0), place(1, 4), place(2, 5), place(3, 14)]  # frames 0 2 4, 4 6 8, 5 7 9, 14 16 18
    (found,) = choose(windows, count=1, frames=9, ratio=2)
    assert (found.first.number, found.frames) == (0, 5)
    assert found.pieces == {0: [(0, 0), (1, 1), (2, 2)], 1: [(1, 3), (2, 4)]}
    (short,) = choose(windows, count=1, frames=4, ratio=2)
    assert short.pieces == {0: [(0, 0), (1, 1), (2, 2)], 1: [(1, 3)]}
    (late,) = choose([place(0, 0, valid=1), place(1, 10)], count=1, frames=5, ratio=2)
    assert late.first.start == 10, "padding is no recording"


def test_recordings_are_spread_over_episodes_before_any_gives_a_second():
    windows = [place(10 * e + s, s, episode=str(e)) for e in range(4) for s in range(6)]
    two, four, six = (choose(windows, count=n, frames=3, ratio=1) for n in (2, 4, 6))
    assert [r.first.episode[1] for r in two] == ["0", "3"]
    assert [r.first.episode[1] for r in four] == ["0", "1", "2", "3"]
    assert [r.first.episode[1] for r in six] == ["0", "1", "2", "3", "0", "1"]
    assert [r.first.start for r in six] == [0, 0, 0, 0, 5, 5]
    assert choose(windows, count=6, frames=3, ratio=1) == six
    assert len(choose(windows, count=99, frames=3, ratio=1)) == 24


def test_samples_that_name_no_window_are_refused(tmp_path):
    from support.toy_shards import write_clips

    with pytest.raises(UserError, match="no usable 'episode'"):
        places(read_index(write_clips(tmp_path / "clips", [[(5, 32, 32, 2)]])))


# --- drift ---


def test_rollouts_are_the_predictors_and_each_frame_is_judged_by_its_own_recording(predictor, shards, judged):
    result, clips = judged
    index = read_index(shards)
    recordings = choose(places(index), count=3, frames=13, ratio=2)
    pairs = read(index, recordings)
    batch = collate([sample for sample, _ in pairs])
    seeds = [window_seed(4, key) for key in batch.keys]
    parts = predictor.rollout(observe(predictor, batch), mode="video", seeds=seeds, chunks=3, texts=batch.text)
    predicted = np.concatenate([part.frames for part in parts], axis=1)
    assert predicted.shape[1] == 13
    for name, metric in (("psnr", psnr), ("ssim", lambda a, b: float(ssim(a[None], b[None])[0]))):
        rows = result["metrics"][name]
        for ahead in (1, 4, 10):
            recorded = [frames[ahead] for _, frames in pairs]
            model = [metric(predicted[i, ahead], recorded[i]) for i in range(3)]
            copied = [metric(pairs[i][1][0], recorded[i]) for i in range(3)]
            assert rows["model"]["mean"][ahead - 1] == pytest.approx(np.mean(model), rel=1e-5)
            assert rows["copy"]["mean"][ahead - 1] == pytest.approx(np.mean(copied), rel=1e-5)
            difference = np.subtract(model, copied)
            assert rows["model_minus_copy"]["mean"][ahead - 1] == pytest.approx(difference.mean(), rel=1e-4)
            half = Z95 * difference.std(ddof=1) / 3**0.5
            assert rows["model_minus_copy"]["ci95"][ahead - 1] == pytest.approx(half, rel=1e-4)
    assert [clip.key for clip in clips] == batch.keys


def test_the_horizon_ends_with_the_recording(judged):
    result, clips = judged
    assert result["count"] == [3] * 10 + [0, 0]
    assert result["metrics"]["psnr"]["model"]["mean"][10:] == [None, None]
    assert result["metrics"]["psnr"]["model"]["ci95"][10:] == [None, None]
    assert [chunk["frames"] for chunk in result["chunks"]] == [[1, 4], [5, 8], [9, 12]]
    curve = result["metrics"]["psnr"]["model"]["mean"]
    for chunk, part in zip(result["chunks"], (curve[:4], curve[4:8], curve[8:10])):
        assert chunk["psnr"]["model"] == pytest.approx(np.mean(part))
    assert result["seconds_per_frame"] == pytest.approx(0.2)
    assert [video["frames"] for video in result["videos"]] == [10, 10, 10]
    assert all(clip.model.shape == clip.recorded.shape == clip.encoder.shape for clip in clips)


def test_a_random_model_is_below_its_encoder_and_the_standing_picture(judged):
    result, _ = judged
    first = result["chunks"][0]["psnr"]
    assert first["model"] < min(first["encoder"], first["copy"])
    assert result["beats_copy_frames"] == 0


def test_the_same_seed_gives_the_same_numbers_another_seed_others(predictor, shards, judged):
    short = DriftSettings(videos=2, chunks=1)
    first, again, other = (measure(predictor, read_index(shards), short, seed=s)[0] for s in (4, 4, 5))
    assert first["metrics"] == again["metrics"]
    assert first["metrics"]["psnr"]["model"]["mean"] != other["metrics"]["psnr"]["model"]["mean"]
    assert first["metrics"]["psnr"]["copy"] == other["metrics"]["psnr"]["copy"]


class Distance(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().mean((1, 2, 3))


class Colour(torch.nn.Module):
    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return clips.mean((2, 3, 4))


def test_weights_that_the_user_brings_judge_as_well(predictor, shards, tmp_path):
    judges = {}
    for name, module in (("lpips", Distance()), ("fvd", Colour())):
        torch.jit.script(module).save(str(tmp_path / f"{name}.pt"))
        judges[name] = QualityModel(tmp_path / f"{name}.pt", option=name, device=torch.device("cpu"))
    result, clips = measure(predictor, read_index(shards), DriftSettings(videos=3, chunks=2), seed=4, **judges)
    expected = [np.abs(clip.model[3] / 127.5 - clip.recorded[3] / 127.5).mean() for clip in clips]
    assert result["metrics"]["lpips"]["model"]["mean"][2] == pytest.approx(np.mean(expected), rel=1e-4)
    assert result["fvd"]["clips"] == 3
    features = {
        name: np.stack([getattr(clip, name).mean((0, 1, 2)) / 127.5 - 1 for clip in clips])
        for name in ("model", "recorded", "encoder")
    }
    mean = np.square(features["model"].mean(0) - features["recorded"].mean(0)).sum()
    assert mean <= result["fvd"]["model"] <= mean + 4 * sum(f.var(0).sum() for f in features.values())
    assert result["fvd"]["encoder"] < result["fvd"]["model"]


def test_fvd_needs_two_clips_that_are_recorded_to_the_end(predictor, shards, tmp_path):
    torch.jit.script(Colour()).save(str(tmp_path / "fvd.pt"))
    fvd = QualityModel(tmp_path / "fvd.pt", option="fvd", device=torch.device("cpu"))
    result, _ = measure(predictor, read_index(shards), DriftSettings(videos=2, chunks=3), seed=4, fvd=fvd)
    assert result["fvd"] == {"clips": 0, "model": None, "copy": None, "encoder": None}
