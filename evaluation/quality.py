"""How close pictures and clips are to others: SSIM, and learned distances with weights that the user brings.

Pictures are uint8 RGB, channels last. Shapes: N pictures or clips, T frames of a clip, H W pixels, D features.
(PSNR is `evaluation.rollout.psnr`.)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kairos_train.basics.errors import UserError, one_line
from kairos_train.basics.foreign_files import refuse_lfs_pointer

WINDOW, SIGMA = 11, 1.5
K1, K2, RANGE = 0.01, 0.03, 255.0
MIDDLE = RANGE / 2


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean structural similarity of picture pairs (N, H, W, 3), float64 (N,), 1 for equal ones.

    As in Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment", IEEE TIP 13(4), 2004: an 11×11 Gaussian window
    with σ = 1.5 and weights that sum to 1, moved where it lies inside the picture; K1 = 0.01, K2 = 0.03, range 255.
    Each colour channel by itself, then their mean.

    Raises:
        UserError: pictures smaller than the window.
    """
    if min(a.shape[1:3]) < WINDOW:
        raise UserError(
            f"SSIM needs pictures of at least {WINDOW}×{WINDOW} pixels, these have {a.shape[1]}×{a.shape[2]}"
        )
    # Variances do not depend on the middle that is taken off, but float32 keeps more of their digits without it.
    x, y = (torch.from_numpy(np.array(p, np.float32)).movedim(-1, 1) - MIDDLE for p in (a, b))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + MIDDLE, mean_y + MIDDLE
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.flatten(1).double().mean(1).numpy()


class QualityModel:
    """A TorchScript module that compares pictures or describes clips.

    Pictures go in as float32 RGB from −1 to 1. `--lpips`: module(a, b), both (N, 3, H, W), gives N distances, in any
    shape. `--fvd`: module(clips), (N, 3, T, H, W), gives features (N, D).

    Args:
        file: written by `torch.jit.save`.
        option: what the user calls it, for errors.
        device: where it runs.

    Raises:
        UserError: no such file, or no TorchScript module.
    """

    def __init__(self, file: Path, *, option: str, device: torch.device) -> None:
        self.file, self.option, self.device = Path(file), option, device
        if not self.file.is_file():
            raise UserError(f"{option}={file}: not found; give a TorchScript module, as torch.jit.save writes it")
        refuse_lfs_pointer(self.file)
        try:
            self._module = torch.jit.load(str(self.file), map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"{option}={file}: is not a TorchScript module ({one_line(error)[:120]}); save one with torch.jit.save"
            ) from error

    def distances(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Of picture pairs (N, H, W, 3), float64 (N,).

        Raises:
            UserError: the module refuses them, or gives another number of distances.
        """
        found = self._call(*(self._pictures(p).movedim(-1, 1) for p in (a, b)))
        if found.numel() != len(a):
            raise UserError(
                f"{self.option}={self.file}: gives {list(found.shape)} for {len(a)} pairs of pictures; must give one "
                "distance each"
            )
        return found.reshape(-1).numpy()

    def features(self, clips: np.ndarray) -> np.ndarray:
        """Of clips (N, T, H, W, 3), float64 (N, D), one at a time.

        Raises:
            UserError: the module refuses them, or gives something else.
        """
        rows = [self._call(self._pictures(clip[None]).movedim(-1, 1)) for clip in clips]
        if any(row.ndim != 2 or len(row) != 1 for row in rows):
            raise UserError(
                f"{self.option}={self.file}: gives {list(rows[0].shape)} for one clip; must give features (1, D)"
            )
        return torch.cat(rows).numpy()

    @torch.no_grad()
    def _call(self, *inputs: Tensor) -> Tensor:
        try:
            found = self._module(*inputs)
        except Exception as error:  # a foreign module raises whatever it likes
            shapes = " and ".join(str(list(x.shape)) for x in inputs)
            raise UserError(f"{self.option}={self.file}: refuses {shapes} ({one_line(error)[-200:]})") from error
        if not isinstance(found, Tensor) or not found.isfinite().all():
            kind = "values that are not finite" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise UserError(f"{self.option}={self.file}: gives {kind}; must give a tensor of finite numbers")
        return found.double().cpu()

    def _pictures(self, pictures: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(pictures, np.float32)).to(self.device) / MIDDLE - 1


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two Gaussians fitted to features (N, D) each, N ≥ 2.

    |m_a − m_b|² + tr(C_a + C_b − 2·(C_a C_b)^½); with C_a = R Rᵀ the trace of the root is Σ √eig(Rᵀ C_b R).
    """
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    # Rows scaled so that C = XᵀX: the singular values of X_a X_bᵀ are those roots, in N×N instead of D×D.
    x, y = ((f - f.mean(0)) / np.sqrt(len(f) - 1) for f in (a, b))
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(max(mean + np.square(x).sum() + np.square(y).sum() - 2 * root, 0.0))


def _blur(x: Tensor) -> Tensor:
    """Gaussian mean of (N, C, H, W) where the window lies inside: (N, C, H − 10, W − 10)."""
    offsets = torch.arange(WINDOW, dtype=x.dtype) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, WINDOW).contiguous()
    x = torch.nn.functional.conv2d(x, weights, groups=x.shape[1])
    return torch.nn.functional.conv2d(x, weights.movedim(-1, -2), groups=x.shape[1])
