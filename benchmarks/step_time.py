"""Training step time of the video stream against the number of latent frames, beside full attention.

Both models are measured in one run, interleaved: the configured one (hybrid linear temporal attention) and the same
with every layer FA. A step is forward, backward and AdamW on one sample. Printed: medians, the straight line through
the hybrid's times with its R², and the number of frames from which the hybrid is the faster one.

    python benchmarks/step_time.py [model=tiny KEY=VALUE ...] [--tokens 64] [--repeats 7] [--context N] [--quick]

The last line is one JSON object: machine, seconds per size of both, `slope`, `intercept`, `r2`, `crossover_frames`.

With --context N instead: the hybrid on N context ranks beside one process, each with one thread or GPU; the JSON object
has `context`, `seconds_one`, `seconds_context` and `speedup` at the largest size.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch
import torch.multiprocessing as mp
from context_scaling import scaling

from kairos_train.config.compose import load_config
from kairos_train.config.schema import Config, KernelsConfig, ModelConfig
from kairos_train.model import WorldActionModel

FRAMES = (8, 16, 24, 32, 48, 64)
"""From 8 on: below, the dilated window does not reach as far as it could, and the cost is not yet on its line."""


def keep_freed_memory() -> None:
    """Tell glibc not to hand freed memory back to the kernel: its page faults would be timed with the larger sizes."""
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3
        for option in (trim_threshold, mmap_threshold):
            libc.mallopt(option, 2**31 - 1)


class Subject:
    """One model and its optimiser."""

    def __init__(self, config: ModelConfig, kernels: KernelsConfig, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = WorldActionModel(config, kernels).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.config, self.device = config, device

    def step(self, latents: torch.Tensor) -> float:
        """Seconds of one training step."""
        context = torch.zeros(1, 16, self.config.text_dim, device=self.device)
        timestep = torch.full((1,), 500.0, device=self.device)
        self._wait()
        begin = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        video, _ = self.model(latents, context, None, timestep, [1])
        video.pow(2).mean().backward()
        self.optimizer.step()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(subjects: dict[str, Subject], frames: tuple[int, ...], tokens: int, repeats: int) -> dict[str, list[float]]:
    """Median seconds per size of each subject; sizes and subjects interleaved so that drift hits all alike."""
    side = int(tokens**0.5)
    if side * side != tokens:
        raise SystemExit(f"--tokens {tokens}: must be a square number")
    times: dict[str, list[list[float]]] = {name: [[] for _ in frames] for name in subjects}
    for repeat in range(repeats + 1):
        for i, count in enumerate(frames):
            for name, subject in subjects.items():
                if name == "full" and repeat > repeats // 2:
                    continue  # its median decides the crossover only; the line through the hybrid wants more
                channels = subject.config.video.latent_channels
                seconds = subject.step(torch.randn(1, channels, count, 2 * side, 2 * side, device=subject.device))
                if repeat:  # the first round warms up
                    times[name][i].append(seconds)
    return {name: [statistics.median(t) for t in values] for name, values in times.items()}


def fit_line(x: tuple[int, ...], y: list[float]) -> tuple[float, float, float]:
    """Least squares: slope, intercept, R²."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.asarray(y) - (slope * np.asarray(x) + intercept)
    return float(slope), float(intercept), float(1 - residual.var() / np.asarray(y).var())


def crossover(frames: tuple[int, ...], hybrid: list[float], full: list[float]) -> float | None:
    """Frames from which the hybrid is faster at every larger size, interpolated; None when it never is."""
    gain = [f - h for h, f in zip(hybrid, full, strict=True)]
    if gain[-1] <= 0:
        return None
    last_loss = max((i for i, g in enumerate(gain) if g <= 0), default=None)
    if last_loss is None:
        return float(frames[0])
    a, b = last_loss, last_loss + 1
    return frames[a] + (frames[b] - frames[a]) * -gain[a] / (gain[b] - gain[a])


def report_context(config: Config, ranks: int, tokens: int, repeats: int) -> None:
    """Measure and print what --context asks for."""
    side = int(tokens**0.5)
    queue = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="step-time-") as folder:
        arguments = (ranks, f"{folder}/store", config, FRAMES, side, repeats, queue)
        processes = mp.spawn(scaling, arguments, nprocs=ranks, join=False)
        times = queue.get()
        processes.join()
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}; torch {torch.__version__}, one thread or GPU per process; model {config.model.name}")
    print(f"{tokens} tokens per frame, forward + backward + AdamW, medians in ms")
    print(f"frames  1 process  {ranks} context ranks  speed-up")
    for count, one, shared in zip(FRAMES, times["one"], times["context"], strict=True):
        print(f"{count:6d} {1e3 * one:10.1f} {1e3 * shared:16.1f} {one / shared:9.2f}")
    result = {
        "machine": machine,
        "context": ranks,
        "frames": list(FRAMES),
        "seconds_one": times["one"],
        "seconds_context": times["context"],
        "speedup": times["one"][-1] / times["context"][-1],
    }
    print(json.dumps(result))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="model=tiny by default")
    parser.add_argument("--tokens", type=int, default=64, help="per latent frame, a square number")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument(
        "--context", type=int, default=None, metavar="N", help="compare N context ranks with one process"
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats, under 50 s")
    args = parser.parse_args()
    keep_freed_memory()

    config = load_config(["encoders=weight_free", "model=tiny", *args.overrides], sections=("model", "kernels"))
    model = replace(config.model, action=None)
    if args.context:
        video = replace(config, model=model, stage=replace(config.stage, streams="video"))
        report_context(video, args.context, args.tokens, 3 if args.quick else 7)
        return
    full = replace(model, video=replace(model.video, layer_cycle=["FA"] * len(model.video.layer_cycle)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subjects = {"hybrid": Subject(model, config.kernels, device), "full": Subject(full, config.kernels, device)}
    times = measure(subjects, FRAMES, args.tokens, 11 if args.quick else args.repeats)
    slope, intercept, r2 = fit_line(FRAMES, times["hybrid"])
    crossing = crossover(FRAMES, times["hybrid"], times["full"])

    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}; torch {torch.__version__}, {torch.get_num_threads()} threads; model {model.name}")
    print(f"{args.tokens} tokens per frame, forward + backward + AdamW, medians in ms")
    print("frames   hybrid     full   full/hybrid")
    for count, hybrid, whole in zip(FRAMES, times["hybrid"], times["full"], strict=True):
        print(f"{count:6d} {1e3 * hybrid:8.1f} {1e3 * whole:8.1f} {whole / hybrid:8.2f}")
    print(f"line: {1e3 * slope:.3f} ms per frame + {1e3 * intercept:.2f} ms, R² = {r2:.5f}")
    print("the hybrid never beats full attention here" if crossing is None else f"faster from {crossing:.1f} frames on")
    result = {
        "machine": machine,
        "model": model.name,
        "tokens_per_frame": args.tokens,
        "frames": list(FRAMES),
        "hybrid_seconds": times["hybrid"],
        "full_seconds": times["full"],
        "slope": slope,
        "intercept": intercept,
        "r2": r2,
        "crossover_frames": crossing,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
