"""Attention on exchanged frames equals dense masked attention of everything, over real processes."""

from itertools import product

import pytest
import torch
from support import frame_exchange_ranks as ranks
from support.frame_exchange_ranks import Case

from kairos_train.model.kernels.windows import WindowSpec


def rule(kind, *, dilation=4, window=3, token=False, restrict=True, all_attend=False):
    return WindowSpec(kind, window, dilation, token, restrict, all_attend)


HISTORIES = ((1, 3), (5, 0))
"""Of a batch of two; cut to the frames there are."""


def cases(frames_on_ranks, dilations):
    """Every kind, reading, history rule and layout, on shards of every size."""
    found = []
    for frames, (kind, dilation) in product(
        frames_on_ranks, [("SWA", 4), ("FA", 4), *(("DSWA", d) for d in dilations)]
    ):
        layouts = ("contiguous", "residue") if kind == "DSWA" else ("auto",)
        for choice, history in product(layouts, HISTORIES):
            history = tuple(min(k, frames) for k in history)
            for flags in ({}, {"all_attend": True}, {"restrict": False}, {"token": True}):
                if kind == "FA" and flags.get("token"):
                    continue
                found.append(Case(rule(kind, dilation=dilation, **flags), frames, history, choice, max(history)))
    return found


def worst(results):
    """(error, case index) over all ranks."""
    return max((error, i) for errors in results for i, error in enumerate(errors))


def test_four_ranks_equal_dense_attention_in_outputs_and_gradients(world):
    # 21 frames are 6,5,5,5; 5 are 2,1,1,1; 2 leave two ranks without.
    # Dilation 4: a rank has one class; 2: half a class; 3: classes and ranks do not divide.
    listed = cases((21, 5, 2), dilations=(4, 2, 3))
    error, index = worst(world(4).run(ranks.worst_errors, listed))
    assert error <= 1e-12, listed[index]


def test_two_ranks_equal_dense_attention_in_outputs_and_gradients(world):
    listed = cases((11, 1), dilations=(4, 3))
    error, index = worst(world(2).run(ranks.worst_errors, listed))
    assert error <= 1e-12, listed[index]


MUTATIONS = ("gradients not returned", "gradients overwritten", "frame off by one")


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_exchange_departs_from_dense_attention(world, mutation):
    listed = [
        Case(rule("SWA"), 21, (1, 3), "contiguous"),
        Case(rule("DSWA"), 21, (1, 3), "contiguous", on_all_ranks=3),
        Case(rule("DSWA", dilation=2), 21, (1, 3), "residue"),
        Case(rule("SWA", token=True), 9, (0, 0), "contiguous"),
        Case(rule("FA"), 5, (1, 3), "auto"),
    ]
    assert worst(world(4).run(ranks.worst_errors, listed))[0] <= 1e-12
    broken = world(4).run(ranks.worst_errors, listed, mutation)
    for index, case in enumerate(listed):
        assert max(errors[index] for errors in broken) > 1e-3, case


def test_a_moved_frames_gradient_must_come_back_too(world):
    listed = [Case(rule("DSWA"), 21, (0, 0), "residue")]  # whole classes: hidden states move and no key does
    assert worst(world(4).run(ranks.worst_errors, listed))[0] <= 1e-12
    assert worst(world(4).run(ranks.worst_errors, listed, "gradients not returned"))[0] > 1e-3


def test_the_gradient_of_a_frame_is_added_once_per_reader(world):
    results = world(4).run(ranks.gradients_of_keys_read_on_all_ranks, torch.float64, [1.0, 2.0, 3.0, 4.0])
    assert results == [[[10.0, 10.0], [-4.0, -4.0]]] * 4


def test_bfloat16_gradients_are_added_in_float32(world):
    # Added one by one in bfloat16, each 2^−9 would be lost beside 1; together they round up to the next number.
    results = world(4).run(ranks.gradients_of_keys_read_on_all_ranks, torch.bfloat16, [1.0, 2**-9, 2**-9, 2**-9])
    assert results == [[[1 + 2**-7] * 2, [-4.0, -4.0]]] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("choice", ["contiguous", "residue"])
def test_frames_arrive_in_their_own_type(world, dtype, choice):
    case = Case(rule("DSWA", dilation=2), 13, (0,), choice, on_all_ranks=2)
    assert world(4).run(ranks.numbers_of_frames, dtype, case) == [(True, True, True)] * 4


def test_bytes_at_the_collectives_are_those_of_the_formula(world):
    for case in (
        Case(rule("SWA"), 21, (0,), "auto"),
        Case(rule("DSWA"), 21, (0,), "contiguous", on_all_ranks=2),
        Case(rule("DSWA"), 21, (0,), "residue"),
        Case(rule("DSWA", dilation=2), 21, (1,), "residue", on_all_ranks=1),
        Case(rule("SWA"), 2, (0,), "auto", on_all_ranks=1),
    ):
        for got in world(4).run(ranks.counted_bytes, case):
            assert got["counted"] == got["reported"] == got["formula"], case
            assert got["counted_backward"] == got["reported_backward"] == got["formula_backward"], case


def test_a_layer_that_needs_no_other_frames_makes_no_collective(world):
    assert all(world(4).run(ranks.exchange_without_need, Case(rule("SWA", window=1), 6, (0,), "auto")))


def test_calls_that_do_not_fit_the_plan_are_refused(world):
    for messages in world(2).run(ranks.refusals):
        assert "holds 2 frames (dimension 1)" in messages[0]
        assert "travel together" in messages[1]
        assert messages[2] == "a plan for 2 ranks in a group of 1"
