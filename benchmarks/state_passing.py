"""What a Gated DeltaNet layer moves between context ranks, beside two rivals; and how it scales.

Bytes: what the collectives bring to a rank, counted, against the formulas, for ring and all_gather, forward and
backward, at two lengths; of head all-to-all (Ulysses) and chunk broadcast (the public Kairos v1) as well, whose
formulas then give the table at full size. Time: one layer's forward pass in the four ways in one run, at T = 32,760
with all widths an eighth; without --quick also forward and backward of those that have one. Scaling: forward and
backward of one layer at the same tokens by two single-threaded processes against one, interleaved. Shards may be
uneven, and here the first is a little longer: only the others scan K extra columns.

    python benchmarks/state_passing.py [--tokens 8192] [--repeats 3] [--quick]

`--quick` halves the tokens and repeats less (under 50 s). The last line is one JSON object: machine, `bytes_match`,
`bytes_constant`, `ratio_to_all_to_all` and `ratio_to_chunk_broadcast` (bytes by the default method at full size, 32,760
tokens on 2 ranks), the same as ratios of forward time, `speedup_2proc`, seconds and processor seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.state_passing_parts import rivals
from benchmarks.state_passing_parts.rivals import HeadAllToAll, Sizes, StatePassing
from benchmarks.step_time import keep_freed_memory
from kairos_train.model.hooks import SingleDevice
from kairos_train.model.initialise import initialise
from parallel.exchange.state_exchange import resolve_method
from parallel.traffic import Traffic

FULL = Sizes()
ROWS = ((32_760, 2), (32_760, 4), (32_760, 8), (131_040, 4), (131_040, 8), (300_000, 8), (300_000, 16))
"""(tokens, context ranks)."""

COUNTED = Sizes(dim=64, heads=4, key_dim=32, value_dim=64, item=4)
TIMED = Sizes(dim=320, heads=20, key_dim=32, value_dim=64, item=4)
TIMED_TOKENS = 32_760
SCALED = Sizes(dim=1280, heads=10, item=4)
LONGER = 1.045
"""The first rank's tokens over the second's where scaling is measured: what the second's K extra columns cost."""

PROCESSES = 4


# ---------------------------------------------------------------- on every rank


def make_layer(sizes: Sizes, hooks: SingleDevice) -> nn.Module:
    layer = sizes.build(hooks)
    initialise(layer, 0)
    return layer


