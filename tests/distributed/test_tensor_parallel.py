"""Tensor and sequence parallelism over gloo, against one process: regions, layers, gradient sums, audit, DeepSpeed."""

import pytest
import torch
from support import tensor_parallel_ranks as ranks
from torch import Tensor
from torch.testing import assert_close

pytestmark = pytest.mark.slow

PEERS = {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}
"""Rank → ranks of its tensor group, at tensor 2 × data 2."""


def exact(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def joined(results: list[dict], name: str, pick) -> Tensor:
    """One parameter of the tensor ranks in `results`, put together as its split says; equal where it has none."""
    shares, dim = [pick(result)[name] for result in results], results[0]["splits"][name]
    if dim is None:
        assert all(torch.equal(shares[0], share) for share in shares), f"{name} differs between tensor ranks"
        return shares[0]
    return torch.cat(shares, dim)


# --- topology and adapter ---


def test_groups_are_the_computed_ones_and_deepspeed_gets_tensor_and_context_with_data(world):
    results = world(4).run(ranks.groups, 2, 2, 1)
    for rank, found in enumerate(results):
        tensor, context = rank // 2 * 2, rank % 2
        assert found["coordinates"] == (rank % 2, rank // 2, 0)
        assert found["ranks"]["tensor"] == (tensor, tensor + 1)
        assert found["ranks"]["context"] == found["ranks"]["gradient"] == (context, context + 2)
        assert found["ranks"]["data"] is None
        assert found["alone"] == [rank]
        assert found["model"] == (rank % 2, [tensor, tensor + 1])
        assert found["data"] == (rank // 2, [context, context + 2])
        assert (found["sizes"], found["firsts"]) == ((2, 2), (tensor, context))


@pytest.mark.parametrize(("degrees", "alone"), [((4, 1, 1), "data"), ((1, 2, 2), "model")])
def test_deepspeed_gets_a_group_of_one_where_a_degree_is_one(world, degrees, alone):
    for rank, found in enumerate(world(4).run(ranks.groups, *degrees)):
        other = {"data": "model", "model": "data"}[alone]
        assert found[alone] == (0, [rank])
        assert found[other] == (rank, [0, 1, 2, 3])
        assert found["ranks"]["tensor" if alone == "model" else "gradient"] is None


def test_a_layout_keeps_its_groups(world):
    assert world(4).run(ranks.groups_of_two_calls) == [(True, False, 0)] * 4


def test_a_layout_of_another_size_is_refused(world):
    assert all("is for 3 processes, not 4" in message for message in world(4).run(ranks.wrong_size))


# --- regions ---


def parts(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    return x.chunk(2, dim)


EXPECTED = {
    # name → (own number, inputs of the group, dim) → output, and the same for the gradient
    "copy_to": (lambda i, xs, dim: xs[i], lambda i, gs, dim: sum(gs)),
    "reduce_from": (lambda i, xs, dim: sum(xs), lambda i, gs, dim: gs[i]),
    "reduce_both": (lambda i, xs, dim: sum(xs), lambda i, gs, dim: sum(gs)),
    "gather_tokens": (lambda i, xs, dim: torch.cat(xs, dim), lambda i, gs, dim: parts(sum(gs), dim)[i]),
    "scatter_sums": (lambda i, xs, dim: parts(sum(xs), dim)[i], lambda i, gs, dim: torch.cat(gs, dim)),
    "split_tokens": (lambda i, xs, dim: parts(xs[i], dim)[i], lambda i, gs, dim: torch.cat(gs, dim)),
    "join_tokens": (lambda i, xs, dim: torch.cat(xs, dim), lambda i, gs, dim: parts(gs[i], dim)[i]),
}


def dims(name: str, *some: int) -> tuple[int | None, ...]:
    return (None,) if name in ("copy_to", "reduce_from", "reduce_both") else some


@pytest.mark.parametrize(("name", "dim"), [(name, dim) for name in EXPECTED for dim in dims(name, 0, 2, -2, -1)])
def test_a_region_is_its_collective_forward_and_the_transpose_backward(world, name, dim):
    results = world(4).run(ranks.region, name, dim, (2, 3, 4, 6), torch.float64)
    forward, backward = EXPECTED[name]
    for rank, (_, out, _, gradient) in enumerate(results):
        inputs, gradients = ([results[peer][i] for peer in PEERS[rank]] for i in (0, 2))
        exact(out, forward(rank % 2, inputs, dim))
        exact(gradient, backward(rank % 2, gradients, dim))


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_regions_keep_the_dtype_and_what_they_are_given(world, name, dtype):
    (dim,) = dims(name, 1)
    for x, out, _, gradient in world(4).run(ranks.region, name, dim, (2, 4, 3), dtype, contiguous=True):
        assert x.dtype == out.dtype == gradient.dtype == dtype


@pytest.mark.parametrize("name", EXPECTED)
def test_regions_take_samples_without_frames(world, name):
    (dim,) = dims(name, 2)
    for x, out, _, gradient in world(4).run(ranks.region, name, dim, (2, 0, 4, 3), torch.float64):
        assert out.shape[:2] == (2, 0)
        assert gradient.shape == x.shape


def test_tokens_that_do_not_divide_are_refused(world):
    assert set(world(4).run(ranks.uneven_tokens)) == {"3 tokens do not divide into 2 equal shards"}


# --- linear layers ---


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "tensor+sequence"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_column_and_row_layers_equal_one_process(world, sequence, bias):
    case = {"sequence": sequence, "dtype": torch.float64, "shape": (2, 3, 4, 6), "bias": bias}
    reference = ranks.mlp_gradients(sharded=False, **case)
    results = world(4).run(ranks.mlp_gradients, sharded=True, **case)
    for result in results:
        exact(result["out"], reference["out"])
        exact(result["x"], reference["x"])
        assert result["state"] == reference["state"]
    for name, expected in reference["gradients"].items():
        exact(joined(results[:2], name, lambda result: result["gradients"]), expected)


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "tensor+sequence"])
def test_frozen_layers_pass_gradients_on_and_take_none(world, sequence):
    case = {"sequence": sequence, "dtype": torch.float64, "shape": (2, 3, 4, 6), "frozen": True}
    reference = ranks.mlp_gradients(sharded=False, **case)
    for result in world(4).run(ranks.mlp_gradients, sharded=True, **case):
        exact(result["x"], reference["x"])
        assert set(result["gradients"].values()) == {None}


def test_layers_compute_in_bfloat16(world):
    case = {"sequence": True, "dtype": torch.bfloat16, "shape": (2, 3, 4, 6)}
    reference = ranks.mlp_gradients(sharded=False, **case)
    results = world(4).run(ranks.mlp_gradients, sharded=True, **case)
    assert_close(results[0]["out"], reference["out"], rtol=0.05, atol=0.05)
    for name, expected in reference["gradients"].items():
        assert_close(joined(results[:2], name, lambda result: result["gradients"]), expected, rtol=0.05, atol=0.2)


@pytest.mark.parametrize(("sequence", "shape"), [(False, (2, 0, 4, 6)), (True, (2, 0, 4, 6)), (False, (2, 5, 6))])
def test_layers_take_samples_without_frames_and_sequences_without_any(world, sequence, shape):
    for result in world(4).run(ranks.mlp_gradients, sharded=True, sequence=sequence, dtype=torch.float64, shape=shape):
        assert result["out"].shape == shape
        assert all(gradient is not None for gradient in result["gradients"].values())


def test_layers_are_made_on_the_current_device_in_the_default_dtype(world):
    shapes = [(3, 4), (3,), (4, 3), (4,)]
    assert world(4).run(ranks.meta_layers)[0] == [("meta", torch.bfloat16, shape) for shape in shapes]


def test_a_norm_over_the_width_of_all_ranks_equals_one_process(world):
    out, x, weight = ranks.full_width_norm(sharded=False)
    results = world(4).run(ranks.full_width_norm, sharded=True)
    exact(torch.cat([result[0] for result in results[:2]], -1), out)
    exact(torch.cat([result[2] for result in results[:2]], -1), weight)
    for result in results:
        exact(result[1], x)


# --- gradient sums ---


@pytest.mark.parametrize("recompute", ["none", "recompute", "reentrant"])
def test_partial_gradients_are_summed_over_uses_and_micro_batches(world, recompute):
    for result in world(4).run(ranks.summed_gradient, recompute=recompute, dtype=torch.float64, wide=False):
        exact(result["hooked"]["partial"], result["single"]["partial"])
        assert not torch.allclose(result["unhooked"]["partial"], result["single"]["partial"], rtol=1e-3)
        assert torch.equal(result["hooked"]["full"], result["unhooked"]["full"])  # no others are touched
        assert "frozen" not in result["hooked"]


def test_partial_gradients_of_bfloat16_parameters_are_summed_in_float32(world):
    for result in world(4).run(ranks.summed_gradient, recompute="none", dtype=torch.bfloat16, wide=True):
        assert result["hooked"]["partial"].dtype == torch.float32
        assert_close(result["hooked"]["partial"], result["single"]["partial"], rtol=0.02, atol=0.05)


# --- audit ---


def test_a_sound_model_passes_the_audit(world):
    assert set(world(4).run(ranks.audited, "none")) == {"passed"}


@pytest.mark.parametrize(
    ("fault", "finder", "finding", "others"),
    [
        ("missing entry", 0, "parameter extra has no entry", "parameter extra has no entry"),
        ("missing entry on one rank", 2, "parameter extra has no entry", "ranks hold different lists"),
        ("tensor copy", 3, "copies of parameter down.bias differ", "copies of parameter down.bias differ"),
        ("split copy", 2, "copies of parameter up.weight differ", "copies of parameter up.weight differ"),
        ("shape", 1, "parameter down.weight is (4, 6) on this rank; a row shard", "parameter down.weight does not fit"),
        ("frozen", 2, "ranks hold different lists of parameters", "ranks hold different lists of parameters"),
        ("order", 0, "ranks hold different lists of parameters", "ranks hold different lists of parameters"),
    ],
)
def test_the_audit_ends_every_rank_with_the_first_fault(world, fault, finder, finding, others):
    for rank, message in enumerate(world(4).run(ranks.audited, fault)):
        assert (finding if rank == finder else others) in message


# --- under DeepSpeed ---


@pytest.fixture(scope="module")
def toy_reference() -> tuple[list[float], dict[str, Tensor]]:
    return ranks.toy_reference()


WITH_DATA, WITH_CONTEXT = (2, 1, 2), (2, 2, 1)


@pytest.mark.parametrize(
    ("stage", "degrees"),
    [(0, WITH_DATA), (1, WITH_DATA), (2, WITH_DATA), (3, WITH_DATA), (1, WITH_CONTEXT), (3, WITH_CONTEXT)],
)
def test_deepspeed_clips_and_updates_as_one_process_does(world, toy_reference, stage, degrees):
    norms, weights = toy_reference
    results = world(4).run(ranks.toy_under_deepspeed, stage, "fp32", degrees)
    assert min(norms) > 2 * ranks.CLIP
    for result in results:
        assert_close(result["norms"], norms, rtol=1e-5, atol=0)
    for name, expected in weights.items():
        assert_close(joined(results[:2], name, lambda result: result["weights"]), expected, rtol=0, atol=2e-6)
        assert all(torch.equal(results[i]["weights"][name], results[i + 2]["weights"][name]) for i in (0, 1))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_in_bfloat16_every_parameter_is_counted_once_and_copies_stay_equal(world, toy_reference, stage):
    norms, weights = toy_reference
    results = world(4).run(ranks.toy_under_deepspeed, stage, "bf16", WITH_DATA)
    for result in results:
        assert_close(result["norms"], norms, rtol=0.02, atol=0)
    for name, expected in weights.items():
        joint = joined(results[:2], name, lambda result: result["weights"])
        assert_close(joint.float(), expected, rtol=0.02, atol=0.02)


def test_one_gradient_rank_and_four_tensor_ranks_work_as_well(world, toy_reference):
    norms, weights = toy_reference
    results = world(4).run(ranks.toy_under_deepspeed, 1, "fp32", (4, 1, 1))
    assert_close(results[3]["norms"], norms, rtol=1e-5, atol=0)
    for name, expected in weights.items():
        assert_close(joined(results, name, lambda result: result["weights"]), expected, rtol=0, atol=2e-6)
