"""One loss equation: a step's numbers do not depend on how its samples are spread over processes and micro-batches."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from support.train_step_ranks import refuse_one, train

pytestmark = pytest.mark.slow

LAYOUTS = {"whole": (1, 1), "accumulated": (1, 4), "two_processes": (2, 1), "both": (2, 2)}
"""Processes and micro-batches per process for the same eight samples."""


@pytest.fixture(scope="module")
def results(world, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("steps")
    for name, (size, micro_batches) in LAYOUTS.items():
        world(size).run(train, folder / f"{name}.json", micro_batches)
    return {
        name: (
            torch.tensor(json.loads((folder / f"{name}.json").read_text())),
            load_file(folder / f"{name}.safetensors"),
        )
        for name in LAYOUTS
    }


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "whole"])
def test_losses_norms_and_weights_equal_those_of_one_whole_batch(results, name):
    (reports, weights), (expected, expected_weights) = results[name], results["whole"]
    torch.testing.assert_close(reports, expected, rtol=1e-5, atol=0)
    for key, value in expected_weights.items():
        assert (weights[key] - value).norm() <= 1e-4 * value.norm() + 1e-6, key


def test_the_steps_tell_the_layouts_apart_if_they_differed(results):
    """The last step's loss depends on the first two updates, and clipping was at work."""
    reports, _ = results["whole"]
    assert (reports[:, 3] > 0.1).all()
    assert reports[0, 2] != reports[1, 2]
    assert (reports[:, 4] == 8).all()


@pytest.mark.parametrize(("size", "micro_batches"), [(1, 1), (2, 2)])
def test_a_refused_update_changes_nothing(world, size, micro_batches):
    """All ranks are asked once, with the loss of the whole step."""
    found = world(size).run(refuse_one, micro_batches)
    for rank in found:
        assert rank["asked"] == rank["losses"] == found[0]["losses"]
        assert rank["losses"][0] == pytest.approx(rank["losses"][1], rel=1e-6)
        assert rank["stepped"] == rank["changed"] == [False, True]
        assert not math.isfinite(rank["norms"][0])
        assert 0.1 < rank["norms"][1] < 100
