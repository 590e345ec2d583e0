"""One plan: everything that is known of a layout, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kairos_train.config.schema import Config
from kairos_train.plan.activations import activations
from kairos_train.plan.cost import Cost, cost
from kairos_train.plan.layout import Layout, SampleShape
from kairos_train.plan.memory import Memory, busiest

GB = 1e9

HEADROOM = 0.1
"""Share of a GPU's memory left to the CUDA context, communication libraries, workspaces and fragmentation (*ours*)."""


@dataclass(frozen=True)
class Plan:
    """A layout, its memory on the rank that holds most, and what a step costs."""

    layout: Layout
    memory: Memory
    cost: Cost

    @classmethod
    def of(cls, config: Config, sample: SampleShape, *, gpus: int | None) -> Plan:
        """Plan `config` for samples like this one, on as many GPUs as one sample takes when `gpus` is None.

        Raises:
            UserError: the layout is not legal.
        """
        gpus = config.parallel.tensor * config.parallel.context if gpus is None else gpus
        layout = Layout.of(config, sample, gpus=gpus)
        return cls(layout, busiest(layout), cost(layout))

    @property
    def room(self) -> float:
        """Bytes of a GPU that may be used."""
        return (1 - HEADROOM) * self.layout.config.cluster.memory_gb * GB

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.room

    @property
    def seconds_per_sample(self) -> float:
        return self.cost.seconds / self.layout.samples_per_step

    def overrides(self) -> list[str]:
        """What to write behind `train` for this layout."""
        parallel, train = self.layout.config.parallel, self.layout.config.train
        return [
            f"parallel.tensor={parallel.tensor}",
            f"parallel.sequence={str(parallel.sequence).lower()}",
            f"parallel.context={parallel.context}",
            f"train.zero_stage={train.zero_stage}",
            f"train.recompute={train.recompute}",
        ]

    def numbers(self) -> dict[str, Any]:
        """The plan as JSON has it. GB are 10⁹ bytes; memory and bytes are those of one GPU, the busiest one."""
        layout, cost = self.layout, self.cost
        config, degrees, sample = layout.config, layout.degrees, layout.sample
        cluster = config.cluster
        numbers = layout.parameters
        return {
            "legal": True,
            "fits": self.fits,
            "cluster": cluster.name,
            "gpus": degrees.size,
            "layout": {"tensor": degrees.tensor, "context": degrees.context, "data": degrees.data}
            | {"sequence": config.parallel.sequence, "zero_stage": config.train.zero_stage}
            | {"recompute": config.train.recompute, "precision": config.train.precision},
            "overrides": self.overrides(),
            "sample": {"latent_frames": sample.frames, "tokens_per_frame": sample.tokens}
            | {"video_tokens": sample.video_tokens, "context_tokens": sample.context}
            | {"actions": sample.actions, "history_frames": sample.history},
            "samples_per_step": layout.samples_per_step,
            "frames_per_rank": list(layout.frames_per_rank),
            "tokens_per_rank": list(layout.tokens_per_rank),
            "frame_layout": {kind: plan.layout for kind, plan in layout.frame_plans.items()},
            "parameters": numbers.whole_trained + numbers.whole_frozen,
            "memory_gb": {name: size / GB for name, size in self.memory.categories().items()}
            | {"total": self.memory.total / GB},
            "usable_memory_gb": self.room / GB,
            "host_activations_gb": max(activations(layout, r).host for r in range(degrees.context)) / GB,
            "flops_per_sample": sample.flops,
            "flops_per_step": cost.flops,
            "hardware_flops_per_step": cost.hardware_flops,
            "bytes_per_step": cost.received.by_group,
            "seconds": {"compute": cost.compute, "tensor": cost.tensor, "context": cost.context, "data": cost.data},
            "seconds_per_step": cost.seconds,
            "samples_per_second": layout.samples_per_step / cost.seconds,
            "mfu": cost.flops / (cost.seconds * degrees.size * cluster.peak_tflops * 1e12),
            # Float32 masters, two moments and the average; frozen weights have no moments.
            "checkpoint_gb": (16 * numbers.whole_trained + 8 * numbers.whole_frozen) / GB,
            "notes": _notes(self),
        }


def _notes(plan: Plan) -> list[str]:
    """What a reader should know of these numbers."""
    layout, notes = plan.layout, []
    train, stage = layout.config.train, layout.config.stage
    if not plan.fits:
        notes.append(
            f"{plan.memory.total / GB:.1f} GB do not fit into {plan.room / GB:.1f} GB of a GPU "
            f"({HEADROOM:.0%} of {layout.config.cluster.memory_gb:g} GB are left free): more parallel.context, "
            "train.recompute, a higher train.zero_stage or fewer samples per micro-batch"
        )
    if stage.streams == "joint" and not layout.sample.actions:
        notes.append(
            f"stage={stage.name} holds the action stream, which has one dummy token to compute as this data has no "
            "actions; stage=physical leaves it out"
        )
    if layout.degrees.context > layout.sample.frames:
        notes.append(
            f"{layout.degrees.context - layout.sample.frames} of {layout.degrees.context} context ranks hold no frame "
            f"of a sample of {layout.sample.frames} latent frames"
        )
    if layout.parameters.frozen:
        notes.append("frozen weights are planned with the FLOPs and activations of trained ones")
    if layout.config.precision.fp8.recipe is not None:
        notes.append("FP8 is planned with the time and memory of bf16")
    if train.offload_activations:
        notes.append("the way of activations to host memory and back is not in the time")
    return notes
