"""How well a model foresees, beside copying the last frame and its own codec: where the numbers come from."""

import numpy as np
import pytest

from evaluation.held_out import open_policy, spread_batches
from evaluation.world import foresight, format_table
from kairos_train.basics.errors import UserError


@pytest.fixture(scope="module")
def found(exported, shards):
    return foresight(exported, shards=shards, horizons=(1, 3), windows=6, steps=2)


def test_copy_and_codec_are_counted_over_all_windows_on_all_and_on_moving_pixels(found, exported, shards):
    _, index = open_policy(exported, shards)
    batch = next(spread_batches(index, count=6, batch_size=6, with_frames=True))
    for h in (1, 3):
        all_errors, moving_errors, windows = [], [], 0
        for frames, meta in zip(batch.frames.numpy().astype(float), batch.meta):
            if h >= meta["valid_frames"]:
                continue
            windows += 1
            error = ((frames[h] - frames[0]) ** 2).mean(-1)
            moving = (abs(frames[h] - frames[0]) > 10).any(-1)
            all_errors.append(error.ravel())
            moving_errors.append(error[moving])
        entry = found["horizons"][str(h)]
        assert entry["windows"] == windows > 0
        for name, errors in (("db", all_errors), ("moving_db", moving_errors)):
            expected = 10 * np.log10(255**2 / np.concatenate(errors).mean())
            assert entry["copy"][name] == pytest.approx(expected)
        share = sum(map(len, moving_errors)) / sum(map(len, all_errors))
        assert entry["moving_share"] == pytest.approx(share)


def test_gain_and_gap_compare_squared_errors_on_moving_pixels(found):
    for entry in found["horizons"].values():
        model, copy, codec = (10 ** (-entry[row]["moving_db"] / 10) for row in ("model", "copy", "codec"))
        assert entry["gap_closed"] == pytest.approx((copy - model) / (copy - codec))
        assert entry["moving_gain_db"] == pytest.approx(entry["model"]["moving_db"] - entry["copy"]["moving_db"])
        assert entry["codec"]["db"] > entry["model"]["db"]  # weights are random


def test_the_noise_of_a_window_does_not_depend_on_the_batching(found, exported, shards):
    again = foresight(exported, shards=shards, horizons=(1, 3), windows=6, steps=2, batch_size=4)
    for h, entry in found["horizons"].items():
        assert again["horizons"][h]["model"]["db"] == pytest.approx(entry["model"]["db"], abs=1e-3)


def test_the_table_has_every_row_and_horizon(found):
    head, _, *rows = format_table(found).splitlines()
    assert head.split() == ["1", "frames", "3", "frames"]
    assert [row.split()[0] for row in rows] == ["model", "copy", "codec"]
    assert float(rows[1].split()[1]) == pytest.approx(found["horizons"]["1"]["copy"]["db"], abs=0.06)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"horizons": (0,)}, "horizons=\\[0\\]: must lie from 1 to"),
        ({"horizons": (3, 99)}, "horizons=\\[99\\]: must lie from 1 to"),
        ({"mode": "action"}, "mode='action': must be joint or video"),
    ],
)
def test_what_cannot_be_compared_is_refused(exported, shards, words, said):
    with pytest.raises(UserError, match=said):
        foresight(exported, shards=shards, **words)


def test_the_benchmark_takes_the_worst_of_the_far_horizons_and_the_nearest_one():
    from benchmarks.world import summary

    def entry(gain, closed, model, codec, all_pixels):
        return {
            "moving_gain_db": gain,
            "gap_closed": closed,
            "model": {"moving_db": model},
            "codec": {"moving_db": codec, "db": all_pixels},
        }

    found = summary(
        {"4": entry(0.1, 0.2, 20.0, 23.5, 33.0), "8": entry(4, 0.5, 19, 22, 32), "16": entry(3, 0.7, 18, 22, 34)}
    )
    assert found == {"moving_gain_db": 3, "gap_closed": 0.5, "gap_to_codec_db": 3.5, "codec_db": 32}
    still = {h: entry(None, None, None, None, 40.0) for h in ("4", "8")}
    assert summary(still) == {"moving_gain_db": None, "gap_closed": None, "gap_to_codec_db": None, "codec_db": 40.0}
