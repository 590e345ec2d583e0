"""Who computes which frames and what moves for it: every frame arrives, bytes as the specification's table has them."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kairos_train.model.kernels.windows import WindowSpec, frames_read, key_frames
from parallel.exchange import frame_plan
from parallel.exchange.frame_plan import plan_frames, residue_frames
from parallel.topology import split_frames

RULES = st.builds(
    WindowSpec,
    kind=st.sampled_from(["SWA", "DSWA", "FA"]),
    window=st.integers(1, 3),
    dilation=st.integers(2, 5),
    token_window=st.booleans(),
    restrict_history=st.booleans(),
    all_attend_history=st.booleans(),
)
FULL_SIZE = {"window": 3, "dilation": 4, "token_window": False, "restrict_history": True, "all_attend_history": False}
SWA, DSWA, FA = (WindowSpec(kind=kind, **FULL_SIZE) for kind in ("SWA", "DSWA", "FA"))

HIDDEN = 1560 * 2560
"""Elements of one frame at 480p, full width; keys and values are twice as many."""

TABLE = {
    (21, 4): {"swa": 63.9, "dswa": 223.6, "residue": 62.9, "all": 251.6},
    (61, 8): {"swa": 63.9, "dswa": 255.6, "residue": 106.6, "all": 852.6},
    (241, 8): {"swa": 63.9, "dswa": 255.6, "residue": 421.1, "all": 3369},
    (241, 16): {"swa": 63.9, "dswa": 255.6, "residue": 225.6, "all": 3609},
}
"""(frames, ranks) → MB that a rank receives in one layer's forward pass, bf16 (specification, "frame exchange")."""


def plan(rule, frames, ranks, *, history=(0,), on_all_ranks=(), choice="auto", hidden=HIDDEN):
    return plan_frames(
        frames,
        frames_read(rule, frames, history),
        on_all_ranks,
        ranks=ranks,
        period=rule.step(frames),
        hidden=hidden,
        kv=2 * hidden,
        choice=choice,
    )


def megabytes(elements):
    return 2 * elements / 1e6


def carry(route):
    """What each rank has after the route, each frame named by its number, by what is sent and where it is put."""
    ranks = range(len(route.source))
    for rank in ranks:
        arrived = [None] * len(route.target[rank])
        here, there = route.kept[rank]
        for i, j in zip(here, there, strict=True):
            arrived[j] = route.source[rank][i]
        for peer in ranks:
            for i, j in zip(route.send[peer][rank], route.receive[rank][peer], strict=True):
                assert arrived[j] is None, "a frame came twice"
                arrived[j] = route.source[peer][i]
        yield tuple(arrived)


@settings(max_examples=300, deadline=None)
@given(
    rule=RULES,
    frames=st.integers(1, 30),
    ranks=st.integers(1, 9),
    history=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    on_all_ranks=st.integers(0, 3),
    choice=st.sampled_from(["auto", "contiguous", "residue"]),
)
def test_every_frame_is_computed_once_by_a_rank_that_has_what_it_reads(
    rule, frames, ranks, history, on_all_ranks, choice
):
    history, on_all_ranks = tuple(min(k, frames) for k in history), tuple(range(min(on_all_ranks, frames)))
    p = plan(rule, frames, ranks, history=history, on_all_ranks=on_all_ranks, choice=choice)
    assert p.owned == tuple(map(tuple, split_frames(frames, ranks)))
    assert sorted(f for own in p.queries for f in own) == list(range(frames))
    assert [len(own) for own in p.queries] == [len(own) for own in p.owned], "nobody computes more than before"
    for rank in range(ranks):
        needed = {g for f in p.queries[rank] for k in history for g in key_frames(rule, f, frames, k) if g < frames}
        assert p.keys[rank] == tuple(sorted(needed | set(on_all_ranks))), "all that is needed and nothing else"
    assert tuple(carry(p.moving)) == p.queries
    assert tuple(carry(p.collecting)) == p.keys
    assert tuple(carry(p.restoring)) == p.owned


