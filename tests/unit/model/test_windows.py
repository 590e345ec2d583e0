"""Gathered windows against the dense mask, for every rule, and the rules against their sentences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kairos_train.model.kernels.attention import Windows, window_attention
from kairos_train.model.kernels.windows import WindowSpec, frames_read, key_frames, window_plan

RULES = st.builds(
    WindowSpec,
    kind=st.sampled_from(["SWA", "DSWA", "FA"]),
    window=st.integers(1, 3),
    dilation=st.integers(2, 4),
    token_window=st.booleans(),
    restrict_history=st.booleans(),
    all_attend_history=st.booleans(),
    history_causal=st.booleans(),
)
FULL_SIZE = {"window": 3, "dilation": 4, "token_window": False, "restrict_history": True, "all_attend_history": False}


def random_qkv(frames, tokens, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(frames * 10 + tokens)
    shape = (3, batch, frames, tokens, 2, 4)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


@settings(max_examples=120, deadline=None)
@given(rule=RULES, frames=st.integers(1, 13), tokens=st.integers(1, 4), history=st.tuples(*[st.integers(0, 5)] * 2))
def test_gathered_windows_equal_the_dense_mask(rule, frames, tokens, history):
    history = tuple(min(k, frames) for k in history)
    results = []
    for backend in ("gathered", "dense"):
        qkv = random_qkv(frames, tokens)
        out = window_attention(*qkv, windows=Windows.whole(rule, history, frames), backend=backend)
        (grad,) = torch.autograd.grad(out.pow(2).sum(), qkv)
        results.append((out, grad))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-11, rtol=1e-11)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), rule=RULES, frames=st.integers(1, 13), history=st.tuples(*[st.integers(0, 5)] * 2))
def test_a_share_of_the_frames_gives_its_part_of_the_whole(data, rule, frames, history):
    """Some query frames with only the key frames that they read, by any backend that counts frames."""
    history = tuple(min(k, frames) for k in history)
    queries = tuple(sorted(data.draw(st.sets(st.integers(0, frames - 1)))))
    reads = frames_read(rule, frames, history)
    keys = tuple(sorted({g for f in queries for g in reads[f]}))
    q, k, v = random_qkv(frames, 3)
    whole = window_attention(q, k, v, windows=Windows.whole(rule, history, frames), backend="dense")
    expected = whole.unflatten(1, (frames, 3))[:, list(queries)].flatten(1, 2)
    for backend in ("gathered", "dense"):
        windows = Windows(rule, history, frames, queries, keys)
        out = window_attention(
            q[:, list(queries)], k[:, list(keys)], v[:, list(keys)], windows=windows, backend=backend
        )
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["SWA", "DSWA", "FA"])
def test_flex_attention_equals_the_dense_mask_forward(kind):
    rule = WindowSpec(kind=kind, **FULL_SIZE)
    qkv = random_qkv(9, 4, dtype=torch.float32).detach()
    with torch.no_grad():
        windows = Windows.whole(rule, (2, 0), 9)
        out = [window_attention(*qkv, windows=windows, backend=b) for b in ("flex", "dense")]
    torch.testing.assert_close(*out, atol=1e-5, rtol=1e-5)


def test_frame_windows_reach_what_the_specification_says():
    swa, dswa = (WindowSpec(kind=kind, **FULL_SIZE) for kind in ("SWA", "DSWA"))
    assert key_frames(swa, 10, 21, 0) == (8, 9, 10, 11, 12)
    assert key_frames(dswa, 10, 21, 0) == (2, 6, 10, 14, 18)
    assert key_frames(swa, 1, 21, 2) == (0, 1), "a history query sees history only"
    assert key_frames(swa, 2, 21, 2) == (0, 1, 2, 3, 4), "others see their whole window"
    assert key_frames(swa, 0, 21, 9) == (0, 1, 2), "history is restricted within the window"


def test_causal_history_frames_see_themselves_and_earlier_ones_the_others_as_before():
    swa, dswa, fa = (WindowSpec(kind=kind, **FULL_SIZE, history_causal=True) for kind in ("SWA", "DSWA", "FA"))
    assert key_frames(swa, 4, 21, 6) == (2, 3, 4)
    assert key_frames(dswa, 9, 21, 15) == (1, 5, 9)
    assert key_frames(fa, 2, 21, 6) == (0, 1, 2)
    assert key_frames(swa, 6, 21, 6) == (4, 5, 6, 7, 8), "a noisy frame sees history within its window"
    assert key_frames(fa, 6, 8, 6) == tuple(range(8))


def test_all_attend_history_is_applied_last():
    rule = WindowSpec(**{"kind": "SWA", **FULL_SIZE, "all_attend_history": True, "window": 2})
    assert key_frames(rule, 9, 12, 2) == (0, 1, 8, 9, 10)
    assert key_frames(rule, 0, 12, 5) == (0, 1, 2, 3, 4)


def test_token_window_pads_a_full_group_when_it_divides_evenly():
    rule = WindowSpec(**{"kind": "DSWA", **FULL_SIZE, "token_window": True, "dilation": 2})
    assert rule.padded_frames(6) == 8
    assert rule.padded_frames(7) == 8
    assert rule.padded_frames(3) == 3, "no more than one whole group: the plain window"
    assert key_frames(rule, 5, 6, 0) == (1, 3, 5, 7)


def test_a_long_video_is_few_groups_and_no_group_reads_more_than_its_window():
    rule = WindowSpec(kind="SWA", **FULL_SIZE)
    plan = window_plan(rule, 61, (1,), tuple(range(61)), tuple(range(61)), torch.device("cpu"))
    assert len(plan) <= 6
    assert max(group.key.shape[1] for group in plan) == 5
    queries = torch.cat([group.query.flatten() for group in plan])
    assert sorted(queries.tolist()) == list(range(61))
