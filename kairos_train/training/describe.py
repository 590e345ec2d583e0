"""What a configuration means for training, before anything is loaded: model of the stage, shapes, FLOPs."""

from __future__ import annotations

import torch

from kairos_train.config.schema import KernelsConfig, ModelConfig, StageConfig, TrainConfig
from kairos_train.model.flops import training_flops
from kairos_train.model.kernels import attention, delta_rule
from kairos_train.objective.flow_matching import HISTORY_CONDITIONS

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}
"""Dense bf16 peaks that the vendor states, by a part of the device's name."""


def chosen_kernels(kernels: KernelsConfig, device: torch.device, *, precision: str) -> dict[str, str]:
    """What `kernels` comes to on a device: {"attention": …, "gated_delta": …}. Logged once and kept in checkpoints.

    Args:
        precision: `train.precision`.

    Raises:
        UserError: a backend that is asked for, or due, cannot run there.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return {
        "attention": attention.select_backend(kernels.attention, device),
        "gated_delta": delta_rule.select_backend(kernels.gated_delta, device, dtype),
    }


def sample_flops(
    model: ModelConfig, stage: StageConfig, latents: torch.Size, *, context_tokens: int, actions: int
) -> float:
    """Model FLOPs of one sample's forward and backward (3 × forward, `kairos_train.model.flops`).

    Args:
        latents: (C, F, H, W).
        context_tokens: N, padding included.
        actions: A; 0 in a video stage.
    """
    _, patch_height, patch_width = model.video.patch_size
    given = any(stage.conditions.get(name, 0) > 0 for name in HISTORY_CONDITIONS)
    return training_flops(
        model,
        latents[1],
        (latents[2] // patch_height) * (latents[3] // patch_width),
        context_tokens,
        actions=actions,
        history=stage.history_frames if given else 0,
    )


def peak_flops(train: TrainConfig, device: torch.device) -> float | None:
    """Peak FLOPs per second of one device for MFU: `train.peak_tflops`, or the table's; None when unknown."""
    if train.peak_tflops is not None:
        return train.peak_tflops * 1e12
    if device.type == "cuda" and train.precision == "bf16":
        name = torch.cuda.get_device_name(device)
        return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)
    return None