def shard(tokens: int, group: dist.ProcessGroup) -> list[int]:
    return [tokens // group.size()] * group.size()


def forward(layer: nn.Module, x: Tensor) -> Tensor:
    """(1, S, D) → (1, S, D); every token is a frame of its own, so that shards may end anywhere."""
    return layer(x[:, :, None], x.shape[1])[:, :, 0]


def forward_backward(layer: nn.Module, x: Tensor, cotangent: Tensor) -> Tensor:
    """Gradients of x and of every weight as well."""
    layer.zero_grad(set_to_none=True)
    out = forward(layer, x.detach().requires_grad_())
    out.backward(cotangent)
    return out.detach()


def count_bytes(group: dist.ProcessGroup, tokens: int) -> dict[str, tuple[int, float]]:
    """(counted, by formula) on this rank, by way and direction."""
    rank, ranks = group.rank(), group.size()
    x = torch.randn(1, tokens // ranks, COUNTED.dim)
    ring = rivals.ring_bytes(COUNTED, ranks)
    heads = rivals.all_to_all_bytes(COUNTED, tokens, ranks)
    expected = {
        ("ring", "states"): (ring if rank else 0, ring if rank < ranks - 1 else 0),
        ("all_gather", "states"): (
            rivals.all_gather_bytes(COUNTED, ranks),
            rivals.all_gather_backward_bytes(COUNTED, ranks),
        ),
        ("all_to_all", "heads"): (heads, heads),
    }
    found = {}
    for (way, kind), (forward, backward) in expected.items():
        traffic = Traffic()
        layer = make_layer(COUNTED, hooks_of(way, shard(tokens, group), group, traffic))
        forward_backward(layer, x, x)
        found[f"{way} forward"] = traffic.received[kind], forward
        found[f"{way} backward"] = traffic.received[f"{kind}.backward"], backward
    traffic = Traffic()
    rivals.broadcast_chunks(make_layer(COUNTED, SingleDevice()), x, group, traffic)
    found["chunk_broadcast forward"] = traffic.total(), rivals.broadcast_bytes(COUNTED, tokens, ranks)
    return found


def hooks_of(way: str, tokens: list[int], group: dist.ProcessGroup, traffic: Traffic | None = None) -> StatePassing:
    hooks = HeadAllToAll if way == "all_to_all" else StatePassing
    return hooks(tokens, group, way, traffic)


def slowest(group: dist.ProcessGroup, work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds until the last rank is done, and the largest processor time of a rank."""
    dist.barrier(group)
    wall, processor = time.perf_counter(), time.process_time()
    work()
    spent = torch.tensor([time.perf_counter() - wall, time.process_time() - processor], dtype=torch.float64)
    dist.all_reduce(spent, dist.ReduceOp.MAX, group=group)
    return float(spent[0]), float(spent[1])


def compare_ways(group: dist.ProcessGroup, repeats: int, backward: bool) -> dict[str, float]:
    """Median seconds of one layer by name, the ways interleaved; all must compute the same."""

    def make_works(tokens: int) -> dict[str, Callable[[], Tensor]]:
        x = torch.randn(1, tokens // group.size(), TIMED.dim, generator=torch.Generator().manual_seed(group.rank()))
        ways = ("ring", "all_gather", "all_to_all")
        layers = {way: make_layer(TIMED, hooks_of(way, shard(tokens, group), group)) for way in ways}
        whole = make_layer(TIMED, SingleDevice())
        works = {way: torch.no_grad()(lambda layer=layer: forward(layer, x)) for way, layer in layers.items()}
        works["chunk_broadcast"] = lambda: rivals.broadcast_chunks(whole, x, group, None)
        if backward:
            for way, layer in layers.items():
                works[f"{way} with backward"] = lambda layer=layer: forward_backward(layer, x, x)
        return works

    outputs = {name: work() for name, work in make_works(TIMED_TOKENS // 15).items()}
    for name, out in outputs.items():
        torch.testing.assert_close(out, outputs["ring"], atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    works = make_works(TIMED_TOKENS)
    works["all_gather"]()  # the memory it takes is not timed
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(slowest(group, work)[0])
    return {name: statistics.median(values) for name, values in times.items()}


def scale(group: dist.ProcessGroup, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of one layer's forward and backward by one process and by both of the group, interleaved."""
    rank, first = group.rank(), round(tokens * LONGER / (1 + LONGER) / 64) * 64
    tokens_of = [first, tokens - first]
    here = slice(0, first) if rank == 0 else slice(first, tokens)
    x, cotangent = torch.randn(2, 1, tokens, SCALED.dim, generator=torch.Generator().manual_seed(0)).unbind(0)
    passing = make_layer(SCALED, StatePassing(tokens_of, group, "auto", None))
    whole = make_layer(SCALED, SingleDevice())

    def both() -> None:
        forward_backward(passing, x[:, here], cotangent[:, here])

    def alone() -> None:
        if rank == 0:
            forward_backward(whole, x, cotangent)

    # Forward passes with their graphs, so that the memory they take is not timed.
    reference = forward(whole, x).detach() if rank == 0 else torch.empty_like(x)
    dist.broadcast(reference, group=group, group_src=0)
    apart = (forward(passing, x[:, here]).detach() - reference[:, here]).abs().max() / reference.abs().max()
    dist.all_reduce(apart, dist.ReduceOp.MAX, group=group)
    spent: dict[str, list[tuple[float, float]]] = {"one": [], "two": []}
    for _ in range(repeats):
        spent["two"].append(slowest(group, both))
        spent["one"].append(slowest(group, alone))
    flat = torch.cat([p.grad.flatten() for p in passing.parameters()])
    reduce = slowest(group, lambda: dist.all_reduce(flat, group=group))[0]
    median = {name: [statistics.median(v) for v in zip(*values, strict=True)] for name, values in spent.items()}
    return {
        "tokens": tokens_of,
        "seconds": {name: values[0] for name, values in median.items()},
        "processor_seconds": {name: values[1] for name, values in median.items()},
        "gradient_sum_seconds": reduce,
        "apart": float(apart),
    }


def rank_main(rank: int, store: str, args: argparse.Namespace, results: Any) -> None:
    """One process: bytes on 2 and 4 ranks, times on 2; rank 0 hands in the results."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    groups = {n: dist.new_group(list(range(n))) for n in (2, PROCESSES)}
    counts, times, scaling = {}, {}, {}
    for ranks, group in groups.items():
        if rank < ranks:
            mine = [count_bytes(group, tokens) for tokens in (256, 512)]
            everyone: list[Any] = [None] * ranks
            dist.all_gather_object(everyone, mine, group=group)
            counts[ranks] = everyone
    if rank < 2:
        times = compare_ways(groups[2], 1 if args.quick else args.repeats, backward=not args.quick)
        scaling = scale(groups[2], args.tokens // 2 if args.quick else args.tokens, 1 if args.quick else args.repeats)
    if rank == 0:
        results.put((counts, times, scaling))
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.1)  # gloo's threads let go of the last tensors


# ---------------------------------------------------------------- report


def report_bytes(counts: dict[int, Any]) -> tuple[bool, bool]:
    """Print counted bytes beside the formulas; whether all agree, and whether those of states stay at two lengths."""
    match = constant = True
    print(
        "bytes received in one layer, counted / by formula, on the rank that receives most; 256 and 512 tokens in all"
    )
    for ranks, everyone in counts.items():
        for name in everyone[0][0]:
            texts = []
            for length in (0, 1):
                pairs = [rank[length][name] for rank in everyone]
                match &= all(counted == formula for counted, formula in pairs)
                texts.append(f"{max(c for c, _ in pairs):>9,.0f} / {max(f for _, f in pairs):>9,.0f}")
            if name.startswith(("ring", "all_gather")):
                constant &= all(rank[0][name][0] == rank[1][name][0] for rank in everyone)
            print(f"  {ranks} ranks  {name:24s} {texts[0]}   {texts[1]}")
    print(f"counted bytes {'equal the formulas' if match else 'DIFFER from the formulas'}; those of states ", end="")
    print("do not depend on the tokens" if constant else "DEPEND on the tokens")
    return match, constant


def report_table() -> list[dict[str, float]]:
    """Print and return megabytes per rank, layer and direction at full size."""
    rows = []
    print("MB received per rank, layer and direction at full size: 20 heads, K 256, V 512, activations in bfloat16")
    print("  tokens   N     ring  all_gather (backward)  head all-to-all  chunk broadcast")
    for tokens, ranks in ROWS:
        row = {
            "tokens": tokens,
            "ranks": ranks,
            "ring": rivals.ring_bytes(FULL, ranks) / 1e6,
            "all_gather": rivals.all_gather_bytes(FULL, ranks) / 1e6,
            "all_gather_backward": rivals.all_gather_backward_bytes(FULL, ranks) / 1e6,
            "all_to_all": rivals.all_to_all_bytes(FULL, tokens, ranks) / 1e6,
            "chunk_broadcast": rivals.broadcast_bytes(FULL, tokens, ranks) / 1e6,
        }
        rows.append(row)
        print(
            f"{tokens:8,d} {ranks:3d} {row['ring']:8.1f} {row['all_gather']:11.1f} {row['all_gather_backward']:10.1f}"
            f" {row['all_to_all']:16.1f} {row['chunk_broadcast']:16.1f}"
        )
    return rows


def report_scaling(scaling: dict[str, Any]) -> float:
    """Print and return how many times faster two processes are."""
    one, two = (scaling["seconds"][name] for name in ("one", "two"))
    processor, (first, second) = scaling["processor_seconds"], scaling["tokens"]
    print(
        f"one Gated DeltaNet layer (D 1280, 10 heads, K 256, V 512), {first + second:,} tokens, forward + backward: "
        f"1 process {one:.2f} s, 2 processes {two:.2f} s ({first} and {second} tokens), {one / two:.2f} times faster"
    )
    ratio = processor["one"] / processor["two"]
    print(
        f"  processor time {processor['one']:.2f} s and {processor['two']:.2f} s ({ratio:.2f} times); outputs apart "
        f"{scaling['apart']:.1e}; summing the weight gradients, once per step and not in it, takes "
        f"{scaling['gradient_sum_seconds']:.2f} s"
    )
    return one / two


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of the layer whose scaling is measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="half the tokens, fewer repeats, under 50 s")
    args = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}; torch {torch.__version__}; gloo, single-threaded processes")
    with tempfile.TemporaryDirectory() as folder:
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(rank_main, (f"{folder}/store", args, results), nprocs=PROCESSES)
        counts, times, scaling = results.get()

    match, constant = report_bytes(counts)
    full = report_table()[0]
    print(f"seconds of one layer on 2 ranks, {TIMED_TOKENS:,} tokens, all widths an eighth, float32 (forward)")
    for name, seconds in times.items():
        rival = "all_to_all with backward" if name.endswith("backward") else "all_to_all"
        print(f"  {name:26s} {seconds:7.3f}   {seconds / times[rival]:5.2f} of head all-to-all")
    speedup = report_scaling(scaling)
    method = resolve_method("auto", 2)
    result = {
        "machine": machine,
        "bytes_match": match,
        "bytes_constant": constant,
        "ratio_to_all_to_all": full[method] / full["all_to_all"],
        "ratio_to_chunk_broadcast": full[method] / full["chunk_broadcast"],
        "time_ratio_to_all_to_all": times[method] / times["all_to_all"],
        "time_ratio_to_chunk_broadcast": times[method] / times["chunk_broadcast"],
        "speedup_2proc": speedup,
        "seconds": times,
        "scaling": scaling,
    }
    print(json.dumps(result))
    if not (match and constant):
        raise SystemExit("counted bytes differ from the formulas")


if __name__ == "__main__":
    main()
