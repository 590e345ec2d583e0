"""Run folders as training leaves them, written on a clock of their own: what happened when is known exactly."""

import json
from pathlib import Path

import torch
import yaml

from kairos_train.checkpoint.writing import write_checkpoint
from kairos_train.operations.events import EventLog, next_life, read_events
from kairos_train.operations.reports.records import abandoned
from kairos_train.training.measure.telemetry import drop_later_lines

START = 1_700_000_000.0
STARTING, PACE, WAIT = 7.0, 2.0, 0.25  # seconds to the first step; per step; share of it that waits for data
STALL, VALIDATION = 1.5, 4.0  # seconds
EVERY = 10  # steps between reports; checkpoints come every 20, validations every 40

CONFIG = {
    "experiment": "toy",
    "stage": {"name": "joint", "init_from": None},
    "model": {"name": "tiny"},
    "data": {"validation_shards": None},
    "train": {"steps": 200, "checkpoint_every": 20, "log_every": EVERY, "device": "cpu"},
    "guard": {"window": 100, "skips": 10, "rollbacks": 2},
    "watch": {"stuck": 1800.0},
}


class RunFolder:
    """A run that is written as it goes; `time` is its clock.

    Args:
        folder: made here.
        steps: of its budget.
        config: changes of CONFIG's sections.
    """

    def __init__(self, folder: Path, *, steps: int = 200, config: dict | None = None) -> None:
        self.folder, self.steps, self.time = Path(folder), steps, START
        self.folder.mkdir(parents=True)
        self.step = self.saved = self.life = 0
        merged = {key: {**value, **(config or {}).get(key, {})} for key, value in CONFIG.items() if key != "experiment"}
        merged["train"]["steps"] = steps
        (self.folder / "config.yaml").write_text(yaml.safe_dump({"experiment": "toy", **merged}))

    def start(self, *, tell_redone: bool = True, **place) -> None:
        """A life begins, from the newest checkpoint."""
        lost = abandoned(self.folder, self.saved) if tell_redone and self.life else {}
        if lost:
            lost["last_sign"] = self.time_of_last_step
        for name in ("losses.jsonl", "metrics.jsonl"):
            drop_later_lines(self.folder / name, self.saved)
        self.life = next_life(read_events(self.folder))
        self.step = self.reported = self.saved
        place = {"host": "elsewhere", "pid": 1, "job": None, "world": 4, **place}
        self.event("start", step=self.step, budget=f"{self.steps} steps", stage="joint", versions={}, **lost, **place)
        self.time += STARTING

    def go(self, until: int, *, skipped: int = 0) -> None:
        """Steps up to `until`, with all that comes between them; every report has `skipped` dropped ones."""
        while self.step < until:
            self.step += 1
            self.time += PACE
            self.time_of_last_step = self.time
            loss = 2.0 / self.step
            self.line("losses.jsonl", {"step": self.step, "loss": loss, "grad_norm": 1.0, "stepped": True})
            if self.step % EVERY == 0 or self.step == self.steps:
                self.report(loss, skipped)
            if self.step % 40 == 0:
                self.time += VALIDATION
                self.line("metrics.jsonl", {"step": self.step, "time": self.time, "validation_ema/video": loss})
            if self.step % 20 == 0 or self.step == self.steps:
                self.checkpoint()

    def report(self, loss: float, skipped: int) -> None:
        values = {
            "loss/total": loss,
            "loss/video": loss,
            "loss_by_sigma/video_0.0-0.2": loss / 2,
            "loss_by_sigma/video_0.2-0.4": loss,
            "optimizer/grad_norm": 1.0,
            "optimizer/lr": 1e-3,
            "optimizer/skipped_steps": skipped,
            "speed/seconds_per_step": PACE,
            "speed/data_wait_share": WAIT,
            "memory/gb": 1.0,
            "progress/stage_share": self.step / self.steps,
        }
        self.line("metrics.jsonl", {"step": self.step, "time": self.time, **values})
        self.reported = self.step

    def checkpoint(self) -> None:
        self.time += STALL
        self.saved = self.step
        self.event("checkpoint", step=self.step, stall_seconds=STALL, write_seconds=2 * STALL, bytes=100)

    def real_checkpoint(self) -> Path:
        """Of this step, on disk."""
        sections = {"model": {"weight": torch.zeros(3)}}
        return write_checkpoint(self.folder / "checkpoints", self.step, sections=sections, state={}, files={})

    def stop(self, outcome: str, text: str = "") -> None:
        self.event("stop", step=self.step, outcome=outcome, text=text)

    def event(self, kind: str, **fields) -> None:
        EventLog(self.folder, life=self.life, enabled=True, clock=lambda: self.time).write(kind, **fields)

    def line(self, name: str, values: dict) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(values) + "\n")
