"""`kairos_config.py`: the configuration file that the public inference code loads an export with.

The public code reads Python files. This one is plain Python without any package, so that importing it is all it takes;
the paths of the weights stand at its top and are what is edited. What the public code takes from the environment,
whether its VLM is shown the image and the system message, the file sets there.
"""

from __future__ import annotations

import pprint
from collections.abc import Mapping
from typing import Any

from kairos_train.config.schema import TextEncoderConfig
from kairos_train.objective import schedule

CONFIG_FILE = "kairos_config.py"
TEXT_ENCODERS = {
    2048: ("Qwen3_5_TextEncoder", "models/Qwen/Qwen3.5-2B"),
    3584: ("QwenVLTextEncoder", "models/Qwen/Qwen2.5-VL-7B-Instruct"),
}
"""Width of the context -> class of the public code, and where its documentation puts the weights."""

SCHEDULER = {
    **{"type": "FlowMatchScheduler", "shift": 5, "sigma_min": 0.0, "extra_one_step": True},
    **{"exponential_shift": True, "exponential_shift_mu": 1.609},
}
DISTILLED_SCHEDULER = {**SCHEDULER, "type": "DMDFlowMatchScheduler", "exponential_shift": False}


class _Name:
    """A variable of the file, where a value would stand."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def public_pipeline(
    network: Mapping[str, Any], *, weights: str, text: TextEncoderConfig, sampler: Mapping[str, Any]
) -> str:
    """Content of `kairos_config.py`.

    Args:
        network: `dit_config` of the weights.
        weights: name of their file. Of the video alone it has bare keys, which `pretrained_path` of the network takes;
            of both streams the wrapper's, which the pipeline loads strictly.
        text: the encoder of their contexts.
        sampler: content of sampler.json.
    """
    alone, distilled = "action_dit" not in network, sampler["schedule"] == "distilled"
    video = {**network["video_dit"], **({"pretrained_path": _Name("pretrained_dit")} if alone else {})}
    encoder, folder = TEXT_ENCODERS.get(text.text_dim, (None, None)) if text.kind == "qwen" else (None, None)
    paths = {"pretrained_dit": weights, "vae_path": "models/Wan-AI/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth"}
    paths |= {"text_encoder_path": folder, "prompt_rewriter_path": "models/Qwen/Qwen3-VL-8B-Instruct"}
    values = {
        "pipeline_type": "KairosEmbodiedWAMPipeline",
        "load_dit_fn": "strict_load",
        "vae": {"type": "WanVideoVAE", "path": _Name("vae_path")},
        "text_encoder_config": encoder and {"type": encoder, "from_pretrained": _Name("text_encoder_path")},
        "scheduler": DISTILLED_SCHEDULER if distilled else SCHEDULER,
        **({"selected_sampling_time": [int(time) for time in schedule.DISTILLED_TIMES]} if distilled else {}),
        "sampling": {
            "num_inference_steps": sampler["steps"],
            "cfg_scale": sampler["guidance"],
            "negative_prompt": sampler["negative_prompt"] or "",
        },
        "dit_config": {**network, "video_dit": video},
        "pipeline": {
            "type": "KairosEmbodiedAPI",
            **({} if alone else {"pretrained_dit": _Name("pretrained_dit")}),
            "use_cfg_parallel": False,
            "pipeline_type": _Name("pipeline_type"),
            "pipeline_args": {
                name: _Name(name) for name in ("load_dit_fn", "vae_path", "text_encoder_config", "dit_config")
            },
        },
    }
    return "\n".join(
        [
            *_head(distilled=distilled, known=encoder is not None),
            *(f"{name} = {value!r}" for name, value in paths.items()),
            "",
            *_environment(text),
            "",
            *(
                f"{name} = {pprint.pformat(value, width=110, compact=True, sort_dicts=False)}"
                for name, value in values.items()
            ),
            "",
        ]
    )


DISTILLED = """
These weights are distilled to the times of `selected_sampling_time`. The pipeline below constructs and loads their
network, and samples with many steps; the public code has the distilled sampler in KairosEmbodiedPipeline_DMD alone,
which takes this file of weights under its own configuration."""

NO_ENCODER = """
They were trained on contexts that no text encoder of the public code gives: text_encoder_config is None."""


def _head(*, distilled: bool, known: bool) -> list[str]:
    """The docstring of the file."""
    return [
        '"""Configuration of the public Kairos inference code for the weights beside it. Written by kairos-train.',
        "",
        "Only the paths below need to be edited.",
        *([DISTILLED] if distilled else []),
        *([] if known else [NO_ENCODER]),
        '"""',
        "",
    ]


def _environment(text: TextEncoderConfig) -> list[str]:
    """What the text encoders of the public code read when they are constructed."""
    flags = {"QW_DROP_IMG_IN_VLM": text.image, "QW_RM_SYS_PROMPT_IN_VLM": text.system_message}
    # An import statement would make mmengine read the file in another way, in which nothing can be assigned.
    return [
        "# 1: the VLM is shown no image; no system message.",
        f'__import__("os").environ.update({ {name: str(int(not shown)) for name, shown in flags.items()} })',
    ]