@settings(max_examples=100, deadline=None)
@given(rule=RULES, frames=st.integers(1, 30), ranks=st.integers(1, 9), hidden=st.integers(1, 9), kv=st.integers(1, 9))
def test_received_elements_are_those_that_others_send(rule, frames, ranks, hidden, kv):
    sizes = {"ranks": ranks, "period": rule.step(frames), "hidden": hidden, "kv": kv}
    reads = frames_read(rule, frames, (0,))
    auto, *both = (plan_frames(frames, reads, (), choice=c, **sizes) for c in ("auto", "contiguous", "residue"))
    for p in both:
        for rank in range(ranks):
            own, computed, known = set(p.owned[rank]), set(p.queries[rank]), set(p.keys[rank])
            moved = len(computed - own) + len(own - computed)
            assert p.received(rank) == hidden * moved + kv * len(known - computed)
        assert p.total_received == sum(p.returned(rank) for rank in range(ranks))
    assert auto.most_received == min(p.most_received for p in both)
    assert auto in both


@pytest.mark.parametrize(("frames", "ranks"), TABLE)
def test_contiguous_bytes_are_those_of_the_specification(frames, ranks):
    row = TABLE[frames, ranks]
    assert megabytes(plan(SWA, frames, ranks).most_received) == pytest.approx(row["swa"], abs=0.05)
    dilated = plan(DSWA, frames, ranks, choice="contiguous")
    assert megabytes(dilated.most_received) == pytest.approx(row["dswa"], abs=0.05)
    everything = plan(FA, frames, ranks).total_received / ranks  # a mean: shares are uneven
    assert megabytes(everything) == pytest.approx(row["all"], rel=2e-4)


