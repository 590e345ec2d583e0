"""Latency of a chunk: mode action with its history cache beside the video stream at every step; long rollouts.

Three modes on one model of random weights, one sample, interleaved; medians. `joint` runs the video stream at every
denoising step, `action` once on the history, `video` without the action stream (left out with --quick); none is guided.
Beside them the FLOPs of each by `kairos_train.model.flops`: model FLOPs, in which every pass counts in full. Mode
action computes the keys of the text once per chunk instead of at every step, and no layer after the last that gives
keys: what it executes is counted apart (`executed`). Printed, too: how far the actions of joint and action are apart.

Then --chunks chunks of video that go on from each other, with a sliding history and with a carried one: seconds of each
chunk, and the median of the last third over that of the first (the very first one, which warms up, left out).

    python benchmarks/latency.py [model=small KEY=VALUE ...] [--tokens 196] [--steps 10] [--repeats 3] [--quick]

One thread unless --threads says otherwise; seconds are then processor time. The last line is one JSON object: machine,
seconds and FLOPs of each mode, `speedup` (joint over action), `flop_ratio`, `speedup_over_flop_ratio`,
`speedup_over_executed_flop_ratio`, `actions_apart`, `long_rollout_last_over_first` (sliding) and
`carried_rollout_last_over_first`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from kairos_train.config.compose import load_config
from kairos_train.config.schema import Config, ModelConfig
from kairos_train.inference.rollout import ChunkSize, SlidingHistory, StreamingHistory, chunk_seed
from kairos_train.inference.sampler import Conditions, SampledOutput, SamplerConfig, sample
from kairos_train.model import WorldActionModel
from kairos_train.model.flops import action_context_flops, forward_flops
from kairos_train.model.streams import layer_kinds

FRAMES, HISTORY, ACTIONS, CONTEXT = 3, 1, 32, 32
"""Latent frames, given ones, actions (the recipe's window of 9 video frames, 4 raw frames apart) and text tokens."""

QUICK_SECONDS = 15
"""After so long --quick begins no other round of the modes."""


def build(config: ModelConfig, kernels: object, device: torch.device) -> WorldActionModel:
    """A model of random weights, heads and gates included: they start at zero, and zeros would agree too easily."""
    torch.manual_seed(0)
    model = WorldActionModel(config, kernels).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return model.to(device)


def make_conditions(config: ModelConfig, side: int, device: torch.device) -> Conditions:
    """One sample's prompt, state and first frame; `side` of the latent picture."""
    rng = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng).to(device)

    return Conditions(
        context=draw(1, CONTEXT, config.text_dim),
        context_mask=torch.ones(1, CONTEXT, dtype=torch.bool, device=device),
        history=draw(1, config.video.latent_channels, HISTORY, side, side),
        state=draw(1, 1, config.action.state_dim),
    )


