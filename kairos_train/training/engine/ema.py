"""Exponential moving average of the weights, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.training.engine.deepspeed_engine import TrainingEngine
from kairos_train.training.engine.initial_weights import InitialAverage

SWAPPED_AT_ONCE = 2**24  # elements


class Ema:
    """Average of the float32 masters: ema <- d_n·ema + (1 - d_n)·master, d_n = min(decay, (1 + n) / (10 + n)).

    n counts the updates made before: with the bare decay a run much shorter than 1 / (1 - decay) steps would average
    its random start (*ours*). The average is sharded as the masters, so it needs no communication, and as much memory.
    Frozen parameters and buffers are their own average.

    Args:
        engine: its masters are averaged; the average starts at their present values.
        decay: in [0, 1); 0 follows the weights.
        warmup: False uses `decay` from the first update on.
        start: an average to go on from, instead of the masters' present values.

    Attributes:
        average: sharded as the engine's masters.

    Raises:
        UserError: a decay outside of [0, 1).
    """

    def __init__(
        self, engine: TrainingEngine, decay: float, *, warmup: bool = True, start: InitialAverage | None = None
    ) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"train.ema_decay={decay}: must be at least 0 and below 1")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self._engine = engine
        self.average: list[Tensor] = [master.clone() for master in engine.master_shards.masters]
        if start is not None:
            engine.master_shards.fill(start.read, self.average)
            self.updates = start.updates

    @torch.no_grad()
    def update(self) -> None:
        """Average in the present weights; call after every step that changed them."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        for average, master in zip(self.average, self._engine.master_shards.masters):
            average.lerp_(master, 1 - decay)
        self.updates += 1

    def state_dict(self) -> dict[str, int]:
        """Plain state, for the key "ema" of a checkpoint's state."""
        return {"updates": self.updates}

    def load(self, reader: CheckpointReader) -> None:
        """Restore the section and the counter; every process reads its own shards.

        Raises:
            UserError: the checkpoint has no average, or not of this model.
        """
        state = reader.state.get("ema")
        if not isinstance(state, dict) or not isinstance(state.get("updates"), int):
            raise UserError(f"checkpoint {reader.path}: its state has no ema.updates; it can not be resumed")
        shards = self._engine.master_shards
        for name, shape in shards.shapes.items():
            if reader.shape("ema", name) != shape:
                raise UserError(
                    f"checkpoint {reader.path}: ema/{name} has shape {list(reader.shape('ema', name))},"
                    f" this model's is {list(shape)}; resume with the model that wrote it"
                )
        shards.fill(lambda name, box: reader.read("ema", name, box), self.average)
        self.updates = state["updates"]

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Let the model compute with the average inside of the block, for validation. Collective.

        Masters and average swap in place, without another copy, and are restored bit for bit afterwards. After an error
        in the block only the masters are restored: restoring the model is collective, and the other processes may be
        in another call.
        """
        self._swap()
        self._engine.master_shards.refresh()
        try:
            yield
        finally:
            self._swap()
        self._engine.master_shards.refresh()

    @torch.no_grad()
    def _swap(self) -> None:
        for flats in zip(self.average, self._engine.master_shards.masters):
            for average, master in zip(*(flat.view(-1).split(SWAPPED_AT_ONCE) for flat in flats)):
                kept = master.clone()
                master.copy_(average)
                average.copy_(kept)
