"""Ranks of the training-step test: three steps of a small model on their shares of fixed batches."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from kairos_train.config.schema import (
    ActionStreamConfig,
    Config,
    ModelConfig,
    StageConfig,
    VideoStreamConfig,
)
from kairos_train.model import WorldActionModel
from kairos_train.model.layout import full_shapes, model_table
from kairos_train.objective.flow_matching import ConditionedBatch, FlowMatching
from kairos_train.training.engine.deepspeed_engine import build_engine, start_processes
from kairos_train.training.engine.engine_state import gather_full_state
from kairos_train.training.step import train_step

SAMPLES, ACTIONS = 8, 6


def make_config() -> Config:
    config = Config(
        model=ModelConfig(
            num_layers=4,
            num_heads=2,
            text_dim=12,
            freq_dim=16,
            video=VideoStreamConfig(dim=24, ffn_dim=32, gdn_key_dim=6, gdn_value_dim=8, dilation=2),
            action=ActionStreamConfig(dim=16, ffn_dim=24, action_dim=3, state_dim=5),
        ),
        stage=StageConfig(conditions={"t2v": 0.3, "ti2v": 0.7}, video_loss_weight=0.5),
    )
    config.train.precision, config.train.zero_stage = "fp32", 1
    config.optimizer.gradient_clip = 0.1
    return config


def make_batch(objective: FlowMatching, step: int, share: slice) -> ConditionedBatch:
    """Samples of the step that `share` selects. The second half of them has no valid action in step 1."""
    rng = torch.Generator().manual_seed(step)
    valid = torch.randint(1, ACTIONS + 1, (SAMPLES,), generator=rng)
    if step == 1:
        valid[SAMPLES // 2 :] = 0
    data = {
        "latents": torch.randn(SAMPLES, 16, 3, 4, 4, generator=rng),
        "context": torch.randn(SAMPLES, 4, 12, generator=rng),
        "context_mask": torch.ones(SAMPLES, 4, dtype=torch.bool),
        "state": torch.randn(SAMPLES, 1, 5, generator=rng),
        "actions": torch.randn(SAMPLES, ACTIONS, 3, generator=rng),
        "action_mask": torch.arange(ACTIONS) < valid[:, None],
    }
    keys = [f"sample-{i}" for i in range(SAMPLES)]
    return objective.condition(keys=keys[share], step=step, **{k: v[share] for k, v in data.items()})


def train(out: Path, micro_batches: int) -> None:
    """This rank takes its contiguous share of each step's eight samples, in some micro-batches. Rank 0 writes `out`."""
    config, world = make_config(), start_processes("cpu")
    torch.manual_seed(0)
    model = WorldActionModel(config.model)
    for head in (model.video_dit.head.head, model.action_dit.head):
        torch.nn.init.normal_(head.weight, std=0.1)
    config.train.accumulation = micro_batches
    table = model_table(config, model)
    shapes = full_shapes(config)
    engine = build_engine(model, config.train, config.optimizer, topology=world, table=table, full_shapes=shapes)
    objective = FlowMatching(config.stage, seed=0, patch=(2, 2))
    size = SAMPLES // world.size // micro_batches
    reports = []
    for step in range(3):
        begin = world.rank * size * micro_batches
        shares = [slice(begin + i * size, begin + (i + 1) * size) for i in range(micro_batches)]
        engine.set_lr(1e-2)
        report = train_step(engine, objective, config.stage, [make_batch(objective, step, share) for share in shares])
        reports.append([report.video_loss, report.action_loss, report.loss, report.grad_norm, report.samples])
    sections, _ = gather_full_state(engine)
    if world.rank == 0:
        save_file(sections["model"], out.with_suffix(".safetensors"))
        out.write_text(json.dumps(reports))
    engine.close()
