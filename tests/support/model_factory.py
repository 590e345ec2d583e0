"""A small world-action model with everything in it, and inputs for it. Float64, so that equality means equality."""

from typing import Any

import torch

from kairos_train.config.schema import ActionStreamConfig, KernelsConfig, ModelConfig, VideoStreamConfig
from kairos_train.model import WorldActionModel

ACTIONS, TEXT = 6, 5


def make_config(**video: Any) -> ModelConfig:
    """Two cycles of all four kinds; 4 heads, widths that 2 and 4 tensor ranks divide."""
    sizes = {"dim": 24, "ffn_dim": 32, "gdn_key_dim": 6, "gdn_value_dim": 8, "dilation": 2}
    return ModelConfig(
        num_layers=5,
        num_heads=4,
        text_dim=12,
        freq_dim=16,
        video=VideoStreamConfig(**{**sizes, "layer_cycle": ["SWA", "GATED", "DSWA", "FA", "GATED"], **video}),
        action=ActionStreamConfig(dim=16, ffn_dim=24, action_dim=3, state_dim=5),
    )


def randomize(model: WorldActionModel) -> None:
    """Weights under which everything matters: heads that are not zero, decays that remember."""
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.empty(p.shape).normal_(generator=rng)
            if name.endswith(("A_log", "dt_bias")):
                p.copy_(noise * 0.5 - 2)
            else:
                p.add_(noise.to(p.dtype) * (0.05 if p.ndim > 1 else 0.1))


def make_model(config: ModelConfig | None = None, **options: Any) -> WorldActionModel:
    """The same weights at every call."""
    torch.manual_seed(0)
    model = WorldActionModel(config or make_config(), KernelsConfig(), **options).double()
    randomize(model)
    return model


def make_inputs(
    frames: int = 5, history: tuple[int, ...] = (1, 2), *, actions: bool = True, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Arguments of `WorldActionModel.forward`: per-sample histories, a padded text and a padded action chunk."""
    rng, batch = torch.Generator().manual_seed(frames), len(history)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

    inputs = {
        "latents": normal(batch, 16, frames, 4, 4),
        "context": normal(batch, TEXT, 12),
        "context_mask": torch.arange(TEXT) < torch.randint(2, TEXT + 1, (batch, 1), generator=rng),
        "video_timestep": torch.rand(batch, generator=rng) * 1000,
        "history_frames": history,
    }
    if actions:
        valid = torch.randint(1, ACTIONS + 1, (batch, 1), generator=rng)
        inputs |= {
            "state": normal(batch, 1, 5),
            "action": normal(batch, ACTIONS, 3),
            "action_timestep": torch.rand(batch, generator=rng) * 1000,
            "action_mask": torch.arange(ACTIONS) < valid,
        }
    return inputs
