"""The Wan2.1 VAE through `diffusers.AutoencoderKLWan`, frozen.

Weights come from a Diffusers folder (the VAE's own, or a pipeline's with a `vae` folder in it) or from the original
`Wan2.1_VAE.pth`, which is loaded with `weights_only` and renamed by the function that diffusers has for it. Pixels in
[-1, 1]; latents normalised per channel by the mean and standard deviation of the model's configuration; the mode of the
posterior unless `sample_posterior` (conditioning specification, "Video -> latents").

Shapes: B batch, T frames, F latent frames, H W pixels, h = H/8, w = W/8.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kairos_train.basics.errors import UserError
from kairos_train.basics.foreign_files import refuse_lfs_pointer
from kairos_train.basics.geometry import LATENT_CHANNELS
from kairos_train.conditioning.interfaces import config_sha256, latent_shape, weights_sha256

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

FIELD = "encoders.video.path"
REMEDY = (
    "give the Diffusers folder of the Wan2.1 VAE or the original Wan2.1_VAE.pth, or set encoders.video.kind=block_dct"
)

ARCHITECTURE = (
    "base_dim",
    "z_dim",
    "dim_mult",
    "num_res_blocks",
    "attn_scales",
    "temperal_downsample",
    "latents_mean",
    "latents_std",
)


class WanVAE:
    """VideoEncoder with the real weights, in float32. A batch is encoded at once; its size bounds the memory."""

    def __init__(
        self, path: str | Path | None, *, sample_posterior: bool = False, device: str | torch.device = "cpu"
    ) -> None:
        """Raises UserError when `path` is missing, unreadable, incomplete or another model."""
        model = _load(path)
        self._identity = {
            "kind": "wan",
            "config_sha256": config_sha256(_architecture(model)),
            "weights_sha256": weights_sha256(model.state_dict()),
            "sample_posterior": sample_posterior,
        }
        self._sample = sample_posterior
        self._model = model.to(device).eval().requires_grad_(False)
        self._mean = torch.tensor(model.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(model.config.latents_std, device=device).view(1, -1, 1, 1, 1)

    @property
    def identity(self) -> dict[str, Any]:
        return dict(self._identity)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """uint8 (B,T,H,W,3) -> float32 (B,16,F,h,w). Raises UserError as VideoEncoder.encode does."""
        latent_shape(frames)
        pixels = frames.to(self._mean.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1  # B,3,T,H,W
        posterior = self._model.encode(pixels).latent_dist
        latents = posterior.mode()
        if self._sample:
            latents = latents + posterior.std * _content_noise(frames, latents)
        return (latents - self._mean) / self._std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B,16,F,h,w) -> uint8 (B,T,H,W,3), T = 4 (F - 1) + 1."""
        pixels = self._model.decode(latents.to(self._mean) * self._std + self._mean).sample  # B,3,T,H,W in [-1,1]
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def _content_noise(frames: Tensor, like: Tensor) -> Tensor:
    """Standard normal noise that is a function of each clip alone: the same in any batch, order and process."""
    noise = []
    for clip in frames.cpu():
        seed = hashlib.blake2b(clip.contiguous().numpy().tobytes(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
        noise.append(torch.randn(like.shape[1:], generator=generator))
    return torch.stack(noise).to(like)


def _load(path: str | Path | None) -> AutoencoderKLWan:
    if path is None:
        raise UserError(f"{FIELD}: not set, but encoders.video.kind=wan needs weights; {REMEDY}")
    path = Path(path)
    refuse_lfs_pointer(path)
    if path.is_dir():
        model = _load_folder(path)
    elif path.is_file():
        model = _load_original(path)
    else:
        raise UserError(f"{FIELD}: {path} does not exist; {REMEDY}")
    if (channels := model.config.z_dim) != LATENT_CHANNELS:
        raise UserError(f"{FIELD}: {path} has {channels} latent channels, Wan2.1 has {LATENT_CHANNELS}; {REMEDY}")
    return model


def _load_folder(path: Path) -> AutoencoderKLWan:
    """A Diffusers folder. Diffusers fills absent tensors with random ones and warns: here that is an error."""
    from diffusers import AutoencoderKLWan

    folder = path if (path / "config.json").is_file() else path / "vae"
    if not (folder / "config.json").is_file():
        raise UserError(f"{FIELD}: {path} has no config.json, nor has a folder vae in it; {REMEDY}")
    refuse_lfs_pointer(folder)
    try:
        kind = json.loads((folder / "config.json").read_text()).get("_class_name")
        if kind != "AutoencoderKLWan":
            raise UserError(f"{FIELD}: {folder}/config.json describes {kind}, not AutoencoderKLWan; {REMEDY}")
        model, info = AutoencoderKLWan.from_pretrained(
            folder, torch_dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:  # many kinds, from several libraries: unreadable JSON, no weights, broken weights
        raise UserError(f"{FIELD}: {folder} cannot be read ({_first_line(error)}); {REMEDY}") from error
    _refuse_partial(folder, info["missing_keys"], info["unexpected_keys"])
    return model


def _load_original(path: Path) -> AutoencoderKLWan:
    """`Wan2.1_VAE.pth`: Wan2.1's architecture; its width is read off the tensors, so a narrower one loads too."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    try:
        original = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{FIELD}: {path} is not a file of plain tensors ({_first_line(error)}); {REMEDY}") from error
    if not isinstance(original, dict) or "encoder.conv1.weight" not in original or "conv2.weight" not in original:
        raise UserError(f"{FIELD}: {path} does not hold the original Wan2.1 VAE; {REMEDY}")
    model = AutoencoderKLWan(
        base_dim=original["encoder.conv1.weight"].shape[0], z_dim=original["conv2.weight"].shape[0]
    )
    try:
        found = model.load_state_dict(convert_wan_vae_to_diffusers(original), strict=False)
    except RuntimeError as error:
        raise UserError(f"{FIELD}: {path} has tensors of other shapes than the Wan2.1 VAE; {REMEDY}") from error
    _refuse_partial(path, found.missing_keys, found.unexpected_keys)
    return model


def _refuse_partial(path: Path, missing: list[str], unexpected: list[str]) -> None:
    for verb, names in (("lacks", sorted(missing)), ("has unknown", sorted(unexpected))):
        if names:
            raise UserError(f"{FIELD}: {path} {verb} {len(names)} tensors, the first {names[0]}; {REMEDY}")


def _architecture(model: AutoencoderKLWan) -> dict[str, Any]:
    """What of the configuration decides the output; named one by one, because libraries add fields over time."""
    return {name: model.config[name] for name in ARCHITECTURE}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
