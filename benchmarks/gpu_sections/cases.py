"""Inputs of the conformance cases, for one process and for two."""

from __future__ import annotations

from functools import partial

import torch
from gpu_sections.harness import Setting
from torch import Tensor, nn

from kairos_train.model.kernels.delta_rule import gated_delta_rule
from kairos_train.model.kernels.windows import WindowSpec

DECAYS = {"remembering": 0.03, "forgetting": 1.0}
"""Largest −g: at the usual initialisation most heads forget so fast that a wrong state would go unnoticed."""


def rule_inputs(setting: Setting, tokens: int, *, decay: float, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """q, k (unit length), v, g, beta, initial_state at full head sizes; gate and state float32 for 16-bit dtypes."""
    heads, key, value = (2, 16, 24) if setting.tiny else (20, 256, 512)
    wide = torch.promote_types(dtype, torch.float32)
    random = setting.generator(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=random, device=setting.device)

    unit = partial(nn.functional.normalize, dim=-1)
    x = {"q": unit(draw(tokens, heads, key)) * key**-0.5, "k": unit(draw(tokens, heads, key))}
    x["v"] = draw(tokens, heads, value)
    x = {name: t.to(dtype) for name, t in x.items()}
    x["g"] = (-decay * torch.rand(1, tokens, heads, generator=random, device=setting.device)).to(wide)
    x["beta"] = torch.rand(1, tokens, heads, generator=random, device=setting.device).to(wide)
    x["initial_state"] = draw(heads, key, value).to(wide)
    return x


def run_rule(x: dict[str, Tensor], cotangents: tuple[Tensor, Tensor], backend: str) -> dict[str, Tensor]:
    """Outputs, final state and the gradients of all inputs ("d_…")."""
    x = {name: t.detach().requires_grad_() for name, t in x.items()}
    out = gated_delta_rule(*x.values(), backend=backend)
    grads = torch.autograd.grad(out, tuple(x.values()), [c.to(o.dtype) for c, o in zip(cotangents, out, strict=True)])
    return {"output": out[0], "state": out[1], **{f"d_{name}": t for name, t in zip(x, grads, strict=True)}}


def rule_cotangents(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    random = torch.Generator(x["v"].device).manual_seed(7)
    return tuple(
        torch.randn(t.shape, generator=random, device=t.device).to(t.dtype) for t in (x["v"], x["initial_state"])
    )


def rules() -> dict[str, WindowSpec]:
    """Every kind in both readings of the window."""
    frame = {"window": 3, "dilation": 4, "token_window": False, "restrict_history": True, "all_attend_history": False}
    token = {**frame, "token_window": True, "restrict_history": False}
    return {
        f"{kind} in {reading}": WindowSpec(kind=kind, **flags)
        for reading, flags in (("frames", frame), ("tokens", token))
        for kind in ("SWA", "DSWA", "FA")
    }
