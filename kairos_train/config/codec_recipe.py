"""The settings of `kairos-train codec train`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CodecRecipe:
    """How long and on what a codec is trained.

    Attributes:
        steps: optimiser steps.
        batch: windows per step, of all sources together; each gives one crop.
        crop: height and width of a crop in pixels, a multiple of 8; smaller pictures are taken whole.
        lr: highest learning rate.
        seed: of weights, order and crops.
        workers: loader processes per source.
        save_every: steps after which the state is written, from which the same command goes on.
    """

    steps: int = 10_000
    batch: int = 16
    crop: int = 64
    lr: float = 2e-3
    seed: int = 0
    workers: int = 1
    save_every: int = 500
