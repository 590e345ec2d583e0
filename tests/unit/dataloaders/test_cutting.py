"""Windows cut from episodes: which frames and actions, what padding holds, how cameras become one picture."""

import numpy as np
import pytest

from dataloaders.config import WindowConfig
from dataloaders.windows import (
    check_dimensions,
    check_window,
    choose_cameras,
    compose,
    cover,
    cut_actions,
    frame_indices,
    picture_size,
    windows_of,
)
from kairos_train.basics.errors import UserError


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"frames": 8}, "frames=8: must be 4k.*5 or 9"),
        ({"frames": 1}, "frames=1: .* 5$"),
        ({"height": 100}, "height=100: .*96 or 128"),
        ({"width": 16}, "width=16: .* 32$"),
        ({"stride": 0}, "stride=0"),
        ({"action_video_freq_ratio": 0}, "action_video_freq_ratio=0"),
        ({"layout": "stacked"}, "layout=stacked: must be one of side_by_side, head_over_wrists"),
        ({"layout": "head_over_wrists", "height": 256}, "height=256: must be a multiple of 96.*192 or 288"),
        ({"action_values": "delta"}, "action_values=delta: must be one of recorded, minus_state"),
    ],
)
def test_window_rules_name_the_nearest_legal_values(values, match):
    with pytest.raises(UserError, match=match):
        check_window(WindowConfig(**values))


@pytest.mark.parametrize("length", [1, 2, 3, 10, 41])
@pytest.mark.parametrize("stride", [1, 3])
def test_windows_show_every_action_and_count_their_padding(length, stride):
    window = WindowConfig(frames=5, action_video_freq_ratio=2, stride=stride)
    actions = np.arange(1, length + 1, dtype=np.float32)[:, None]
    seen = set()
    for w in windows_of(length, window):
        assert w.start % stride == 0
        cut = cut_actions(actions, w.start, window)
        assert cut.shape == (8, 1)
        assert (cut != 0).sum() == w.valid_actions
        seen |= set(cut[: w.valid_actions, 0])
        shown = frame_indices(w.start, length, window)
        assert shown[: w.valid_frames].tolist() == [w.start + 2 * i for i in range(w.valid_frames)]
        assert (shown[w.valid_frames :] == length - 1).all()
        assert w.valid_frames > 1 or length <= 2  # a still window only where the episode has nothing else
    assert seen == set(actions[:, 0])


@pytest.mark.parametrize(("size", "target"), [((100, 200), (64, 64)), ((200, 100), (64, 128)), ((48, 64), (96, 96))])
def test_pictures_cover_the_target_without_stretching(size, target):
    height, width = size
    y, x = np.mgrid[:height, :width]
    y, x = y - (height - 1) / 2, x - (width - 1) / 2
    radius = 0.4 * min(height / target[0], width / target[1]) * min(target)
    disc = np.where(x**2 + y**2 < radius**2, 255, 0).astype(np.uint8)
    out = cover(np.repeat(disc[None, ..., None], 3, axis=-1), *target)
    assert out.shape == (1, *target, 3)
    inside = out[0, ..., 0] > 127
    # a disc in the centre stays a disc in the centre, at the scale that covers the target
    assert abs(inside.any(0).sum() - inside.any(1).sum()) <= 1
    assert abs(inside.any(0).sum() - 0.8 * min(target)) <= 2
    rows, columns = np.nonzero(inside)
    np.testing.assert_allclose([rows.mean(), columns.mean()], [(t - 1) / 2 for t in target], atol=0.6)


def test_differences_to_the_state_give_the_command_back_and_spare_absolute_dimensions():
    rng = np.random.default_rng(0)
    states, actions = rng.normal(size=(20, 4)).astype(np.float32), rng.normal(size=(20, 3)).astype(np.float32)
    window = WindowConfig(frames=5, action_video_freq_ratio=2, action_values="minus_state", absolute_dims=[2])
    cut = cut_actions(actions, 15, window, states=states)
    assert np.array_equal(cut[:5, :2], actions[15:, :2] - states[15, :2])
    np.testing.assert_allclose(cut[:5, :2] + states[15, :2], actions[15:, :2], atol=1e-6)
    assert np.array_equal(cut[:5, 2], actions[15:, 2])
    assert (cut[5:, :2] == 0).all(), "a padded delta is no movement"
    assert (cut[5:, 2] == actions[-1, 2]).all(), "a padded gripper stays as it is"


def test_recorded_actions_are_not_touched():
    actions = np.array([[-0.0, 1e-40, 3.3]] * 9, np.float32)
    cut = cut_actions(actions, 0, WindowConfig(frames=5, action_video_freq_ratio=2))
    assert cut.tobytes() == actions[:8].tobytes()


@pytest.mark.parametrize(
    ("values", "dims", "match"),
    [
        ({"absolute_dims": [3]}, (3, 3), "absolute_dims names 3, but actions have 3 dimensions"),
        ({"action_values": "minus_state"}, (4, 3), "action dimension 3 has no state to subtract"),
        ({"action_values": "minus_state", "absolute_dims": [3]}, (4, 3), None),
        ({"action_values": "recorded"}, (9, 1), None),
    ],
)
def test_action_options_must_fit_the_dimensions(values, dims, match):
    window = WindowConfig(**values)
    if match is None:
        check_dimensions(window, *dims)
        return
    with pytest.raises(UserError, match=match):
        check_dimensions(window, *dims)


def shaded(level: int, height: int, width: int) -> np.ndarray:
    return np.full((2, height, width, 3), level, np.uint8)


def test_head_stands_over_two_wrists_in_the_published_size():
    window = WindowConfig(height=384, width=320, layout="head_over_wrists", cameras=["h", "l", "r"])
    picture = compose([shaded(10, 240, 320), shaded(20, 480, 640), shaded(30, 128, 160)], window)
    assert picture.shape == (2, *picture_size(window, 3), 3) == (2, 384, 320, 3)
    assert (picture[:, :256] == 10).all()
    assert (picture[:, 256:, :160] == 20).all()
    assert (picture[:, 256:, 160:] == 30).all()


def test_cameras_stand_side_by_side_from_left_to_right():
    window = WindowConfig(height=32, width=64)
    picture = compose([shaded(10, 32, 64), shaded(20, 16, 64)], window)
    assert picture.shape == (2, *picture_size(window, 2), 3) == (2, 32, 128, 3)
    assert (picture[..., :64, :] == 10).all()
    assert (picture[..., 64:, :] == 20).all()


@pytest.mark.parametrize("cameras", [[], ["a"], ["a", "b"]])
def test_head_over_wrists_wants_three_named_cameras(cameras):
    with pytest.raises(UserError, match=r"needs three, named in the order head.*has a, b, c"):
        choose_cameras(WindowConfig(layout="head_over_wrists", cameras=cameras), ["a", "b", "c"])


def test_cameras_come_in_the_order_they_are_named_in_and_else_by_name():
    assert choose_cameras(WindowConfig(cameras=[]), ["wrist", "head"]) == ["head", "wrist"]
    assert choose_cameras(WindowConfig(cameras=["wrist", "head"]), ["head", "wrist"]) == ["wrist", "head"]
    with pytest.raises(UserError, match=r"cameras: 'side' has no files; this dataset has head, wrist"):
        choose_cameras(WindowConfig(cameras=["side"]), ["head", "wrist"])
    with pytest.raises(UserError, match="has no camera with files"):
        choose_cameras(WindowConfig(cameras=[]), [])
