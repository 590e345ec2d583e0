"""A checkout of the public Kairos code, made importable on a CPU: kernels in plain torch, absent packages empty.

Its network, masks, pipelines and schedulers are its own. Replaced are FlashAttention, FlexAttention, apex' RMSNorm and
the kernels below its Gated DeltaNet layer; the packages that register classes or download weights; and `KairosDiT`,
which no export names.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLA = "kairos.third_party.fla"


def open_checkout(repository: Path) -> types.SimpleNamespace:
    """The modules of a checkout: `mot`, `wam`, `dmd` and the registry `networks`."""
    sys.path.insert(0, str(repository))
    builtins.os = os  # its networks ask for it without importing it where there is no GPU
    _replace_packages()
    _replace_kernels(repository)
    with quiet():
        networks = importlib.import_module("kairos.apis.builder").DITS
        mot = importlib.import_module("kairos.modules.dits.mot")
        network = importlib.import_module("kairos.modules.dits.kairos_dit_v2")
        wam = importlib.import_module("kairos.pipelines.kairos_embodied_wam_pipeline")
        dmd = importlib.import_module("kairos.pipelines.kairos_embodied_pipeline_dmd")
    mot.flex_attn_compiled = flex_attention
    mot.flash_attn = network.flash_attn = types.SimpleNamespace(flash_attn_func=flash_attention)
    network.FLASH_ATTN_2_AVAILABLE = True
    return types.SimpleNamespace(mot=mot, wam=wam, dmd=dmd, networks=networks)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What the public code prints goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _module(name: str, **contents: Any) -> types.ModuleType:
    module = sys.modules.setdefault(name, types.ModuleType(name))
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(contents)
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, module)
    return module


def _package(name: str, folder: Path, **contents: Any) -> types.ModuleType:
    """A package whose own `__init__` does not run: those of fla import all of it."""
    return _module(name, __path__=[str(folder)], **contents)


class Registry:
    """Classes by name, as mmengine keeps them."""

    def __init__(self, name: str) -> None:
        self.name, self._classes = name, {}

    def register_module(self):
        def register(cls: type) -> type:
            self._classes[cls.__name__] = cls
            return cls

        return register

    def get(self, name: str) -> type:
        return self._classes[name]


def _replace_packages() -> None:
    if importlib.util.find_spec("mmengine") is None:
        _module("mmengine", Config=dict)
        _module("mmengine.registry", Registry=Registry)
    if importlib.util.find_spec("modelscope") is None:
        _module("modelscope", snapshot_download=None)
    qwen = importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    for name in ("Qwen2RMSNorm", "Qwen2_5_VisionRotaryEmbedding", "Qwen2_5_VLRotaryEmbedding"):
        qwen.__dict__.setdefault(name, None)  # imported there and not used, and not in every transformers


def _replace_kernels(repository: Path) -> None:
    _module("apex")
    _module("apex.normalization")
    _module("apex.normalization.fused_layer_norm", FusedRMSNorm=RMSNorm)
    folder = repository / "kairos" / "third_party" / "fla"
    importlib.import_module("kairos.third_party")
    _package(FLA, folder)
    _package(f"{FLA}.ops", folder / "ops")
    _module(
        f"{FLA}.ops.gated_delta_rule",
        chunk_gated_delta_rule=gated_delta_rule,
        fused_recurrent_gated_delta_rule=gated_delta_rule,
    )
    _module(f"{FLA}.modules", FusedRMSNormGated=GatedRMSNorm, RMSNorm=RMSNorm, ShortConvolution=ShortConvolution)
    _package(f"{FLA}.layers", folder / "layers")
    _module(f"{FLA}.layers.utils", get_unpad_data=None, index_first_axis=None, pad_input=None)
    _package(f"{FLA}.models", folder / "models")
    _module(f"{FLA}.models.utils", Cache=None)  # asked for beyond 10,240 tokens
    layer = importlib.import_module(f"{FLA}.layers.gated_deltanet").GatedDeltaNet
    sys.modules[f"{FLA}.layers"].GatedDeltaNet = layer
    _module(f"{FLA}.layers.gated_deltanet_with_tp", GatedDeltaNet=None)
    _module("kairos.modules.dits.kairos_dit", KairosDiT=None, sinusoidal_embedding_1d=None)


# --- kernels ---


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · weight."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class GatedRMSNorm(RMSNorm):
    """The same, times the SiLU of a gate."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * F.silu(gate)


class ShortConvolution(nn.Conv1d):
    """A causal convolution of every channel along the sequence (B, S, C), then SiLU."""

    def __init__(self, hidden_size: int, kernel_size: int, bias: bool, activation: str) -> None:
        assert activation == "silu"
        super().__init__(hidden_size, hidden_size, kernel_size, groups=hidden_size, bias=bias)

    def forward(self, *, x: Tensor, cache: None, output_final_state: bool, cu_seqlens: None) -> tuple[Tensor, None]:
        padded = F.pad(x.transpose(1, 2), (self.kernel_size[0] - 1, 0))
        return F.silu(super().forward(padded)).transpose(1, 2), None


def gated_delta_rule(
    *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """Token by token: S ← e^g S; S ← S + k ⊗ β(v − kᵀS); o = qᵀS. q, k (B, S, H, K), v (B, S, H, V), g, β (B, S, H)."""
    assert options.pop("use_qk_l2norm_in_kernel")
    q, k = (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    state, out = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]), []
    for s in range(q.shape[1]):
        state = state * g[:, s].exp()[..., None, None]
        change = beta[:, s, :, None] * (v[:, s] - torch.einsum("bhk,bhkv->bhv", k[:, s], state))
        state = state + k[:, s, ..., None] * change[:, :, None]
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, s] * q.shape[-1] ** -0.5, state))
    return torch.stack(out, 1), None


def flash_attention(q: Tensor, k: Tensor, v: Tensor, window_size: tuple[int, int] = (-1, -1), **options: Any) -> Tensor:
    """Attention of (B, S, H, D) within a window of tokens, both ends included."""
    assert not options.get("return_attn_probs")
    distance = torch.arange(k.shape[1])[None] - torch.arange(q.shape[1])[:, None]
    left, right = (float("inf") if size < 0 else size for size in window_size)
    mask = (distance >= -left) & (distance <= right)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)


def flex_attention(*, query: Tensor, key: Tensor, value: Tensor, block_mask: Any) -> Tensor:
    """Attention of (B, H, S, D) under the mask's own rule, written out."""
    index = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])[None]
    mask = block_mask.mask_mod(0, 0, *torch.broadcast_tensors(*index))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
