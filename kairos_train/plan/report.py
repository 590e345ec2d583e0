"""What `kairos-train plan` shows: the numbers of a plan, and a table of them for people."""

from __future__ import annotations

from typing import Any

from kairos_train.basics.errors import UserError
from kairos_train.config.schema import Config
from kairos_train.plan.estimate import Plan
from kairos_train.plan.layout import SampleShape
from kairos_train.plan.search import SHOWN, Found, search

SECTIONS = (
    *("model", "kernels", "stage", "optimizer", "parallel", "precision", "cluster", "train"),
    *(f"data.window.{key}" for key in ("frames", "height", "width", "action_video_freq_ratio", "action_key", "layout")),
    "data.tokens_per_micro_batch",
)
"""What of a configuration a plan needs."""


def run(config: Config, *, gpus: int | None, searching: bool, context_tokens: int) -> tuple[dict[str, Any], str]:
    """Plan a configuration.

    Args:
        gpus: in all; None: as many as one sample takes.
        searching: find the cheapest layout for `gpus`.
        context_tokens: N text tokens of a sample.

    Returns:
        The numbers, and a table for people.

    Raises:
        UserError: the layout is not legal, or no layout fits.
    """
    sample = SampleShape.of(config, context_tokens)
    if not searching:
        plan = Plan.of(config, sample, gpus=gpus)
        return plan.numbers(), table(plan)
    if gpus is None:
        raise UserError("--search needs the number of GPUs; give --gpus N")
    found = search(config, sample, gpus=gpus)
    return found_numbers(found), found_table(found)


def found_numbers(found: Found) -> dict[str, Any]:
    """The best plan, and the next ones in short."""
    best = [
        {
            "overrides": plan.overrides(),
            "seconds_per_sample": plan.seconds_per_sample,
            "memory_gb": plan.memory.total / 1e9,
        }
        for plan in found.fitting[:SHOWN]
    ]
    counts = {"legal": found.legal, "fitting": len(found.fitting)}
    return found.best.numbers() | {"search": counts | {"best": best}}


def table(plan: Plan) -> str:
    """The plan for people."""
    numbers = plan.numbers()
    layout, sample, memory = numbers["layout"], numbers["sample"], numbers["memory_gb"]
    seconds, received, config = numbers["seconds"], numbers["bytes_per_step"], plan.layout.config
    rows = [
        f"{config.model.name} on {numbers['gpus']} × {numbers['cluster']}: tensor {layout['tensor']}"
        f"{' with sequence' if layout['sequence'] else ''} × context {layout['context']} × data {layout['data']}, "
        f"ZeRO {layout['zero_stage']}, {layout['precision']}, recompute {layout['recompute']}",
        f"sample          {sample['latent_frames']} latent frames of {sample['tokens_per_frame']:,} tokens = "
        f"{sample['video_tokens']:,}, context {sample['context_tokens']}, actions {sample['actions']}; "
        f"{numbers['samples_per_step']} samples a step",
        f"tokens per rank {_joined(numbers['tokens_per_rank'])} (frames {_joined(numbers['frames_per_rank'])})",
        "",
        f"memory per GPU  {memory['total']:8.2f} GB of {numbers['usable_memory_gb']:.1f} usable: "
        f"{'fits' if numbers['fits'] else 'does not fit'}",
        *(f"  {name:<13} {size:8.2f}" for name, size in memory.items() if name != "total"),
        "",
        f"FLOPs           {_si(numbers['flops_per_sample'])} per sample, {_si(numbers['flops_per_step'])} per step "
        f"({_si(numbers['hardware_flops_per_step'])} computed)",
        "bytes received  " + ", ".join(f"{group} {_si(size)}" for group, size in received.items()),
        f"seconds a step  {numbers['seconds_per_step']:.3g} = "
        + " + ".join(f"{part} {time:.3g}" for part, time in seconds.items()),
        f"                {numbers['samples_per_second']:.3g} samples/s, MFU {numbers['mfu']:.1%}",
        f"checkpoint      {numbers['checkpoint_gb']:.2f} GB",
        *(f"note: {note}" for note in numbers["notes"]),
    ]
    return "\n".join(rows)


def found_table(found: Found) -> str:
    """The best plan, and the next ones in a line each."""
    lines = [f"{len(found.fitting)} of {found.legal} legal layouts fit; the cheapest:"]
    for plan in found.fitting[:SHOWN]:
        lines.append(
            f"  {plan.seconds_per_sample:8.3f} s/sample {plan.memory.total / 1e9:7.1f} GB  {' '.join(plan.overrides())}"
        )
    return "\n".join([*lines, "", table(found.best)])


def _joined(counts: list[int]) -> str:
    """1, 2, 2, 2 → "1, 3 × 2"."""
    runs: list[tuple[int, int]] = []
    for count in counts:
        if runs and runs[-1][1] == count:
            runs[-1] = (runs[-1][0] + 1, count)
        else:
            runs.append((1, count))
    return ", ".join(f"{n} × {count:,}" if n > 1 else f"{count:,}" for n, count in runs)


def _si(value: float) -> str:
    """1.5e12 → "1.50 T"."""
    prefixes = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")]
    unit, prefix = next(((u, p) for u, p in prefixes if value >= u), (1.0, ""))
    return f"{value / unit:.{2 if prefix else 0}f} {prefix}".strip()
