"""SSIM, Fréchet distance and foreign TorchScript judges against what can be worked out by hand."""

import numpy as np
import pytest
import torch

from evaluation.quality import QualityModel, frechet, ssim
from kairos_train.basics.errors import UserError

C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


class Distance(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().mean((1, 2, 3), keepdim=True)


class Brightness(torch.nn.Module):
    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return clips.mean((2, 3, 4))


class Total(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().sum()


def judge(module, path, option="lpips"):
    torch.jit.script(module).save(str(path))
    return QualityModel(path, option=option, device=torch.device("cpu"))


def reference(a, b):
    """SSIM of two pictures (H, W), window by window, as the paper writes it."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11].astype(float), b[y : y + 11, x : x + 11].astype(float)
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
            covariance = (window * (p - mean_p) * (q - mean_q)).sum()
            luminance = (2 * mean_p * mean_q + C1) / (mean_p**2 + mean_q**2 + C1)
            found.append(luminance * (2 * covariance + C2) / (var_p + var_q + C2))
    return np.mean(found)


def test_ssim_is_that_of_the_paper_window_by_window():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, 16, 21, 3), dtype=np.uint8)
    b = np.clip(a + rng.normal(0, 30, a.shape), 0, 255).astype(np.uint8)
    expected = [np.mean([reference(a[n, ..., c], b[n, ..., c]) for c in range(3)]) for n in range(2)]
    assert ssim(a, b) == pytest.approx(expected, abs=1e-4)
    assert 0.3 < expected[0] < 0.99, "neither equal nor unrelated"


def test_ssim_of_equal_opposite_and_constant_pictures():
    a = np.random.default_rng(1).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    assert ssim(a, a) == pytest.approx([1.0])
    assert ssim(a, 255 - a)[0] < -0.5
    grey, light = np.full((1, 32, 32, 3), 100, np.uint8), np.full((1, 32, 32, 3), 150, np.uint8)
    assert ssim(grey, light) == pytest.approx([(2 * 100 * 150 + C1) / (100**2 + 150**2 + C1)], abs=1e-4)
    with pytest.raises(UserError, match="at least 11×11 pixels, these have 8×32"):
        ssim(a[:, :8], a[:, :8])


def test_frechet_distance_of_gaussians_with_known_moments():
    signs = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * np.sqrt(3 / 4)  # sample covariance: the identity
    a, b = signs * [2.0, 0.5], signs * [1.0, 3.0] + [4.0, 0.0]
    assert frechet(a, b) == pytest.approx(16 + (2 - 1) ** 2 + (0.5 - 3) ** 2)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    # as |m|² + tr(A + B − 2(AB)^½) with covariances that do not commute, of fewer features than samples and more
    rng = np.random.default_rng(2)
    for size in (3, 12):
        x, y = rng.normal(size=(8, size)), rng.normal(size=(8, size)) @ rng.normal(size=(size, size)) + 1
        p, q = np.cov(x.T), np.cov(y.T)
        root = np.sqrt(np.clip(np.linalg.eigvals(p @ q).real, 0, None)).sum()
        expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(p + q) - 2 * root
        assert frechet(x, y) == pytest.approx(expected, rel=1e-6)


def test_a_torchscript_distance_sees_pictures_from_minus_one_to_one(tmp_path):
    found = judge(Distance(), tmp_path / "distance.pt")
    black, white = np.zeros((3, 16, 16, 3), np.uint8), np.full((3, 16, 16, 3), 255, np.uint8)
    assert found.distances(black, white) == pytest.approx([2.0] * 3)
    features = judge(Brightness(), tmp_path / "brightness.pt", "fvd").features(np.stack([black, white]))
    assert features == pytest.approx(np.array([[-1.0] * 3, [1.0] * 3]))


def test_judges_that_cannot_be_used_are_refused_by_name(tmp_path):
    cpu, pair = torch.device("cpu"), [np.zeros((2, 16, 16, 3), np.uint8)] * 2
    (tmp_path / "text.pt").write_text("weights")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    for name, match in (("none.pt", "not found"), ("text.pt", "no"), ("weights.pt", "is not a TorchScript module")):
        with pytest.raises(UserError, match=match) as refused:
            QualityModel(tmp_path / name, option="lpips", device=cpu)
        assert f"lpips={tmp_path / name}" in str(refused.value)
    with pytest.raises(UserError, match=r"gives \[\] for 2 pairs"):
        judge(Total(), tmp_path / "total.pt").distances(*pair)
    with pytest.raises(UserError, match=r"refuses \[1, 3, 2, 16, 16\]"):
        judge(Distance(), tmp_path / "distance.pt", "fvd").features(np.stack(pair))
