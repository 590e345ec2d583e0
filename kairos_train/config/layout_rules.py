"""The rules of `kairos_train.config.validate` on how a model is split, recomputed and rounded."""

from __future__ import annotations

from kairos_train.basics.errors import UserError
from kairos_train.config.schema import Config


def tensor_ranks_share_heads_and_channels(config: Config) -> None:
    """Heads, attention width and FFN width of every stream that is there must divide."""
    tensor, model, joint = config.parallel.tensor, config.model, config.stage.streams == "joint"
    sizes = {"model.num_heads": model.num_heads, "model.video.ffn_dim": model.video.ffn_dim}
    if joint and model.action is not None:
        sizes["model.action.ffn_dim"] = model.action.ffn_dim
    possible = [n for n in range(1, model.num_heads + 1) if not any(size % n for size in sizes.values())]
    for key, size in sizes.items():
        if size % tensor:
            raise UserError(
                f"parallel.tensor={tensor} does not divide {key}={size}; use one of {', '.join(map(str, possible))}"
            )


def sequence_needs_tensor(config: Config) -> None:
    if config.parallel.sequence and config.parallel.tensor == 1:
        raise UserError(
            "parallel.sequence=true shares tokens between tensor ranks, but parallel.tensor=1; "
            "use parallel.tensor=2 or more, or parallel.sequence=false"
        )


def selective_recomputation_needs_whole_weights(config: Config) -> None:
    if config.train.recompute == "selective" and config.train.zero_stage == 3:
        raise UserError(
            "train.recompute=selective with train.zero_stage=3: weights are gathered inside of layers, which a "
            "selective replay cannot repeat; use train.recompute=block or train.zero_stage=2"
        )


def fp8_names_streams_and_layers(config: Config) -> None:
    fp8, layers = config.precision.fp8, config.model.num_layers
    for stream in fp8.streams:
        if stream not in ("video", "action"):
            raise UserError(f"precision.fp8.streams holds {stream!r}; use video, action")
    for layer in fp8.skip_layers:
        if not -layers <= layer < layers:
            raise UserError(
                f"precision.fp8.skip_layers holds {layer}; model.num_layers={layers}: use 0 to {layers - 1}"
            )
    if fp8.recipe == "emulated" and config.parallel.tensor > 1:
        raise UserError(
            f"precision.fp8.recipe=emulated scales whole tensors, but parallel.tensor={config.parallel.tensor} splits "
            "them; use parallel.tensor=1"
        )
    if fp8.recipe == "delayed" and (config.train.recompute != "none" or config.parallel.context > 1):
        raise UserError(
            f"precision.fp8.recipe=delayed with train.recompute={config.train.recompute} and parallel.context="
            f"{config.parallel.context}: its scales follow one pass per layer; use precision.fp8.recipe=current"
        )
    if fp8.recipe not in (None, "emulated") and config.train.precision != "bf16":
        raise UserError(
            f"precision.fp8.recipe={fp8.recipe} with train.precision={config.train.precision}; use train.precision=bf16"
        )
