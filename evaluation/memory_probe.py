"""How long the Gated DeltaNet layers remember: decays and contraction of each head, measured on held-out windows.

Per head, with unit keys, the state S (K×V) goes from token to token by

    S_t = a_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ,   a_t = e^(g_t) in (0, 1], β_t in (0, 1).

**Contraction.** Let two runs read the same tokens from different states; v drops out of their difference D, and
D_t = A_t D_{t−1} with A_t = a_t (I − β_t k_t k_tᵀ). A_t is symmetric: eigenvalue a_t(1 − β_t|k_t|²) along k_t, a_t
everywhere else (K > 1). So ‖A_t‖ = a_t·max(1, |1 − β_t|k_t|²|), and over the tokens of a window

    ‖D_S‖ ≤ Π_t ‖A_t‖ · ‖D_0‖.

That product is the bound. It is a_t alone as long as 0 ≤ β_t|k_t|² ≤ 2, which a sigmoid and unit keys ensure; here it
is evaluated on what was measured, not taken for granted. What the difference can really have left is ‖Π_t A_t‖, which
is smaller where keys overwrite one another: it is measured too, by running the layer's own recurrence on zero values
from the identity as state. To stay in range the decays are kept apart, for ‖Π A_t‖ = Π a_t · ‖Π (I − β_t k_t k_tᵀ)‖.

**Effective horizon.** Frames until the product of the decays has fallen to 1/e: −1 / (L·ḡ), ḡ the mean of g over the
tokens of a window, L tokens per frame; its quantiles over windows. With a single token's g for ḡ: the horizon while the
layer reads tokens like that one; quantiles over all tokens of all windows. A frame is a latent one.

The windows are noised as in training (`evaluation.losses`, draw 0): the layers see what they were trained on.

Shapes: B batch, W windows, S tokens, L tokens per frame, H heads, K key width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataloaders.shards import ShardIndex
from evaluation.held_out import spread_batches
from evaluation.losses import conditioned, objective_of
from kairos_train.basics.geometry import TIME_STRIDE
from kairos_train.inference.predict import Predictor
from kairos_train.model.capture import capture_recurrences
from kairos_train.model.kernels.delta_rule import gated_delta_rule

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LEAST_DECAY = 1e-12
"""A mean −g below this counts as this: a head that forgets nothing gets a finite horizon."""


@dataclass(frozen=True)
class MemoryMeasurement:
    """What one Gated DeltaNet layer did on a batch; float64 on the CPU.

    Attributes:
        log_decay: g (B, S, H).
        log_bound: Σ_t log ‖A_t‖ (B, H).
        log_norm: log ‖Π_t A_t‖ (B, H).
        largest: the largest ‖A_t‖ (B, H).
    """

    log_decay: Tensor
    log_bound: Tensor
    log_norm: Tensor
    largest: Tensor


@torch.no_grad()
def measure(predictor: Predictor, index: ShardIndex, *, samples: int, seed: int, batch_size: int) -> dict[str, Any]:
    """Probe every Gated DeltaNet layer of a policy; one forward pass per window.

    Args:
        samples: windows, spread evenly over the shards.

    Returns:
        {"layers": [{"layer", "heads": [head, …]}], "windows", "tokens_per_frame", "frames", "seconds_per_frame", …}.
        A head has "horizon_frames" (over windows) and "token_horizon_frames" (over tokens), {"q05", "q25", "median",
        "q75", "q95"} each; "log10_bound" and "log10_norm", the same over windows, of the whole window;
        "decay_per_frame", e^(L·ḡ) at the mean ḡ of all windows; "largest_factor", the largest ‖A_t‖ that was met.
    """
    objective, policy = objective_of(predictor, seed=seed), predictor.policy
    found: dict[str, list[MemoryMeasurement]] = {}
    frames = tokens = windows = 0
    sizes, with_frames = {"count": samples, "batch_size": batch_size}, index.encoders is None
    for batch in spread_batches(index, **sizes, with_frames=with_frames, what="memory"):
        noisy = conditioned(predictor, objective, batch, draw=0)
        with capture_recurrences(
            policy.model, lambda name, k, g, beta: found.setdefault(name, []).append(contraction(k, g, beta))
        ):
            policy.model(**noisy.model_inputs())
        frames, windows = noisy.latents.shape[2], windows + len(batch.keys)
    layers = []
    for name, parts in found.items():
        tokens = parts[0].log_decay.shape[1]
        layers.append({"layer": int(name.split(".")[2]), "heads": _heads(parts, tokens // frames)})
    return {
        "layers": layers,
        "windows": windows,
        "frames": frames,
        "tokens_per_frame": tokens // frames,
        "seconds_per_frame": TIME_STRIDE * index.window.action_video_freq_ratio / index.fps,
        "seed": seed,
    }


def contraction(k: Tensor, g: Tensor, beta: Tensor) -> MemoryMeasurement:
    """Bound and norm of what a recurrence does to the difference of two states.

    Args:
        k: keys (B, S, H, K) as the recurrence takes them.
        g: log decays (B, S, H).
        beta: write strengths (B, S, H).
    """
    k, g, beta = k.float(), g.double(), beta.double()
    along_key = (1 - beta * k.double().square().sum(-1)).abs()
    factor = g + (along_key.clamp(min=1.0) if k.shape[-1] > 1 else along_key).log()
    identity = torch.eye(k.shape[-1], device=k.device).expand(k.shape[0], k.shape[2], -1, -1)
    nothing = torch.zeros_like(g, dtype=torch.float32)
    _, left = gated_delta_rule(k, k, torch.zeros_like(k), nothing, beta.float(), identity, backend="torch")
    norm = torch.linalg.matrix_norm(left.double().cpu(), ord=2)  # many small matrices: LAPACK is quicker than a GPU
    return MemoryMeasurement(
        log_decay=g.cpu(),
        log_bound=factor.sum(1).cpu(),
        log_norm=g.sum(1).cpu() + norm.clamp(min=torch.finfo(torch.float64).tiny).log(),
        largest=factor.amax(1).exp().cpu(),
    )


def horizon(mean_log_decay: np.ndarray, tokens_per_frame: int) -> np.ndarray:
    """Frames until the product of decays falls to 1/e, at a mean log decay per token."""
    return 1 / (tokens_per_frame * np.maximum(-mean_log_decay, LEAST_DECAY))


def _heads(parts: list[MemoryMeasurement], tokens_per_frame: int) -> list[dict[str, Any]]:
    """The numbers of each head of one layer."""
    g = torch.cat([part.log_decay for part in parts]).numpy()  # (W, S, H)
    bound, norm, largest = (
        torch.cat([getattr(part, name) for part in parts]).numpy() for name in ("log_bound", "log_norm", "largest")
    )
    return [
        {
            "horizon_frames": _quantiles(horizon(g[..., head].mean(1), tokens_per_frame)),
            "token_horizon_frames": _quantiles(horizon(g[..., head].ravel(), tokens_per_frame)),
            "decay_per_frame": float(np.exp(tokens_per_frame * g[..., head].mean())),
            "log10_bound": _quantiles(bound[:, head] / np.log(10)),
            "log10_norm": _quantiles(norm[:, head] / np.log(10)),
            "largest_factor": float(largest[:, head].max()),
        }
        for head in range(g.shape[2])
    ]


def _quantiles(values: np.ndarray) -> dict[str, float]:
    names = ["median" if q == 0.5 else f"q{round(100 * q):02d}" for q in QUANTILES]
    return dict(zip(names, np.quantile(values, QUANTILES).tolist()))
