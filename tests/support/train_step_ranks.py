"""Ranks of the training-step test: three steps of a small model on their shares of fixed batches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

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
from kairos_train.training.step import StepReport, train_step

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


@dataclass
class Setup:
    """A small model under DeepSpeed; this rank takes its contiguous share of each step's eight samples."""

    micro_batches: int

    def __post_init__(self) -> None:
        self.config, self.world = make_config(), start_processes("cpu")
        config, topology = self.config, self.world
        torch.manual_seed(0)
        model = WorldActionModel(config.model)
        for head in (model.video_dit.head.head, model.action_dit.head):
            torch.nn.init.normal_(head.weight, std=0.1)
        config.train.accumulation = self.micro_batches
        layout = {"topology": topology, "table": model_table(config, model), "full_shapes": full_shapes(config)}
        self.engine = build_engine(model, config.train, config.optimizer, **layout)
        self.engine.set_lr(1e-2)
        self.objective = FlowMatching(config.stage, seed=0, patch=(2, 2))

    def step(self, number: int, **options: Any) -> StepReport:
        size = SAMPLES // self.world.size // self.micro_batches
        begin = self.world.rank * size * self.micro_batches
        shares = [slice(begin + i * size, begin + (i + 1) * size) for i in range(self.micro_batches)]
        batches = [make_batch(self.objective, number, share) for share in shares]
        return train_step(self.engine, self.objective, self.config.stage, batches, **options)

    def weights(self) -> list[torch.Tensor]:
        return [master.clone() for master in self.engine.master_shards.masters]


def refuse_one(micro_batches: int) -> dict[str, Any]:
    """A step whose update is refused, then one whose is not: what this rank was asked and what changed."""
    setup, asked = Setup(micro_batches), []
    weights = [setup.weights()]
    reports = []
    for refused in (True, False):
        reports.append(setup.step(0, refuses=lambda loss, refused=refused: asked.append(loss) or refused))
        weights.append(setup.weights())
    setup.engine.close()
    return {
        "asked": asked,
        "losses": [report.loss for report in reports],
        "norms": [report.grad_norm for report in reports],
        "stepped": [report.stepped for report in reports],
        "changed": [not all(map(torch.equal, *pair)) for pair in pairwise(weights)],
    }


def train(out: Path, micro_batches: int) -> None:
    """Three steps, in some micro-batches. Rank 0 writes `out`."""
    setup = Setup(micro_batches)
    engine, world = setup.engine, setup.world
    reports = []
    for step in range(3):
        report = setup.step(step)
        reports.append([report.video_loss, report.action_loss, report.loss, report.grad_norm, report.samples])
    sections, _ = gather_full_state(engine)
    if world.rank == 0:
        save_file(sections["model"], out.with_suffix(".safetensors"))
        out.write_text(json.dumps(reports))
    engine.close()
