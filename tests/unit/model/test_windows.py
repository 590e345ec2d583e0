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


def sees(rule, frames, tokens, known, i, j) -> bool:
    """Whether query token i attends to key token j, in the specification's words; j may lie in zero padding."""
    fq, fk = i // tokens, j // tokens
    if rule.token_window:
        if rule.kind == "FA":
            return True
        groups = rule.dilation if rule.kind == "DSWA" and frames // rule.dilation > 1 else 1
        place = [(f % groups, f // groups * tokens + t % tokens) for f, t in ((fq, i), (fk, j))]
        return place[0][0] == place[1][0] and abs(place[0][1] - place[1][1]) <= rule.window * tokens
    step = rule.dilation if rule.kind == "DSWA" else 1
    seen = rule.kind == "FA" or ((fk - fq) % step == 0 and abs(fk - fq) / step < rule.window)
    if rule.restrict_history and fq < known:
        seen = seen and fk < known
    if rule.all_attend_history:
        seen = seen or fk < known
    if rule.history_causal and fq < known:
        seen = seen and fk <= fq
    return seen


FRAME_RULES = [
    WindowSpec(kind=kind, window=window, dilation=3, token_window=False, **flags)
    for kind in ("SWA", "DSWA", "FA")
    for window, flags in (
        (2, {"restrict_history": False, "all_attend_history": False}),
        (2, {"restrict_history": True, "all_attend_history": False}),
        (1, {"restrict_history": True, "all_attend_history": True}),
        (3, {"restrict_history": True, "all_attend_history": False, "history_causal": True}),
    )
]
TOKEN_RULES = [
    WindowSpec(kind, window, 2, token_window=True, restrict_history=False, all_attend_history=False)
    for kind in ("SWA", "DSWA", "FA")
    for window in (1, 2)
]


@pytest.mark.parametrize("backend", ["gathered", "dense"])
@pytest.mark.parametrize("frames", [3, 8, 9])
@pytest.mark.parametrize("rule", [*FRAME_RULES, *TOKEN_RULES], ids=lambda rule: f"{rule.kind}-{rule.window}")
def test_windows_are_those_of_the_specification_pair_by_pair(rule, frames, backend):
    tokens, history = 2, (3, 0)
    q, k, v = random_qkv(frames, tokens).detach()
    out = window_attention(q, k, v, windows=Windows.whole(rule, history, frames), backend=backend)
    step = rule.dilation if rule.kind == "DSWA" and frames // rule.dilation > 1 else 1
    padded = frames + step - frames % step if rule.token_window and step > 1 else frames
    zeros = torch.zeros(2, (padded - frames) * tokens, 2, 4, dtype=q.dtype)
    k, v = (torch.cat([x.flatten(1, 2), zeros], dim=1) for x in (k, v))
    mask = torch.tensor(
        [
            [[sees(rule, frames, tokens, known, i, j) for j in range(padded * tokens)] for i in range(frames * tokens)]
            for known in history
        ]
    )
    scores = torch.einsum("bihe,bjhe->bhij", q.flatten(1, 2), k) / 2  # heads of 4
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("bhij,bjhe->bihe", weights, v))


def test_keys_at_hand_that_no_query_here_reads_are_not_seen():
    """History keys are on every rank, for the actions: one query frame reads all but frame 0 of those at hand."""
    rule, (q, k, v) = WindowSpec(kind="SWA", **FULL_SIZE), random_qkv(9, 2).detach()
    whole = window_attention(q, k, v, windows=Windows.whole(rule, (1, 1), 9), backend="dense")
    at_hand = (0, 3, 4, 5, 6, 7)
    windows = Windows(rule, (1, 1), 9, (5,), at_hand)
    for backend in ("gathered", "dense"):
        part = window_attention(q[:, [5]], k[:, at_hand], v[:, at_hand], windows=windows, backend=backend)
        torch.testing.assert_close(part, whole[:, 10:12])


def test_keys_and_values_of_a_rank_without_queries_get_gradients_of_zero():
    """Not none: the exchange that brought them has a collective in its backward pass."""
    rule, (q, k, v) = WindowSpec(kind="SWA", **FULL_SIZE), random_qkv(3, 2).detach()
    k.requires_grad_()
    v.requires_grad_()
    windows = Windows(rule, (1, 1), 9, (), (0, 1, 2))
    out = window_attention(q[:, :0], k, v, windows=windows, backend="gathered")
    assert out.shape == (2, 0, 2, 4)
    out.sum().backward()
    assert torch.equal(k.grad, torch.zeros_like(k))
    assert torch.equal(v.grad, torch.zeros_like(v))


def test_a_window_reaches_back_as_far_as_its_first_key():
    for rule in FRAME_RULES:
        first = min(key_frames(rule, 30, 40, 0))
        assert rule.reach() == (None if rule.kind == "FA" else 30 - first)


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
    undilated = WindowSpec(**{"kind": "SWA", **FULL_SIZE, "token_window": True})
    assert key_frames(undilated, 5, 12, 0) == tuple(range(5 - undilated.window, 5 + undilated.window + 1))


def test_a_long_video_is_few_groups_and_no_group_reads_more_than_its_window():
    rule = WindowSpec(kind="SWA", **FULL_SIZE)
    plan = window_plan(rule, 61, (1,), tuple(range(61)), tuple(range(61)), torch.device("cpu"))
    assert len(plan) <= 6
    assert max(group.key.shape[1] for group in plan) == 5
    queries = torch.cat([group.query.flatten() for group in plan])
    assert sorted(queries.tolist()) == list(range(61))
