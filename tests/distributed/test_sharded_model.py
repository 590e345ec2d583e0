"""The sharded model is the model: loss and every gradient in float64, forward and backward, no engine."""

import pytest
from support.sharded_model_ranks import Case, cached_mode, run_cases

pytestmark = pytest.mark.slow

TOKEN = (("window_semantics", "token"), ("restrict_history_query_to_history", False))
ATTEND = (("all_attend_history", True),)
CAUSAL = (("history_causal", True),)
CASES = {
    "tensor4": Case(tensor=4),
    "tensor4_sequence": Case(tensor=4, sequence=True),
    "context4_uneven": Case(context=4),
    "context2_data2": Case(context=2),
    "tensor2_context2": Case(tensor=2, context=2),
    "tensor2_sequence_context2": Case(tensor=2, context=2, sequence=True),
    "tensor2_sequence_data2": Case(tensor=2, sequence=True),
    "fewer_frames_than_ranks": Case(context=4, frames=2, history=(1, 0)),
    "images": Case(context=4, frames=1, history=(0, 0), streams="video"),
    "images_tensor2_sequence_context2": Case(tensor=2, context=2, sequence=True, frames=1, history=(0, 0)),
    "video_alone": Case(tensor=2, context=2, sequence=True, streams="video"),
    "no_actions_in_the_batch": Case(tensor=2, context=2, actions=False),
    "residue_classes": Case(context=4, frames=9, frame_layout="residue"),
    "residue_classes_sequence": Case(tensor=2, context=2, sequence=True, frames=9, frame_layout="residue"),
    "contiguous": Case(context=4, frames=9, frame_layout="contiguous"),
    "serial_states": Case(context=4, state_exchange="serial"),
    "ring_of_states": Case(context=4, state_exchange="ring"),
    "token_windows": Case(context=4, frames=8, history=(1, 0), streams="video", video=TOKEN),
    "all_attend_history": Case(context=4, frames=6, history=(2, 3), video=ATTEND),
    "causal_history": Case(context=4, frames=6, history=(3, 4), video=CAUSAL),
    "recomputed_blocks": Case(tensor=2, context=2, sequence=True, recompute="block"),
    "recomputed_selectively": Case(tensor=2, context=2, recompute="selective"),
    "recomputed_selectively_residue": Case(context=4, frames=9, frame_layout="residue", recompute="selective"),
}


@pytest.fixture(scope="module")
def results(world) -> dict[str, list[dict[str, float]]]:
    """Case → what each rank found."""
    by_rank = world(4).run(run_cases, list(CASES.values()), timeout=240)
    return {name: [found[i] for found in by_rank] for i, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_equal_one_process(results, name):
    worst = {key: max(found[key] for found in results[name]) for key in results[name][0]}
    assert {key: value for key, value in worst.items() if not value <= 1e-10} == {}


@pytest.mark.parametrize("case", [Case(context=4, frames=3), Case(tensor=2, context=2, frames=3)], ids=str)
def test_actions_from_a_history_that_ranks_encoded_together(world, case):
    assert max(world(4).run(cached_mode, case)) <= 1e-12
