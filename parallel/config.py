"""Settings of a parallel layout and of FP8. `kairos_train.config.schema` composes them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ParallelConfig:
    """How a model is split over processes; what is left of the world is data-parallel."""

    tensor: int = 1  # ranks that share every layer's heads and FFN channels
    context: int = 1  # ranks that share a sample's latent frames
    sequence: bool = False  # with tensor > 1: between layers, tensor ranks share the tokens of each frame
    state_exchange: str = "auto"  # auto | serial | ring | all_gather: GATED states between context ranks
    frame_layout: str = "auto"  # auto (fewer bytes) | contiguous | residue: who computes dilated windows


@dataclass
class Fp8Config:
    """FP8 in linear layers; the rest stays in `train.precision`."""

    recipe: str | None = None  # null: off | current | delayed | block | mxfp8 (Transformer Engine) | emulated
    streams: list[str] = field(default_factory=lambda: ["video"])  # video, action
    skip_layers: list[int] = field(default_factory=list)  # layers kept out, negative from the end
