"""Settings of a parallel layout and of FP8. `kairos_train.config.schema` composes them."""

from __future__ import annotations

from dataclasses import dataclass, field

from kairos_train.basics.setting import one_of, setting, up_to


@dataclass
class ParallelConfig:
    """How a model is split over processes; what is left of the world is data-parallel."""

    tensor: int = setting(1, up_to(4096))  # ranks that split every layer's heads and FFN channels
    context: int = setting(1, up_to(4096))  # ranks that split a sample's latent frames
    sequence: bool = False  # with tensor > 1: between layers, tensor ranks split the tokens of each frame
    # how states of Gated DeltaNet layers pass between context ranks
    state_exchange: str = setting("auto", one_of("auto", "serial", "ring", "all_gather"))
    # which rank computes which dilated windows; auto: fewer bytes
    frame_layout: str = setting("auto", one_of("auto", "contiguous", "residue"))


@dataclass
class Fp8Config:
    """FP8 in linear layers; the rest stays in `train.precision`."""

    # null: off; emulated: without Transformer Engine, which computes the others (ours)
    recipe: str | None = setting(None, one_of("current", "delayed", "block", "mxfp8", "emulated"))
    streams: list[str] = field(default_factory=lambda: ["video"])  # video, action (ours)
    skip_layers: list[int] = field(default_factory=list)  # layers kept out, negative from the end (ours)