@pytest.mark.parametrize(("frames", "ranks"), TABLE)
def test_residue_bytes_beside_the_specification(frames, ranks):
    """The table moves hidden states to any rank alike, (N−1)/N of them there and back, and counts no keys.

    With as many ranks as classes that is what moves, up to whole frames. With more, a run stays among `period`
    neighbouring ranks, so that only 3/4 move, but its windows reach 2 frames of the class over each inner end.
    """
    row, p = TABLE[frames, ranks], plan(DSWA, frames, ranks, choice="residue")
    assert megabytes(2 * HIDDEN * frames / ranks * (ranks - 1) / ranks) == pytest.approx(row["residue"], abs=0.05)
    hidden = [p.moving.received(rank) + p.restoring.received(rank) for rank in range(ranks)]
    assert sum(hidden) == pytest.approx(2 * frames * 3 / 4, abs=ranks / 2)
    runs = ranks // 4
    ends = [min(run, 1) + min(runs - 1 - run, 1) for run in range(runs)]
    assert [p.collecting.received(rank) for rank in range(ranks)] == [2 * ends[rank // 4] for rank in range(ranks)]


def test_the_cheaper_layout_is_taken_by_the_bytes_of_the_busiest_rank():
    layouts = {size: plan(DSWA, *size).layout for size in TABLE}
    assert layouts == {
        (21, 4): "residue",  # 63.9 MB against 223.6
        (61, 8): "residue",  # 127.8 against 255.6
        (241, 8): "contiguous",  # 255.6 against 399.4
        (241, 16): "contiguous",  # 255.6 in both: nothing is gained by moving
    }
    assert [round(megabytes(plan(DSWA, *size, choice="residue").most_received), 1) for size in TABLE] == [
        63.9,
        127.8,
        399.4,
        255.6,
    ]


def test_residue_classes_are_read_without_any_key_moving_when_ranks_divide_the_period():
    for frames, ranks in ((21, 4), (21, 2), (8, 4), (61, 2)):
        p = plan(DSWA, frames, ranks, choice="residue")
        assert p.collecting.stays
        assert p.queries == tuple(tuple(f for f in range(frames) if f % ranks == rank) for rank in range(ranks))


def test_runs_of_a_class_are_with_the_ranks_that_own_that_stretch():
    p = plan(DSWA, 64, 8, choice="residue")
    assert p.queries[1] == (1, 5, 9, 13, 17, 21, 25, 29)
    assert p.queries[5] == (33, 37, 41, 45, 49, 53, 57, 61)
    assert p.keys[1] == (*p.queries[1], 33, 37)
    for rank in range(8):
        peers = {peer for peer in range(8) if p.moving.receive[rank][peer]}
        assert peers <= set(range(4) if rank < 4 else range(4, 8))


@pytest.mark.parametrize(("ranks", "period"), [(3, 4), (6, 4), (5, 4), (3, 2), (8, 3), (9, 4)])
def test_ranks_that_do_not_divide_the_period_share_alike(ranks, period):
    for frames in (1, 7, 21, 61):
        runs = residue_frames(frames, ranks, period)
        assert sorted(f for run in runs for f in run) == list(range(frames))
        assert [len(run) for run in runs] == [len(share) for share in split_frames(frames, ranks)]
        assert all(a < b for run in runs for a, b in pairwise(run))


def test_a_wrong_residue_class_shows_in_the_bytes(monkeypatch):
    def busiest():
        reads = frames_read(DSWA, 21, (0,))
        p = plan_frames.__wrapped__(21, reads, (), ranks=4, period=4, hidden=1, kv=2, choice="residue")
        return p.most_received

    assert busiest() == 8
    monkeypatch.setattr(frame_plan, "residue_frames", lambda f, ranks, period: residue_frames(f, ranks, period + 1))
    assert busiest() > 24


def test_fewer_frames_than_ranks_leave_the_last_ones_without():
    for choice in ("contiguous", "residue"):
        p = plan(DSWA, 2, 4, choice=choice, on_all_ranks=(0,))
        assert [len(own) for own in p.owned] == [1, 1, 0, 0]
        assert p.queries[2:] == ((), ())
        assert p.keys == ((0,), (0, 1), (0,), (0,)), "what everyone needs reaches empty ranks too"


def test_padding_of_the_token_reading_is_not_exchanged():
    rule = WindowSpec(**{"kind": "DSWA", **FULL_SIZE, "token_window": True})
    assert max(key_frames(rule, 19, 21, 0)) == 23, "the window reaches into zero padding"
    p = plan(rule, 21, 4, choice="contiguous")
    assert p.keys[3] == (*range(4, 21),), "three steps of 4 before 16, and none after the last frame"
    assert plan(rule, 7, 4, choice="residue").layout == "contiguous", "one whole group: the plain window"
    with pytest.raises(ValueError, match="frames are numbered 0 to 1: zero padding is not exchanged"):
        plan_frames(2, ((0, 1, 2), (1,)), (), ranks=2, period=1, hidden=1, kv=2)


def test_history_is_kept_within_itself_and_sent_to_all_that_attend_it():
    assert plan(SWA, 12, 3).keys[0] == (0, 1, 2, 3, 4, 5)
    assert plan(SWA, 12, 3, history=(4,)).keys[0] == (0, 1, 2, 3), "history queries read history only"
    assert plan(SWA, 12, 3, history=(4, 0)).keys[0] == (0, 1, 2, 3, 4, 5), "unless another sample reads more"
    seen = WindowSpec(**{"kind": "SWA", **FULL_SIZE, "all_attend_history": True})
    assert plan(seen, 12, 3, history=(2, 1)).keys[2] == (0, 1, 6, 7, 8, 9, 10, 11)
    assert plan(SWA, 12, 3, on_all_ranks=(0, 1)).keys[2] == (0, 1, 6, 7, 8, 9, 10, 11)


def test_full_attention_needs_every_key_on_all_ranks():
    p = plan(FA, 10, 4, choice="residue")
    assert p.layout == "contiguous", "there are no classes"
    assert p.keys == (tuple(range(10)),) * 4


def test_one_rank_exchanges_nothing():
    for choice in ("auto", "residue"):
        p = plan(DSWA, 9, 1, choice=choice, on_all_ranks=(0, 1))
        assert all(route.stays for route in (p.moving, p.collecting, p.restoring))
        assert p.most_received == 0


def test_plans_are_made_once():
    assert plan(DSWA, 21, 4) is plan(DSWA, 21, 4)
    assert plan(DSWA, 21, 4).moving is plan(DSWA, 21, 4).moving
    assert len({plan(DSWA, 21, 4), plan(DSWA, 21, 2)}) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"reads": ((0,),)}, "reads name what each of the 2 frames reads"),
        ({"reads": ((0,), (0,))}, "its own keys included"),
        ({"choice": "zigzag"}, "choice='zigzag', period=1"),
        ({"period": 0}, "period=0"),
        ({"on_all_ranks": (2,)}, "frames are numbered 0 to 1"),
    ],
)
def test_an_impossible_request_is_refused(wrong, message):
    right = {"reads": ((0, 1), (0, 1)), "on_all_ranks": (), "ranks": 2, "period": 1, "hidden": 1, "kv": 2}
    with pytest.raises(ValueError, match=message):
        plan_frames(2, **{**right, **wrong})
