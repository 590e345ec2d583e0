"""The gated delta rule over context ranks equals one process, over real processes.

Decays near zero and short shards: at usual decays A vanishes within a shard, and a broken A would pass.
"""

from itertools import product

import pytest
import torch
from support import state_passing_ranks as ranks
from support.state_passing_ranks import Case

from parallel.exchange.state_exchange import resolve_method

METHODS = ("serial", "ring", "all_gather")
FOUR = ((70, 3, 131, 9), (0, 5, 0, 66), (3, 0, 0, 0), (40, 64, 0, 7))
TWO = ((67, 3), (3, 130), (0, 4), (5, 0))


def failing(results, tolerance):
    """name → largest error over ranks (and cases), of those beyond the tolerance."""
    worst = {}
    for errors in results:
        for case in errors if isinstance(errors, list) else [errors]:
            for name, error in case.items():
                if not error <= tolerance:
                    worst[name] = max(error, worst.get(name, 0.0))
    return worst


def without_calls(results):
    return [[{k: v for k, v in case.items() if not k.startswith("calls")} for case in rank] for rank in results]


@pytest.mark.parametrize(("size", "shards"), [(2, TWO), (4, FOUR)])
def test_outputs_states_and_gradients_equal_one_call_over_the_whole_sequence(world, size, shards):
    cases = [Case(*rest) for rest in product(shards, ("zero", "slow", "fast"), METHODS)]
    cases += [Case(shards[0], "slow", method, batch=2, initial_state=False) for method in METHODS]
    results = world(size).run(ranks.run_cases, cases)
    assert failing(results, 1e-12) == {}
    after_the_cut = [n for n in results[1][0] if n.endswith("after the cut")]
    assert len(after_the_cut) == 6  # output and gradients of q, k, v, g, β


def test_a_few_tokens_on_four_ranks_equal_one_call_over_all_of_them(world):
    cases = [Case((3, 0, 2, 4), "slow", method) for method in METHODS]
    assert failing(world(4).run(ranks.run_cases, cases), 1e-12) == {}


def test_padding_changes_nothing_and_gets_no_gradient(world):
    cases = [Case(FOUR[0], "slow", method, batch=2, padding=11) for method in METHODS]
    cases += [Case((0, 5, 0, 66), "slow", "ring", padding=3)]  # shards of nothing but padding
    assert failing(world(4).run(ranks.run_cases, cases), 1e-12) == {}


def test_float32_stays_with_the_serial_oracle(world):
    case = Case((700, 130, 3, 600), "slow", "serial", dtype=torch.float32)
    assert failing(world(4).run(ranks.methods_apart, case, ("ring", "all_gather")), 1e-5) == {}


def test_bfloat16_stays_with_the_serial_oracle(world):
    case = Case((70, 130, 3, 60), "slow", "serial", dtype=torch.bfloat16)
    assert failing(world(4).run(ranks.methods_apart, case, ("ring", "all_gather")), 3e-2) == {}


SHARD = (70, 30, 20, 9)
FROM_A = {"output", "output after the cut", "state"}
FROM_GRADIENT = {f"gradient of {name}" for name in ("k", "v", "g", "beta")}


@pytest.mark.parametrize(
    ("mutation", "method", "detected"),
    [
        *(("A dropped", method, FROM_A) for method in ("ring", "all_gather")),
        *(("A transposed", method, FROM_A) for method in ("ring", "all_gather")),
        *(("A dropped backward", method, FROM_GRADIENT) for method in ("ring", "all_gather")),
        *(("A not transposed backward", method, FROM_GRADIENT) for method in ("ring", "all_gather")),
        ("fold order swapped", "all_gather", FROM_A),
        ("fold order swapped backward", "all_gather", FROM_GRADIENT),
        *(("reverse exchange skipped", method, FROM_GRADIENT) for method in ("ring", "all_gather")),
    ],
)
def test_a_broken_exchange_is_detected_with_decays_near_zero(world, mutation, method, detected):
    broken = world(4).run(ranks.run_cases, [Case(SHARD, "slow", method)], mutation)
    assert detected <= failing(broken, 1e-3).keys()


def test_a_whole_layer_equals_one_process_in_every_gradient(world):
    cases = [((6, 1, 0, 2), 3, method, 2) for method in METHODS]
    cases += [((25, 30, 2, 1), 3, "auto", 1), ((1, 0, 0, 0), 6, "auto", 1), ((0, 1, 0, 1), 3, "ring", 1)]
    results = world(4).run(ranks.layers, cases)
    names = results[0][0].keys()
    assert {
        f"gradient of {n}" for n in ("A_log", "dt_bias", "a_proj.weight", "b_proj.weight", "k_conv1d.weight")
    } < names
    assert failing(without_calls(results), 1e-12) == {}


@pytest.mark.parametrize("mutation", ["halo from the wrong side", "halo sign wrong"])
def test_a_broken_halo_is_detected(world, mutation):
    broken = world(2).run(ranks.layers, [((20, 4), 3, "auto", 1, mutation)])
    assert {"output", "gradient of x", "gradient of k_conv1d.weight"} <= failing(broken, 1e-3).keys()


@pytest.mark.parametrize(("recompute", "exchanges"), [("none", 1), ("all", 2), ("all but states", 1)])
def test_a_replay_exchanges_states_again_unless_they_are_kept(world, recompute, exchanges):
    cases = [((6, 1, 3, 2), 3, method, 2, None, recompute) for method in METHODS]
    results = world(4).run(ranks.layers, cases)
    assert failing(without_calls(results), 1e-12) == {}
    # The serial way has nothing to receive on the first rank; the others join every exchange.
    calls = [[case.get("calls states", 0) for case in rank] for rank in results]
    assert calls == [[0, exchanges, exchanges], *[[exchanges] * 3] * 3]
    assert all(case.get("calls states.backward", 0) == 1 for rank in results[:3] for case in rank)


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_received_are_those_of_the_formulas_whatever_the_tokens(world, size):
    a, b = (4 * ranks.HEADS * ranks.KEYS * width for width in (ranks.KEYS, ranks.VALUES))
    for tokens in (16, 32):
        for rank, got in enumerate(world(size).run(ranks.counted_bytes, tokens, "ring")):
            assert got == {"states": b if rank else 0, "states.backward": b if rank < size - 1 else 0}
        for got in world(size).run(ranks.counted_bytes, tokens, "all_gather"):
            assert got == {"states": (size - 1) * (a + b), "states.backward": (size - 1) * b}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_halo_passes_over_empty_ranks_and_gradients_return(world, dtype):
    results = world(4).run(ranks.halo_of_positions, (5, 0, 3, 4), dtype)
    assert [before for before, _ in results] == [[0, 0, 0], [0, 0, 0], [3, 4, 5], [6, 7, 8]]
    assert [gradient for _, gradient in results] == [[0, 0, 1, 2, 3], [], [1, 2, 3], [0, 0, 0, 0]]


def test_too_few_tokens_for_the_halo_is_one_error_on_every_rank(world):
    messages = world(2).run(ranks.refused_halo, (9, 2))
    assert messages[0] == messages[1]
    assert "parallel.context=2: a rank would hold 2 tokens" in messages[0]


def test_auto_gathers_within_a_node_and_uses_the_ring_beyond():
    assert [resolve_method("auto", ranks) for ranks in (2, 8, 9)] == ["all_gather", "all_gather", "ring"]
    assert resolve_method("serial", 4) == "serial"
    with pytest.raises(ValueError, match="state exchange 'rings': one of auto, serial, ring, all_gather"):
        resolve_method("rings", 4)
