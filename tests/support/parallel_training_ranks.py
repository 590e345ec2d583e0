"""Ranks of the training comparisons: a few optimiser steps, in a layout or as the one process that it is held to."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from kairos_train.config.compose import load_config
from kairos_train.config.schema import Config
from kairos_train.model.kernels.attention import KeyValue
from kairos_train.model.layout import empty_model
from kairos_train.training.engine import deepspeed_engine
from kairos_train.training.engine.deepspeed_internals import hooked_tensors
from kairos_train.training.parity.compare import Trace, exact_config, reference_config, run_steps
from parallel.topology import Degrees, Topology

BUCKET = 15_000
"""Numbers: gradients go in several buckets while backward runs, as those of a large model do."""

SIZES = (
    "model.num_layers=3 model.video.layer_cycle=[SWA,DSWA,GATED] model.num_heads=4 model.text_dim=12 "
    "model.freq_dim=16 encoders.text.text_dim=12 "
    "model.video.dim=24 model.video.ffn_dim=32 model.video.gdn_key_dim=6 model.video.gdn_value_dim=8 "
    "model.video.dilation=2 model.action.dim=16 model.action.ffn_dim=24 model.action.action_dim=3 "
    "model.action.state_dim=5 data.window.frames=17 data.window.height=32 data.window.width=32 "
    "data.window.action_video_freq_ratio=1 train.micro_batch=2 train.accumulation=2 train.precision=fp32 "
    "train.device=cpu optimizer.warmup_steps=1 optimizer.lr=1e-3 optimizer.gradient_clip=0.1"
)
"""A model of all kinds of layers; 5 latent frames, which 2 and 4 context ranks share unevenly; clipping is active."""


def make_config(overrides: str) -> Config:
    video = ["stage=physical", "stage.conditions={t2v: 0.4, ti2v: 0.6}"] if "streams=video" in overrides else []
    words = ["experiment=demo", *video, *SIZES.split(), *overrides.replace("streams=video", "").split()]
    return load_config(words, sections=("model", "stage", "optimizer", "parallel", "precision", "train"))


@cache
def topology(tensor: int, context: int) -> Topology:
    return Topology.build(Degrees(tensor, context, dist.get_world_size() // tensor // context), torch.device("cpu"))


def train_layout(overrides: str, out: str, steps: int) -> None:
    config = make_config(overrides)
    with patch.object(deepspeed_engine, "LARGEST_BUCKET", BUCKET):
        trace = run_steps(config, steps, topology(config.parallel.tensor, config.parallel.context))
    if trace is not None:
        trace.save(Path(out))


def train_reference(overrides: str, ranks: int, out: str, steps: int, exact: bool = False) -> None:
    alone = exact_config if exact else reference_config
    trace = run_steps(alone(make_config(overrides), ranks), steps, topology(1, 1))
    assert isinstance(trace, Trace)
    trace.save(Path(out))


def tensors_hooked_in_a_block() -> tuple[int, int]:
    """How many tensors ZeRO 3 hooks in what a windowed block returns, and would with keys and values in a tuple."""
    model = empty_model(make_config(""), topology(1, 1)).to_empty(device="cpu")
    seen: list[tuple[Tensor, KeyValue]] = []
    model.video_dit.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        latents, context, time = torch.zeros(1, 16, 3, 4, 4), torch.zeros(1, 2, 12), torch.zeros(1)
        model.eval()(latents, context, None, time, (1,))
    x, kv = seen[0]
    return len(hooked_tensors((x, kv))), len(hooked_tensors((x, (kv.k, kv.v))))
