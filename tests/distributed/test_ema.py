"""The moving average of the weights, update by update."""

import pytest
from support import ema_ranks

from kairos_train.basics.errors import UserError
from kairos_train.training.engine.ema import Ema

VALUES = [4.0, 1.0, -2.0, 0.5, 3.0, 8.0]


def expected(decays, values=VALUES, start=None):
    average = [values[0] if start is None else start]
    for decay, value in zip(decays, values[1:]):
        average.append(decay * average[-1] + (1 - decay) * value)
    return average


def test_the_decay_warms_up_from_a_tenth_to_the_configured_one(world):
    (found,) = world(1).run(ema_ranks.averages, 0.3, VALUES)
    assert found == pytest.approx(expected([1 / 10, 2 / 11, 3 / 12, 0.3, 0.3]), rel=1e-6)


def test_without_warm_up_the_decay_is_the_configured_one_from_the_start(world):
    (found,) = world(1).run(ema_ranks.averages, 0.9, VALUES, warmup=False)
    assert found == pytest.approx(expected([0.9] * 5), rel=1e-6)
    (found,) = world(1).run(ema_ranks.averages, 0.0, VALUES, warmup=False)
    assert found == VALUES


def test_an_average_that_is_handed_over_goes_on_with_its_own_count(world):
    (found,) = world(1).run(ema_ranks.averages, 0.999, VALUES, start=(7.0, 40))
    assert found == pytest.approx(expected([(41 + i) / (50 + i) for i in range(5)], start=7.0), rel=1e-6)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_that_never_follows_or_overshoots_is_refused(decay):
    with pytest.raises(UserError, match=rf"train\.ema_decay={decay}: must be at least 0 and below 1"):
        Ema(None, decay)


def test_the_model_computes_with_the_average_within_the_block_alone(world):
    (found,) = world(1).run(ema_ranks.exchanged)
    assert found == [[5.0, 1.0, 5.0], [1.0, 5.0, 1.0], [5.0, 1.0, 5.0]]
