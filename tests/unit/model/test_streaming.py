"""History carried over between chunks equals the whole history computed again. Float64 unless said."""

import dataclasses

import pytest
import torch
from support.model_factory import make_config, make_inputs, make_model

from kairos_train.basics.errors import UserError
from kairos_train.model import WorldActionModel
from kairos_train.model.gated_delta_net import RecurrentState
from kairos_train.model.streaming import StreamingModel, StreamingState, extend_history, history_cache

CYCLES = {
    "SWA": ["SWA"] * 5,
    "DSWA": ["DSWA"] * 5,
    "FA": ["FA"] * 5,
    "GATED": ["GATED"] * 5,
    "all kinds": ["SWA", "GATED", "DSWA", "FA", "GATED"],
}
FRAMES = 13
"""More than two dilated windows reach: (3 − 1)·2 frames back at each of up to five layers."""


def make_causal(cycle: str = "all kinds", dtype: torch.dtype = torch.float64) -> WorldActionModel:
    config = make_config(history_causal=True, layer_cycle=CYCLES[cycle])
    return make_model(config).to(dtype).eval().requires_grad_(False)


def inputs(dtype: torch.dtype = torch.float64, frames: int = FRAMES) -> dict:
    """One batch of equal histories: latents (2, 16, F, 4, 4), context, mask, state, actions."""
    return make_inputs(frames=frames, history=(1, 1), dtype=dtype)


def text(given: dict) -> dict:
    return {key: given[key] for key in ("context", "context_mask", "state")}


def carried(model, given: dict, *ends: int, visible: int = FRAMES) -> StreamingState:
    """The history up to the last of `ends`, in pieces."""
    past, begin = None, 0
    for end in ends:
        past = extend_history(model, past, given["latents"][:, :, begin:end], **text(given), visible=visible)
        begin = end
    return past


def again(model, given: dict, known: int, end: int):
    """The plain pass over all frames up to `end`, of which `known` are history."""
    arguments = {**given, "latents": given["latents"][:, :, :end], "history_frames": [known] * 2}
    arguments.pop("action_mask")
    return model(**arguments)


@pytest.mark.parametrize("cycle", CYCLES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_chunk_after_chunk_equals_computing_the_whole_history_anew(cycle, dtype, tolerance):
    model, given = make_causal(cycle, dtype), inputs(dtype)
    ends = (1, 3, 4, 8, 10)
    for count in range(1, len(ends) + 1):
        known = ends[count - 1]
        expected = again(model, given, known, known + 3).video[:, :, known:]
        chunk = StreamingModel(model, carried(model, given, *ends[:count], visible=2), **text(given))
        got = chunk.video(given["latents"][:, :, known : known + 3], given["video_timestep"])
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("cycle", CYCLES)
def test_actions_on_a_carried_history_equal_mode_joint(cycle):
    model, given = make_causal(cycle), inputs()
    cache = history_cache(model, carried(model, given, 2, 3, 7))
    got = model.forward_action(cache, given["action"], given["action_timestep"], **text(given))
    torch.testing.assert_close(got, again(model, given, 7, 9).action, atol=1e-11, rtol=1e-11)


def test_actions_see_the_last_visible_frames_in_the_places_of_training():
    """Windows of one frame: keys then do not depend on earlier frames, and a window that begins later is the same."""
    config = make_config(history_causal=True, layer_cycle=["SWA", "DSWA", "SWA", "DSWA", "SWA"], window_frames=1)
    model, given = make_model(config).eval().requires_grad_(False), inputs()
    cache = history_cache(model, carried(model, given, 3, 6, 9, visible=2))
    assert all(layer.k.shape[1] == 2 * 4 for layer in cache.layers)
    got = model.forward_action(cache, given["action"], given["action_timestep"], **text(given))
    window = {**given, "latents": given["latents"][:, :, 7:12]}
    torch.testing.assert_close(got, again(model, window, 2, 5).action, atol=1e-11, rtol=1e-11)


def test_actions_are_given_the_last_visible_frames_of_those_that_windows_keep():
    model, given = make_causal(), inputs()
    history = carried(model, given, 3, 6, visible=1)
    for layer, cached in zip(history.layers, history_cache(model, history).layers):
        if isinstance(layer, RecurrentState):
            assert cached is None
        else:
            assert layer.v.shape[1] > 1
            assert torch.equal(cached.v, layer.v[:, -1:].flatten(1, 2))


def test_a_history_frame_does_not_see_later_ones():
    model, given = make_causal(), inputs()
    before = carried(model, given, 6)
    given["latents"][:, :, 4:] += 1
    after = carried(model, given, 6)
    for old, new in zip(before.layers, after.layers):
        if isinstance(old, RecurrentState):
            assert not torch.allclose(old.state, new.state)
            continue
        for x, y in ((old.k, new.k), (old.v, new.v)):
            assert torch.equal(x[:, :-2], y[:, :-2])
            assert not torch.allclose(x[:, -2:], y[:, -2:])


@pytest.mark.parametrize("ends", [range(1, FRAMES + 1), (1, FRAMES), (FRAMES,)], ids=len)
def test_only_what_windows_and_actions_reach_is_kept(ends):
    model, given = make_causal(), inputs()
    kept = carried(model, given, *ends, visible=3).layers
    assert [layer.k.shape[1] for layer in kept if not isinstance(layer, RecurrentState)] == [3, 4, FRAMES]
    alone = make_model(dataclasses.replace(model.config, action=None)).eval().requires_grad_(False)
    kept = carried(alone, {**given, "state": None}, *ends, visible=3).layers
    assert [layer.k.shape[1] for layer in kept if not isinstance(layer, RecurrentState)] == [2, 4, FRAMES]
    assert kept[1].tokens.shape == (2, 3, 24)
    tensors = (kept[0].k, kept[0].v, kept[2].k, kept[2].v, kept[1].tokens)
    assert all(x.untyped_storage().nbytes() <= 2 * x.nbytes for x in tensors)


def test_fewer_tokens_than_the_convolutions_reach_back_to():
    model, given = make_causal("GATED"), inputs()
    given["latents"] = given["latents"][..., :2, :2]  # one token per frame, convolutions of four
    chunk = StreamingModel(model, carried(model, given, 1, 2, 3), **text(given))
    got = chunk.video(given["latents"][:, :, 3:5], given["video_timestep"])
    torch.testing.assert_close(got, again(model, given, 3, 5).video[:, :, 3:], atol=1e-11, rtol=1e-11)


def test_a_model_whose_history_sees_later_frames_is_refused():
    model, given = make_model(make_config()), inputs()
    with pytest.raises(UserError, match=r"history_causal=false.* train with model\.video\.history_causal=true"):
        carried(model, given, 1)


def test_cached_action_mode_is_exact_under_causal_history_too():
    model, given = make_causal(), inputs()
    cache = model.encode_history(given["latents"][:, :, :4], **text(given))
    got = model.forward_action(cache, given["action"], given["action_timestep"], **text(given))
    torch.testing.assert_close(got, again(model, given, 4, 6).action, atol=1e-11, rtol=1e-11)
