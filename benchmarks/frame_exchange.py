"""What windowed attention moves between context ranks, beside head all-to-all (Ulysses) and all-gather of K, V.

Three parts. The table: bytes that a rank receives in one layer's forward pass at full size (480p, bfloat16), by
formula; of the frame exchange the busiest rank's, of the two others the mean (their shares differ by a frame at most).
The count: the same formula at small size against what passes the collectives on gloo, forward and backward, on every
rank. The clock: exchange, Ulysses and all-gather in one run, interleaved: communication with its packing, no attention.

    python benchmarks/frame_exchange.py [--ranks 4] [--frames 64] [--tokens 256] [--width 512] [--repeats 21] [--quick]

The last line is one JSON object: machine, `bytes_match`, `ratio_to_ulysses` and `ratio_to_all_gather` (bytes of the
exchange over theirs, at 241 frames on 8 ranks, mean of the layers SWA, SWA, DSWA), megabytes and seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from kairos_train.model.kernels.windows import WindowSpec, frames_read
from parallel.exchange.frame_exchange import FrameExchange
from parallel.exchange.frame_plan import FramePlan, plan_frames

FULL_SIZE = 1560 * 2560
"""Numbers of one frame's hidden state at 480p; K and V have twice as many. Two bytes each."""

ROWS = ((21, 4), (61, 8), (241, 8), (241, 16))
"""(latent frames, context ranks): 81, 241 and 961 video frames."""

CYCLE = ("SWA", "SWA", "DSWA")
"""The windowed layers of one cycle; the fourth, GATED, passes states."""

SMALL = 4 * 8
"""Numbers per frame where bytes are counted."""


def plan_layer(kind: str, frames: int, ranks: int, numbers: int, choice: str = "auto") -> FramePlan:
    """The plan of a full-size layer kind: window 3, dilation 4, no history; `numbers` per frame of hidden state."""
    rule = WindowSpec(kind, 3, 4, token_window=False, restrict_history=True, all_attend_history=False)
    reads, step = frames_read(rule, frames, (0,)), rule.step(frames)
    return plan_frames(frames, reads, (), ranks=ranks, period=step, hidden=numbers, kv=2 * numbers, choice=choice)


def ulysses_numbers(frames: int, ranks: int, numbers: int) -> float:
    """Received by a rank: q, k, v and o of its frames, but for its own share of the heads."""
    return 4 * frames / ranks * (ranks - 1) / ranks * numbers


def all_gather_numbers(frames: int, ranks: int, numbers: int) -> float:
    """Received by a rank: K and V of all other frames."""
    return 2 * frames * (ranks - 1) / ranks * numbers


def table(frames: int, ranks: int) -> dict[str, Any]:
    """Megabytes per rank, layer and direction at full size."""

    def megabytes(numbers: float) -> float:
        return 2 * numbers / 1e6

    plans = {
        "swa": plan_layer("SWA", frames, ranks, FULL_SIZE),
        "dswa_contiguous": plan_layer("DSWA", frames, ranks, FULL_SIZE, "contiguous"),
        "dswa_residue": plan_layer("DSWA", frames, ranks, FULL_SIZE, "residue"),
    }
    residue = plans["dswa_residue"]
    return {
        "frames": frames,
        "ranks": ranks,
        **{name: megabytes(plan.most_received) for name, plan in plans.items()},
        "of_it_keys": megabytes(2 * FULL_SIZE * max(residue.collecting.received(r) for r in range(ranks))),
        "ulysses": megabytes(ulysses_numbers(frames, ranks, FULL_SIZE)),
        "all_gather": megabytes(all_gather_numbers(frames, ranks, FULL_SIZE)),
        "dswa": megabytes(plan_layer("DSWA", frames, ranks, FULL_SIZE).most_received),
        "dswa_layout": plan_layer("DSWA", frames, ranks, FULL_SIZE).layout,
    }


# ---------------------------------------------------------------- the ways of getting the keys


class LayerExchange:
    """One layer by frame exchange, forward and backward: hidden states there, K and V, outputs back."""

    def __init__(self, plan: FramePlan, group: dist.ProcessGroup, shape: tuple[int, ...]) -> None:
        rank = group.rank()
        self.exchange = FrameExchange(plan, group, rank)
        self.x = torch.randn(1, len(plan.owned[rank]), *shape).requires_grad_()
        self.k, self.v = (torch.randn(1, len(plan.queries[rank]), *shape).requires_grad_() for _ in range(2))

    def forward(self) -> tuple[Tensor, ...]:
        moved = self.exchange.move(self.x)
        return (*self.exchange.collect(self.k, self.v), self.exchange.restore(moved))

    def backward(self, outputs: tuple[Tensor, ...]) -> None:
        inputs = (self.k, self.v, self.x)
        crossing = [(y, x) for y, x in zip(outputs, inputs, strict=True) if y is not x]
        if crossing:  # the same on all ranks
            ys, xs = zip(*crossing, strict=True)
            torch.autograd.grad(ys, xs, [y.detach() for y in ys])