def timed(run: Callable[[], SampledOutput], device: torch.device) -> float:
    """Seconds of one call. With one thread of a CPU they are seconds of that thread, so that the waiting for other
    programs does not count."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def chunk_flops(config: ModelConfig, tokens: int, steps: int) -> dict[str, float]:
    """FLOPs of one chunk in each mode; the state token is one more of the context."""
    whole = forward_flops(config, FRAMES, tokens, CONTEXT, actions=ACTIONS, history=HISTORY)
    video = forward_flops(config, FRAMES, tokens, CONTEXT + 1, history=HISTORY)
    given = forward_flops(config, HISTORY, tokens, CONTEXT + 1, history=HISTORY)
    joint = max(i for i, kind in enumerate(layer_kinds(config)) if kind != "GATED") + 1
    skipped = given - forward_flops(replace(config, num_layers=joint), HISTORY, tokens, CONTEXT + 1, history=HISTORY)
    saved = (steps - 1) * action_context_flops(config, CONTEXT) + skipped
    flops = {"joint": steps * whole, "video": steps * video, "action": given + steps * (whole - video)}
    return flops | {"action_executed": flops["action"] - saved}


def long_rollout(way: type, model: WorldActionModel, given: Conditions, steps: int, chunks: int) -> list[float]:
    """Seconds of each chunk, sampling and taking it in."""
    side, device = given.history.shape[-1], given.context.device
    memory = way(model, SamplerConfig(steps=steps, guidance=1.0), ChunkSize(FRAMES, HISTORY))
    memory.observe(given.history, given)

    def advance(number: int) -> SampledOutput:
        sampled = memory.sample(given, mode="video", seeds=[chunk_seed(0, number)], size=(side, side))
        memory.observe(sampled.latents, given)
        return sampled

    return [timed(partial(advance, number), device) for number in range(chunks)]


def growth(seconds: list[float]) -> float:
    """Median of the last third over that of the first; the first chunk warms up."""
    rest = seconds[1:]
    part = max(len(rest) // 3, 1)
    return statistics.median(rest[-part:]) / statistics.median(rest[:part])


def measure(config: Config, args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """All numbers of the JSON object but the machine."""
    side = 2 * int(args.tokens**0.5)
    model = build(config.model, config.kernels, device)
    given = make_conditions(config.model, side, device)
    settings = SamplerConfig(steps=args.steps, guidance=1.0)
    shape = {"latent_shape": (FRAMES, side, side), "horizon": ACTIONS}
    modes = ("joint", "action") if args.quick else ("joint", "video", "action")

    def run(mode: str, steps: int = args.steps) -> SampledOutput:
        return sample(model, given, mode=mode, config=replace(settings, steps=steps), seeds=[0], **shape)

    apart = (run("joint", 2).actions - run("action", 2).actions).abs().max()  # warms up, too
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    begin = time.perf_counter()
    for _ in range(args.repeats):
        if args.quick and time.perf_counter() - begin > QUICK_SECONDS:
            break
        for mode in modes:
            # The quick ones more often: what else the machine does weighs more on them.
            times[mode] += [timed(partial(run, mode), device) for _ in range(3 if mode == "action" else 1)]
    seconds = {mode: statistics.median(values) for mode, values in times.items()}
    flops = chunk_flops(config.model, args.tokens, args.steps)

    small = replace(given, history=given.history[..., : args.long_side, : args.long_side])
    causal = replace(config.model, video=replace(config.model.video, history_causal=True))
    carrying = WorldActionModel(causal, config.kernels).eval().requires_grad_(False).to(device)
    carrying.load_state_dict(model.state_dict())
    walks = {
        "sliding": long_rollout(SlidingHistory, model, small, args.long_steps, args.chunks),
        "carried": long_rollout(StreamingHistory, carrying, small, args.long_steps, args.chunks),
    }
    speedup, ratio = seconds["joint"] / seconds["action"], flops["joint"] / flops["action"]
    executed = flops["joint"] / flops["action_executed"]
    return {
        "rounds": len(times["joint"]),
        "seconds": seconds,
        "flops": flops,
        "speedup": speedup,
        "flop_ratio": ratio,
        "speedup_over_flop_ratio": speedup / ratio,
        "speedup_over_executed_flop_ratio": speedup / executed,
        "actions_apart": float(apart),
        "rollout_seconds": walks,
        "long_rollout_last_over_first": growth(walks["sliding"]),
        "carried_rollout_last_over_first": growth(walks["carried"]),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="model=small by default")
    parser.add_argument("--tokens", type=int, default=None, help="per latent frame, a square number; 196, quick: 100")
    parser.add_argument("--steps", type=int, default=10, help="of the sampler")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of the modes")
    parser.add_argument("--chunks", type=int, default=22, help="of the long rollouts")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and shorter rollouts, under 50 s")
    args = parser.parse_args()
    args.tokens = args.tokens or (100 if args.quick else 196)
    if int(args.tokens**0.5) ** 2 != args.tokens:
        raise SystemExit(f"--tokens {args.tokens}: must be a square number")
    args.long_side, args.long_steps = 16, 2
    if args.quick:
        args.repeats, args.long_side, args.long_steps = 2, 4, 1
    torch.set_num_threads(args.threads)
    overrides = ["encoders=weight_free", "model=small", "model.action.action_dim=14", "model.action.state_dim=14"]
    config = load_config([*overrides, *args.overrides], sections=("model", "kernels"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = measure(config, args, device)

    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}; torch {torch.__version__}, {torch.get_num_threads()} threads; model {config.model.name}")
    print(
        f"{FRAMES} latent frames ({HISTORY} given) of {args.tokens} tokens, {ACTIONS} actions, {CONTEXT} text tokens, "
        f"{args.steps} steps; medians of {result['rounds']}"
    )
    print("mode       s per chunk    GFLOP   GFLOP/s")
    for mode, seconds in result["seconds"].items():
        flops = result["flops"][mode] / 1e9
        print(f"{mode:10}{seconds:12.3f}{flops:9.1f}{flops / seconds:10.1f}")
    print(
        f"action is {result['speedup']:.2f} times as fast as joint, with {result['flop_ratio']:.2f} times fewer FLOPs "
        f"(quotient {result['speedup_over_flop_ratio']:.2f}, of executed ones "
        f"{result['speedup_over_executed_flop_ratio']:.2f}); their actions are {result['actions_apart']:.1e} apart"
    )
    for name, key in (("sliding", "long_rollout_last_over_first"), ("carried", "carried_rollout_last_over_first")):
        walk = result["rollout_seconds"][name]
        print(
            f"{len(walk)} chunks of video, {args.long_steps} steps, {(args.long_side // 2) ** 2} tokens per frame, "
            f"{name} history: median {statistics.median(walk):.3f} s, last over first {result[key]:.3f}"
        )
    print(json.dumps({"machine": machine, "model": config.model.name, **result}))


if __name__ == "__main__":
    main()
