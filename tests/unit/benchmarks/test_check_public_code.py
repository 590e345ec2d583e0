"""benchmarks/check_public_code.py without a checkout: it says why it is skipped, and its kernels are the right ones."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

import check_public_code  # noqa: E402
from public_code_parts import checkout  # noqa: E402

from kairos_train.model.kernels import delta_rule  # noqa: E402


@pytest.mark.parametrize(
    ("words", "reason"), [([], "no --repository DIR"), (["--repository", "nowhere"], "no mot.py below nowhere")]
)
def test_without_a_checkout_it_is_skipped_with_the_reason(monkeypatch, capsys, words, reason):
    monkeypatch.setattr(sys, "argv", ["check_public_code", *words])
    assert check_public_code.main() == 0
    assert reason in json.loads(capsys.readouterr().out)["skipped"]


def test_its_exports_are_complete(tmp_path):
    for name in ("joint", "tokens"):
        video = {"window_semantics": "token", "restrict_history_query_to_history": False} if name == "tokens" else {}
        folder = check_public_code.small_export(tmp_path, name, video)
        assert (folder / "kairos_config.py").is_file()


def test_windows_of_tokens_include_both_ends():
    q, k, v = torch.randn(3, 1, 7, 2, 4).unbind()
    got = checkout.flash_attention(q, k, v, window_size=(2, 1))
    row = torch.softmax(torch.einsum("hd,shd->hs", q[0, 3], k[0, 1:5]) / 2, dim=-1)
    torch.testing.assert_close(got[0, 3], torch.einsum("hs,shd->hd", row, v[0, 1:5]))
    whole = checkout.flash_attention(q, k, v)
    torch.testing.assert_close(whole, checkout.flash_attention(q, k, v, window_size=(6, 6)))


def test_a_masks_rule_is_written_out():
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    mask = SimpleNamespace(mask_mod=lambda b, h, i, j: j <= i)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(checkout.flex_attention(query=q, key=k, value=v, block_mask=mask), expected)


def test_the_recurrence_is_the_models():
    q, k = torch.randn(2, 1, 9, 2, 4).unbind()
    v, g, beta = torch.randn(1, 9, 2, 6), -torch.rand(1, 9, 2), torch.rand(1, 9, 2)
    got, _ = checkout.gated_delta_rule(q=q, k=k, v=v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
    unit = [x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) for x in (q, k)]
    expected = delta_rule.gated_delta_rule(unit[0] * 4**-0.5, unit[1], v, g, beta)[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
