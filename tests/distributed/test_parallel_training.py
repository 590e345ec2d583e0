"""Optimiser steps in a layout are optimiser steps of one process: losses, norms, gradients, weights.

Clipping is active, accumulation is 2, the frames are odd in number, conditions differ per sample; one micro-batch has
no actions and one is single images, of which there are fewer frames than context ranks. Eight cases in which tensor,
sequence, context and data ranks each meet every ZeRO stage, and a recomputation, adapters, bfloat16 and a video-only
stage some; nightly a few more, and all combinations with more steps by benchmarks/parity.py.
"""

import pytest
from support.parallel_training_ranks import make_config, tensors_hooked_in_a_block, train_layout, train_reference

from kairos_train.training.parity.compare import Trace, compare, low_precision

pytestmark = pytest.mark.slow

LAYOUTS = {
    "TP2xDP2": (4, "parallel.tensor=2"),
    "TP2+SPxDP2": (4, "parallel.tensor=2 parallel.sequence=true"),
    "CP2xDP2": (4, "parallel.context=2"),
    "CP4": (4, "parallel.context=4"),
    "CP4xDP2": (8, "parallel.context=4"),
    "TP2+SPxCP2": (4, "parallel.tensor=2 parallel.sequence=true parallel.context=2"),
    "TP2+SPxCP2xDP2": (8, "parallel.tensor=2 parallel.sequence=true parallel.context=2"),
}
RELEASED = "train.stage3_param_persistence_threshold=0 train.stage3_max_live_parameters=0"
"""Weights as small as these would otherwise stay gathered, and nobody would see who reads one that is not there."""

OFFLOADED = "train.recompute=block train.offload_activations=true"

CASES = [
    ("TP2+SPxDP2", 0, ""),
    ("TP2xDP2", 2, ""),
    ("CP2xDP2", 1, "train.precision=bf16"),
    ("CP2xDP2", 3, f"train.recompute=block {RELEASED}"),
    ("CP4", 0, f"streams=video {OFFLOADED}"),
    ("TP2+SPxCP2", 1, "train.recompute=selective"),
    ("TP2+SPxCP2", 2, "stage.lora.rank=2"),
    ("TP2+SPxCP2xDP2", 3, RELEASED),
]
MORE = [
    ("TP2xDP2", 0, ""),
    ("TP2xDP2", 0, "stage.lora.rank=2"),
    ("TP2+SPxDP2", 2, ""),
    ("TP2+SPxDP2", 1, "streams=video"),
    ("CP4", 0, "streams=video"),
    ("CP4xDP2", 2, ""),
    ("CP2xDP2", 3, f"train.offload_activations=true {RELEASED}"),
    ("TP2+SPxDP2", 1, "train.offload_activations=true train.precision=bf16"),
    ("TP2+SPxCP2", 0, ""),
    ("TP2+SPxCP2xDP2", 2, f"streams=video {OFFLOADED}"),
]


def steps_of(stage: int) -> int:
    """ZeRO 3 has seen its whole order of modules after one step; a further one costs as much as all of the others."""
    return 2 if stage == 3 else 3


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    """The trace of one process for the same global batch, each made once."""
    folder, made = tmp_path_factory.mktemp("reference"), {}

    def trace(overrides: str, ranks: int, steps: int, *, exact: bool = False) -> Trace:
        config = make_config(overrides)
        data = ranks // config.parallel.tensor // config.parallel.context
        precision = "fp32" if exact else config.train.precision
        key = (config.stage.streams, precision, config.stage.lora.rank, data, steps)
        if key not in made:
            made[key] = folder / f"{len(made)}.safetensors"
            world(1).run(train_reference, overrides, ranks, str(made[key]), steps, exact)
        return Trace.load(made[key])

    return trace


def test_zero_3_hooks_what_a_block_returns_and_not_what_it_leaves(world):
    """Whether keys and values get gradients depends on the batch, and ranks have different ones."""
    assert world(1).run(tensors_hooked_in_a_block) == [(1, 3)]


@pytest.mark.parametrize(
    ("layout", "stage", "more"), [*CASES, *(pytest.param(*case, marks=pytest.mark.nightly) for case in MORE)]
)
def test_a_layout_trains_as_one_process_does(world, reference, tmp_path, layout, stage, more):
    ranks, degrees = LAYOUTS[layout]
    overrides = f"{degrees} train.zero_stage={stage} {more}"
    world(ranks).run(train_layout, overrides, str(tmp_path / "trace"), steps_of(stage), timeout=240)
    got, expected = Trace.load(tmp_path / "trace"), reference(overrides, ranks, steps_of(stage))
    assert (expected.scalars[:, 3] > 0.1).all(), "clipping is active"
    config = make_config(overrides)
    exact = reference(overrides, ranks, steps_of(stage), exact=True) if low_precision(config) else None
    deviations = compare(expected, got, config, exact=exact)
    assert [str(deviation) for deviation in deviations if not deviation.ok] == []
