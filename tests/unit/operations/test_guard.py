"""Bad steps: what is a spike, when the budget is exceeded, what a checkpoint remembers."""

import json
import math

import pytest

from kairos_train.config.operation_schema import GuardConfig
from kairos_train.operations.guard import LEAST, Guard


def guard(*, tolerant: bool = True, rollbacks: int = 0, **settings) -> Guard:
    return Guard(GuardConfig(**settings), tolerant=tolerant, rollbacks=rollbacks)


def after_good_steps(watch: Guard, losses=(1.0,) * LEAST) -> Guard:
    for step, loss in enumerate(losses, 1):
        watch.note(step, loss, good=True)
    return watch


def test_losses_that_are_not_finite_are_refused_from_the_first_step_on():
    watch = guard()
    assert watch.refuses(math.nan)
    assert watch.refuses(math.inf)
    assert not watch.refuses(1e30), "nothing to compare with yet"
    assert not watch.is_spike(math.inf)


def test_a_spike_is_above_the_factor_times_the_median_of_the_good_steps_of_the_window():
    watch = after_good_steps(guard(spike_factor=4.0, window=30), [1.0] * 15 + [3.0] * 15)
    assert not watch.refuses(8.0)
    assert watch.refuses(8.1)
    for step in range(31, 61):
        watch.note(step, 10.0, good=True)
    assert not watch.refuses(40.0), "the first steps are out of the window"
    assert watch.refuses(40.1)


@pytest.mark.parametrize("outlier", [100.0, 1e-6])
def test_single_losses_far_from_the_others_do_not_move_the_limit(outlier):
    """As they would move a mean, a largest or a last one."""
    watch = after_good_steps(guard(spike_factor=4.0), [1.0] * 13 + [1.1] * 9 + [outlier] * 3)
    assert not watch.refuses(4.0)
    assert watch.refuses(4.001)


def test_the_first_twenty_steps_are_compared_with_nothing():
    assert not after_good_steps(guard(), [1.0] * 19).is_spike(1e9)
    assert after_good_steps(guard(), [1.0] * 20).is_spike(1e9)


def test_few_good_steps_make_no_spike_and_bad_ones_do_not_count():
    watch = after_good_steps(guard(), [1.0] * (LEAST - 1))
    assert not watch.is_spike(1e9)
    watch.note(LEAST, 1e9, good=False)
    assert not watch.is_spike(1e9)
    watch.note(LEAST + 1, 1.0, good=True)
    assert watch.is_spike(1e9)


def test_without_a_factor_spikes_are_not_sought():
    assert not after_good_steps(guard(spike_factor=None)).refuses(1e30)


def test_the_budget_counts_bad_steps_within_the_window():
    watch = guard(skips=2, window=10)
    for step, good in [(1, False), (2, False), (3, True)]:
        watch.note(step, 1.0, good=good)
        assert not watch.exceeded
    watch.note(11, math.nan, good=False)
    assert not watch.exceeded, "the first one is out of the window"
    watch.note(11, math.nan, good=False)
    assert watch.exceeded
    assert watch.first_bad == 2
    assert "2, 11, 11" in watch.describe()


def test_an_intolerant_guard_is_exceeded_by_one_bad_step_and_never_goes_back():
    watch = guard(tolerant=False)
    watch.note(1, math.nan, good=False)
    assert watch.exceeded
    assert not watch.may_go_back


def test_going_back_is_counted_over_all_lives():
    assert guard(rollbacks=1).may_go_back
    assert not guard(rollbacks=2).may_go_back


def test_a_checkpoint_remembers_and_an_older_one_has_nothing_to_remember():
    watch = after_good_steps(guard(skips=0))
    watch.note(LEAST + 1, math.inf, good=False)
    again = guard(skips=0)
    again.load_state_dict(json.loads(json.dumps(watch.state_dict(), allow_nan=False)))
    assert again.exceeded
    assert again.refuses(10.1)
    assert not again.refuses(9.9)
    again.load_state_dict(None)
    assert not again.exceeded
    with pytest.raises(ValueError, match="no bad step"):
        again.first_bad  # noqa: B018
