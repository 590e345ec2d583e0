"""Rollout files of a tiny random policy on real shards."""

import json

import numpy as np
import pytest
from PIL import Image
from support.tiny_export import tiny_config, write_tiny_checkpoint

from dataloaders.files.video import decode_mp4
from dataloaders.loading.loader import fixed_batches
from evaluation.rollout import MAX_PSNR, psnr, rollout
from kairos_train.basics.errors import UserError
from kairos_train.weights.export import export


def run(exported, shards, out, **changes):
    return rollout(exported, **{"source": shards, "out": out, "count": 3, "steps": 2, "seed": 1, **changes})


def test_joint_rollout_writes_clip_sheet_and_curves_of_every_window(exported, shards, tmp_path):
    summary = run(exported, shards, tmp_path / "out", mode="joint")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    kinds = (".mp4", "_frames.png", "_actions.png")
    assert names == {"summary.json", *(f"{i:03d}{kind}" for i in range(3) for kind in kinds)}
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    truth = {k: f for b in fixed_batches(shards, batch_size=8, count=99) for k, f in zip(b.keys, b.frames)}
    for entry in summary["samples"]:
        clip = decode_mp4(tmp_path / "out" / entry["files"][0])
        assert clip.shape == (5, 32, 32 + 4 + 32, 3)
        recorded = truth[entry["key"]].numpy().astype(int)
        assert np.abs(clip[:, :, 36:] - recorded).mean() < 12  # right half: the recording, through H.264 twice
        assert np.abs(clip[0, :, :32] - recorded[0]).mean() < 16  # the given frame came back, through the codec
        for name in entry["files"][1:]:
            assert Image.open(tmp_path / "out" / name).size[0] > 100
    assert summary["count"] == 3
    assert summary["steps"] == 2
    assert set(summary["mean"]) == {"psnr_model", "psnr_copy", "psnr_encoder", "action_mse"}


def test_psnr_is_of_the_frames_that_were_not_given_and_beside_copying(exported, shards, tmp_path):
    summary = run(exported, shards, tmp_path / "out", mode="video", guidance=1.0)
    batches = list(fixed_batches(shards, batch_size=8, count=99))
    truth = {k: (f.numpy(), m) for b in batches for k, f, m in zip(b.keys, b.frames, b.meta)}
    assert summary["guidance"] == 1.0
    for entry in summary["samples"]:
        assert "action_mse" not in entry
        frames, meta = truth[entry["key"]]
        judged = frames[1 : meta["valid_frames"]].astype(float)
        expected = 10 * np.log10(255**2 / np.square(judged - frames[0]).mean())
        assert abs(entry["psnr"]["copy"] - expected) < 1e-9
        # A model without training is worse than the encoder's own loss.
        assert entry["psnr"]["model"] < entry["psnr"]["encoder"]


def test_action_rollout_writes_curves_only(exported, shards, tmp_path):
    summary = run(exported, shards, tmp_path / "out", mode="action")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".png", ".json"}
    assert set(summary["mean"]) == {"action_mse"}


@pytest.mark.parametrize("carried", [False, True])
def test_a_rollout_of_several_chunks_writes_them_behind_each_other(shards, tmp_path, carried):
    config = tiny_config()
    config.model.video.history_causal = carried
    export(write_tiny_checkpoint(tmp_path / "run", shards, config=config), tmp_path / "export", dtype="fp32")
    summary = run(tmp_path / "export", shards, tmp_path / "out", mode="joint", chunks=4, carried=carried, count=1)
    one = run(tmp_path / "export", shards, tmp_path / "one", mode="joint", count=1)
    assert (summary["chunks"], summary["history"], summary["carried"]) == (4, None, carried)
    assert summary["mean"] == pytest.approx(one["mean"], rel=1e-4), "judged on the first chunk"
    clip = decode_mp4(tmp_path / "out" / "000.mp4")
    assert clip.shape == (5 + 3 * 4, 32, 32 + 4 + 32, 3)
    assert clip[5:, :, 40:].max() < 40, "black where nothing was recorded"
    first = decode_mp4(tmp_path / "one" / "000.mp4")[:, :, :32].astype(int)
    assert np.abs(clip[:5, :, :32] - first).mean() < 12


def test_rollouts_that_cannot_go_on_are_refused_before_anything_is_written(exported, shards, tmp_path):
    for settings, match in (
        ({"mode": "action", "chunks": 2}, "no video to go on from"),
        ({"mode": "joint", "chunks": 2, "history": 2}, "history=2: a chunk of 2 latent frames goes on from 1"),
        ({"mode": "joint", "chunks": 2, "carried": True}, "history_causal=false"),
        ({"mode": "joint", "carried": True}, "chunks=1: history and carried"),
    ):
        with pytest.raises(UserError, match=match):
            run(exported, shards, tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()


def test_same_seed_same_prediction_other_seed_another(exported, shards, tmp_path):
    first, again, other = (
        run(exported, shards, tmp_path / name, mode="action", seed=seed)["mean"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again
    assert first != other


def test_a_video_model_without_given_frames_has_no_psnr(shards, tmp_path):
    config = tiny_config(streams="video", actions=False, conditions={"t2v": 1.0})
    export(write_tiny_checkpoint(tmp_path / "run", None, config=config), tmp_path / "export")
    summary = run(tmp_path / "export", shards, tmp_path / "out", mode="video", count=1)
    assert summary["samples"][0]["psnr"] is None
    assert summary["mean"] == {}
    with pytest.raises(UserError, match="without actions"):
        run(tmp_path / "export", shards, tmp_path / "other", mode="joint")


def test_results_are_not_mixed_with_what_is_there(exported, shards, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="is not empty"):
        run(exported, shards, tmp_path / "out")
    with pytest.raises(UserError, match="mode='dance'"):
        run(exported, shards, tmp_path / "new", mode="dance")


def test_psnr_of_known_pictures():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(black, black) == MAX_PSNR
    assert abs(psnr(black, black + 255)) < 1e-9
    assert abs(psnr(black, black + 51) - 20 * np.log10(5)) < 1e-9
