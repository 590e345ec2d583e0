"""Initial weights (*ours*: the publication does not state them).

Linear layers Xavier-uniform with zero biases; embeddings of text and time normal(0.02); the last layer of each stream
zero, so that training starts from velocity 0. Norms, modulations, convolutions and GATED decays are set where they are
defined.
"""

import torch
from torch import nn


def initialise(model: nn.Module) -> None:
    """Set the linear layers of a world-action model in place, in the order of `named_modules` (one RNG stream)."""
    with torch.no_grad():
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if weight is None or weight.ndim < 2 or name.endswith("conv1d"):
                continue
            if "text_embedding" in name or "time_embedding" in name:
                nn.init.normal_(weight, std=0.02)
            else:
                nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        for name, module in model.named_modules():
            if name in ("video_dit.head.head", "action_dit.head"):
                nn.init.zeros_(module.weight)