class Ulysses:
    """Heads against frames: q, k, v to the rank of their heads with all frames, o back; even shares of both."""

    def __init__(self, frames: int, group: dist.ProcessGroup, shape: tuple[int, ...]) -> None:
        self.group, self.ranks = group, group.size()
        self.qkv = torch.randn(3, frames // self.ranks, *shape)
        self.o = torch.randn(1, frames // self.ranks, *shape)

    def forward(self) -> tuple[Tensor, ...]:
        qkv = self._to_heads(self.qkv)
        return qkv, self._to_frames(qkv[:, :1])

    def backward(self, outputs: tuple[Tensor, ...]) -> None:
        self._to_heads(self.o)
        self._to_frames(outputs[0])

    def _to_heads(self, x: Tensor) -> Tensor:
        """(T, F/N, L, W) → (F, T, L, W/N)."""
        parts = x.unflatten(-1, (self.ranks, -1)).permute(3, 1, 0, 2, 4).contiguous()  # N, F/N, T, L, W/N
        return self._all_to_all(parts.flatten(0, 1))

    def _to_frames(self, x: Tensor) -> Tensor:
        """(F, T, L, W/N) → (T, F/N, L, W)."""
        parts = self._all_to_all(x.contiguous()).unflatten(0, (self.ranks, -1))
        return parts.permute(2, 1, 3, 0, 4).flatten(-2).contiguous()

    def _all_to_all(self, x: Tensor) -> Tensor:
        out, even = torch.empty_like(x), [x.shape[0] // self.ranks] * self.ranks
        dist.all_to_all_single(out, x, even, even, group=self.group)
        return out


class AllGather:
    """K and V of all frames on every rank; their gradients summed back by reduce-scatter. Even shares."""

    def __init__(self, frames: int, group: dist.ProcessGroup, shape: tuple[int, ...]) -> None:
        self.group, self.frames = group, frames
        self.own = torch.randn(2 * frames // group.size(), *shape)  # K and V, frame by frame

    def forward(self) -> tuple[Tensor, ...]:
        out = self.own.new_empty(2 * self.frames, *self.own.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
        gather(out, self.own, group=self.group)
        return (out,)

    def backward(self, outputs: tuple[Tensor, ...]) -> None:
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(torch.empty_like(self.own), outputs[0], group=self.group)


# ---------------------------------------------------------------- on every rank


@contextmanager
def counted(group: dist.ProcessGroup) -> Iterator[list[int]]:
    """Bytes that reach this rank from others, one entry per all-to-all."""
    found, original, rank = [], dist.all_to_all_single, group.rank()

    def count(output: Tensor, input: Tensor, to: list[int], *rest: Any, **named: Any) -> None:
        original(output, input, to, *rest, **named)
        row = output[0].numel() if output.shape[0] else 0
        found.append((output.shape[0] - to[rank]) * row * output.element_size())

    with mock.patch.object(dist, "all_to_all_single", count):
        yield found


def count_bytes(groups: dict[int, dist.ProcessGroup | None], everyone: dist.ProcessGroup) -> bool:
    """Whether formulas hold at the collectives, on this rank, for every kind and layout of the rows that fit."""
    match = True
    for frames, ranks in [(21, 4), (2, 4), (61, everyone.size()), (241, everyone.size()), (21, 2)]:
        group = groups.get(ranks)
        if group is None:
            continue
        rank = group.rank()
        for kind, choice in (("SWA", "auto"), ("DSWA", "contiguous"), ("DSWA", "residue"), ("FA", "auto")):
            plan = plan_layer(kind, frames, ranks, SMALL, choice)
            layer = LayerExchange(plan, group, (4, 8))
            with counted(group) as found:
                outputs = layer.forward()
                forward = sum(found)
                layer.backward(outputs)
            match &= forward == 4 * plan.received(rank) and sum(found) - forward == 4 * plan.returned(rank)
        if frames % ranks == 0:
            ulysses = Ulysses(frames, group, (4, 8))
            with counted(group) as found:
                ulysses.forward()
            match &= sum(found) == 4 * ulysses_numbers(frames, ranks, SMALL)
    return match


def measure(subjects: dict[str, Any], group: dist.ProcessGroup, repeats: int) -> dict[str, float]:
    """Median seconds of a forward and backward; the slowest rank's, subjects interleaved."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for repeat in range(repeats + 2):
        for name, subject in subjects.items():
            dist.barrier(group)
            begin = time.perf_counter()
            subject.backward(subject.forward())
            slowest = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
            if repeat >= 2:  # the first rounds warm up
                times[name].append(float(slowest))
    return {name: statistics.median(values) for name, values in times.items()}


def rank_main(rank: int, size: int, store: str, args: argparse.Namespace, results: Any) -> None:
    """One process: bytes, then times on the first `--ranks` of them; rank 0 hands in the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    groups = {n: dist.new_group(list(range(n))) for n in sorted({2, 4, args.ranks, size})}
    groups = {n: group if rank < n else None for n, group in groups.items()}
    match = torch.tensor(int(count_bytes(groups, groups[size])))
    dist.all_reduce(match, dist.ReduceOp.MIN)
    group, seconds = groups[args.ranks], {}
    if group is not None:
        shape = (args.tokens, args.width)

        def exchange(kind: str, choice: str) -> LayerExchange:
            return LayerExchange(
                plan_layer(kind, args.frames, args.ranks, args.tokens * args.width, choice), group, shape
            )

        subjects = {
            "swa": exchange("SWA", "auto"),
            "dswa_contiguous": exchange("DSWA", "contiguous"),
            "dswa_residue": exchange("DSWA", "residue"),
            "ulysses": Ulysses(args.frames, group, shape),
            "all_gather": AllGather(args.frames, group, shape),
        }
        seconds = measure(subjects, group, 7 if args.quick else args.repeats)
    if rank == 0:
        results.put((bool(match), seconds))
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.1)  # gloo's threads let go of the last tensors


# ---------------------------------------------------------------- report


def run_ranks(args: argparse.Namespace) -> tuple[bool, dict[str, float]]:
    """(bytes match, median seconds by name) from 8 processes, or as many as `--ranks` asks for."""
    size = max(8, args.ranks)
    with tempfile.TemporaryDirectory() as folder:
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(rank_main, (size, f"{folder}/store", args, results), nprocs=size)
        return results.get()


def cycle_ratio(row: dict[str, Any], other: str) -> float:
    """Mean bytes of a cycle's windowed layers over another way's."""
    return statistics.fmean(row[kind.lower()] for kind in CYCLE) / row[other]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="processes that are timed")
    parser.add_argument("--frames", type=int, default=64, help="latent frames of the timed layers, a multiple of ranks")
    parser.add_argument("--tokens", type=int, default=256, help="per frame, timed")
    parser.add_argument("--width", type=int, default=512, help="timed, a multiple of ranks")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, under 50 s")
    args = parser.parse_args()
    if args.frames % args.ranks or args.width % args.ranks:
        raise SystemExit(f"--ranks {args.ranks}: must divide --frames {args.frames} and --width {args.width}")

    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    rows = [table(frames, ranks) for frames, ranks in ROWS]
    columns = ("swa", "dswa_contiguous", "dswa_residue", "of_it_keys", "ulysses", "all_gather")
    print("MB received per rank, layer and direction: 1560 tokens of width 2560 per frame, bfloat16")
    print(f"{'frames':>6} {'ranks':>5} " + " ".join(f"{name:>15}" for name in columns) + "   DSWA takes")
    for row in rows:
        values = " ".join(f"{row[name]:15.1f}" for name in columns)
        print(f"{row['frames']:6d} {row['ranks']:5d} {values}   {row['dswa_layout']}")

    match, seconds = run_ranks(args)
    print(f"bytes at the collectives, forward and backward: {'equal the formula' if match else 'DIFFER'}")
    print(
        f"{machine}; torch {torch.__version__}, gloo, {args.ranks} single-threaded processes; {args.frames} frames of "
        f"{args.tokens} tokens, width {args.width}, float32; forward + backward, medians in ms"
    )
    for name, value in seconds.items():
        print(f"{name:>15} {1e3 * value:8.2f}   {value / seconds['ulysses']:5.2f} of Ulysses")
    long = next(row for row in rows if (row["frames"], row["ranks"]) == (241, 8))
    result = {
        "machine": machine,
        "bytes_match": match,
        "ratio_to_ulysses": cycle_ratio(long, "ulysses"),
        "ratio_to_all_gather": cycle_ratio(long, "all_gather"),
        "megabytes": rows,
        "timed": {key: getattr(args, key) for key in ("ranks", "frames", "tokens", "width")},
        "seconds": seconds,
    }
    print(json.dumps(result))
    if not match:
        raise SystemExit("counted bytes differ from the formula")


if __name__ == "__main__":
    main()
