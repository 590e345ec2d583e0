"""Noise schedules against the reference numbers."""

import json
import math

import torch

from kairos_train.objective import schedule


def test_every_reference_schedule_is_met(shared):
    cases = json.loads((shared / "golden" / "flow_match.json").read_text())["cases"]
    assert cases
    seen = set()
    for case in cases:
        if case["stream"] == "video":
            shift = schedule.video_shift(case["latent_frames"], case["tokens_per_frame"])
            assert abs(shift - case["shift"]) < 1e-9
        else:
            shift = case["shift"]
        if "distilled_times" in case:
            times = torch.tensor(schedule.DISTILLED_TIMES, dtype=torch.float64)
            assert times.tolist() == case["distilled_times"]
            seen.add((case["stream"], "distilled_times"))
            sigmas = schedule.distilled_sigmas(shift)
        else:
            sigmas = schedule.shifted_sigmas(case["steps"], shift)
        weights = schedule.bell_weights(sigmas)
        for key, ours in (
            ("sigmas", sigmas),
            ("sigmas_every_111", sigmas[::111]),
            ("weights_every_111", weights[::111]),
        ):
            if key in case:
                seen.add((case["stream"], key))
                torch.testing.assert_close(ours, torch.tensor(case[key], dtype=torch.float64), atol=1e-6, rtol=0)
    assert {
        ("video", "sigmas"),
        ("video", "weights_every_111"),
        ("action", "sigmas"),
        ("video", "distilled_times"),
    } <= seen


def test_the_video_shift_goes_on_beyond_its_two_points():
    for tokens, mu in ((256, 0.5), (8192, 0.9), (256 - 3968, 0.3), (8192 + 3968, 1.1)):
        assert abs(schedule.video_shift(4, tokens) - 2 * math.exp(mu)) < 1e-12


def test_distilled_schedule_uses_the_constant_shift():
    expected = torch.tensor([1, 0.9524, 0.8333, 0.3571], dtype=torch.float64)
    torch.testing.assert_close(schedule.distilled_sigmas(), expected, atol=5e-5, rtol=0)


def test_bell_weights_have_mean_one_and_touch_zero():
    weights = schedule.bell_weights(schedule.shifted_sigmas(schedule.TRAINING_STEPS, 5.0))
    assert abs(weights.mean() - 1) < 1e-12
    assert weights.min() == 0
