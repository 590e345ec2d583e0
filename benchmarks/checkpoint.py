"""What checkpoints cost: the training loop, and beside a plain file write of the same bytes.

One process holds the state of a model with an average and two moments, all float32, and trains a small network beside
it on one thread. In every round, in changing order, each followed by a pause in which the disk comes to rest:

* plain: the bytes of the state into one file, in the order of the tensors, then fsync. Nothing else.
* written: `write_checkpoint` of the state: hashed, written, fsync, published.
* synchronous: `Saver.save` with `background=False`: copied, hashed, written, fsync, published. The loop stands still.
* asynchronous: the same behind the loop, which stands still for the copy to host memory and then goes on. What it loses
  in all is the time from the call to the published checkpoint, less what its steps in that time take when nothing is
  saved (measured right before and after): the copy, and whatever the writing thread takes from the loop's core, memory
  and interpreter, on a machine that has no core to spare.

`stall_ratio` is the time for which the loop stands still in the asynchronous save over that in the synchronous one,
`loss_ratio` the same with all that the loop loses, `write_ratio` the bytes per second of the written checkpoint over
those of the plain file; medians of the rounds' ratios. A save and a write that do not count come first, so that host
memory is there.

    python benchmarks/checkpoint.py [--rounds 7] [--gb 1.6] [--folder DIR] [--quick]

The last line is one JSON object: `stall_ratio`, `write_ratio`, `loss_ratio`, details.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from kairos_train.checkpoint.canonical import checkpoint_path
from kairos_train.checkpoint.saver import Saver
from kairos_train.checkpoint.writing import whole_pieces, write_checkpoint

WIDTH = 1024
SECTIONS = ("model", "ema", "exp_avg", "exp_avg_sq")
BASELINE_SECONDS = 1.5
"""Of steps without a save, before and after an asynchronous one."""


def make_state(gb: float) -> dict[str, dict[str, Tensor]]:
    """{section: {name: float32}}, layers of matrices and vectors, close to `gb` GB in all."""
    layer = {f"attention.{i}.weight": (WIDTH, WIDTH) for i in range(8)}
    layer |= {"ffn.0.weight": (4 * WIDTH, WIDTH), "ffn.2.weight": (WIDTH, 4 * WIDTH), "ffn.0.bias": (4 * WIDTH,)}
    layer |= {f"norm.{i}.weight": (WIDTH,) for i in range(12)}
    size = 4 * sum(torch.Size(shape).numel() for shape in layer.values())
    layers = max(1, round(gb * 1e9 / size / len(SECTIONS)))
    rng = torch.Generator().manual_seed(0)
    names = {f"blocks.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()}
    return {s: {name: torch.randn(shape, generator=rng) for name, shape in names.items()} for s in SECTIONS}


class Loop:
    """A training loop: forward, backward, AdamW, a loss that is read; on one thread."""

    def __init__(self, state: dict[str, dict[str, Tensor]]) -> None:
        torch.manual_seed(0)
        layers = [layer for _ in range(4) for layer in (nn.Linear(384, 384), nn.GELU())]
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.inputs = torch.randn(96, 384)
        self.changing = state["model"]["blocks.0.attention.0.weight"]

    def step(self) -> float:
        """One step; it also changes what is being saved."""
        self.optimizer.zero_grad()
        loss = self.model(self.inputs).square().mean()
        loss.backward()
        self.optimizer.step()
        self.changing.mul_(0.999)
        return loss.item()

    def seconds_per_step(self) -> float:
        """Of undisturbed steps."""
        begin, steps = time.perf_counter(), 0
        while time.perf_counter() - begin < BASELINE_SECONDS:
            self.step()
            steps += 1
        return (time.perf_counter() - begin) / steps


class Bench:
    """The three ways to get a state onto a disk."""

    def __init__(self, folder: Path, gb: float) -> None:
        self.state = make_state(gb)
        self.bytes = sum(tensor.nbytes for section in self.state.values() for tensor in section.values())
        self.loop = Loop(self.state)
        self.folder, self.step = folder, 0
        self.published = threading.Event()
        self.saver = Saver(folder / "checkpoints", rank=0, size=1, published=self.published.set)

    def plain(self) -> float:
        """Seconds to write the bytes into one file and see them on the disk."""
        path = self.folder / "plain"
        self._rest()
        begin = time.perf_counter()
        with open(path, "wb", buffering=0) as file:
            for section in self.state.values():
                for tensor in section.values():
                    left = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
                    while left:
                        left = left[file.write(left) :]
            os.fsync(file.fileno())
        seconds = time.perf_counter() - begin
        path.unlink()
        return seconds

    def written(self) -> float:
        """Seconds to write them as a checkpoint."""
        self.step += 1
        self._rest()
        begin = time.perf_counter()
        write_checkpoint(self.folder / "checkpoints", self.step, sections=self.state, state={}, files={})
        seconds = time.perf_counter() - begin
        self._remove()
        return seconds

    def synchronous(self) -> float:
        """Seconds for which the loop stands still."""
        self._rest()
        seconds = self._save(background=False)
        self._remove()
        return seconds

    def asynchronous(self) -> tuple[float, float]:
        """Seconds that the loop loses in all, and in the call alone."""
        self._rest()
        before = self.loop.seconds_per_step()
        begin = time.perf_counter()
        called = self._save(background=True)
        steps = 0
        while not self.published.is_set() and not self.saver.failed:
            self.loop.step()
            steps += 1
        elapsed = time.perf_counter() - begin
        baseline = (before + self.loop.seconds_per_step()) / 2
        self._remove()
        return elapsed - steps * baseline, called

    def _save(self, *, background: bool) -> float:
        """Seconds of the call."""
        self.step += 1
        self.published.clear()
        self.saver.background = background
        sections = {name: whole_pieces(tensors) for name, tensors in self.state.items()}
        begin = time.perf_counter()
        self.saver.save(self.step, sections, own_state={}, state={}, files={})
        return time.perf_counter() - begin

    def _remove(self) -> None:
        if problem := self.saver.settle():
            raise OSError(problem)
        shutil.rmtree(checkpoint_path(self.folder / "checkpoints", self.step))

    def _rest(self) -> None:
        """What was removed or written before is not to be paid for now."""
        os.sync()
        time.sleep(0.2)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gb", type=float, default=1.6, help="size of the state")
    parser.add_argument("--folder", type=Path, help="on the disk that counts; a temporary folder by default")
    parser.add_argument("--quick", action="store_true", help="0.55 GB, three rounds, under 50 s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds, gb = (3, 0.55) if args.quick else (args.rounds, args.gb)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        bench = Bench(Path(name), gb)
        machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        print(f"{machine}; torch {torch.__version__}; {bench.bytes / 1e9:.2f} GB in {name}; {rounds} rounds")
        bench.plain(), bench.synchronous()
        results = []
        for number in range(rounds):
            ways = (bench.plain, bench.written, bench.synchronous, bench.asynchronous)
            found = {way.__name__: way() for way in (ways if number % 2 == 0 else reversed(ways))}
            plain, written, synchronous, (lost, called) = (found[way.__name__] for way in ways)
            results.append((plain, synchronous, lost, called, written))
            print(
                f"round {number + 1}: plain {plain:.2f} s, written {written:.2f} s; synchronous {synchronous:.2f} s, "
                f"the loop loses {lost:.2f} s by asynchronous, of it {called:.2f} s in the call"
            )
    columns = list(zip(*results))
    result = {
        "machine": machine,
        "gb": round(bench.bytes / 1e9, 3),
        "plain_gb_per_s": round(bench.bytes / 1e9 / statistics.median(columns[0]), 3),
        "written_gb_per_s": round(bench.bytes / 1e9 / statistics.median(columns[4]), 3),
        "synchronous_seconds": round(statistics.median(columns[1]), 3),
        "lost_seconds": round(statistics.median(columns[2]), 3),
        "stall_seconds": round(statistics.median(columns[3]), 3),
        "stall_ratio": round(statistics.median(called / sync for _, sync, _, called, _ in results), 3),
        "loss_ratio": round(statistics.median(lost / sync for _, sync, lost, *_ in results), 3),
        "write_ratio": round(statistics.median(plain / written for plain, *_, written in results), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
