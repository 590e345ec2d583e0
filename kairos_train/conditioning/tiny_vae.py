"""A small learned video codec in the geometry of the Wan2.1 VAE, for demos and tests on a CPU. All of it ours.

About a million parameters, trained by `kairos-train codec train` on packed windows. It is no substitute for the real
VAE: on pictures unlike those of its training it blurs.

Pixels in [-1, 1] -> 4×4 pixel unshuffle -> residual blocks at 1/4, then 1/8 of the resolution, frame by frame -> the 4
frames of a latent frame stacked in channels (the first frame, repeated, is the first latent frame) -> residual blocks
and causal convolutions over latent frames -> 16 channels, normalised by their mean and standard deviation over the
training frames. The decoder is the mirror image. A latent frame depends on no later frame, and so does a decoded one.

Trained as a variational autoencoder whose posterior has one fixed standard deviation (`NOISE`): what is decoded under a
small perturbation is smooth enough for a diffusion model. `encode` gives the posterior's mean.

Shapes: B batch, T frames, F = (T - 1) / 4 + 1 latent frames, H W pixels, h = H/8, w = W/8, D channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kairos_train.basics.errors import UserError, one_line
from kairos_train.basics.foreign_files import refuse_lfs_pointer
from kairos_train.basics.geometry import LATENT_CHANNELS, TIME_STRIDE
from kairos_train.conditioning.interfaces import latent_shape, weights_sha256

FIELD = "encoders.video.path"
REMEDY = "name the model.safetensors that `kairos-train codec train` has written"
PATCH = 4  # pixels of a side that are unshuffled into channels
FINE, COARSE, STACKED = 48, 128, 160  # channels at 1/4 and 1/8 of the resolution, and of a latent frame
NOISE = 0.05  # standard deviation of the posterior, in the units before normalisation


class TinyVAE:
    """VideoEncoder with the learned weights, in float32. A batch is encoded at once; its size bounds the memory."""

    def __init__(self, path: str | Path | None, device: str | torch.device = "cpu") -> None:
        """Raises UserError when `path` is None, missing, unreadable or another model."""
        if path is None:
            raise UserError(f"{FIELD}: not set, but encoders.video.kind=tiny_vae needs weights; {REMEDY}")
        self._model = load_tiny_vae(Path(path)).to(device).eval().requires_grad_(False)
        self._identity = {"kind": "tiny_vae", "weights_sha256": weights_sha256(self._model.state_dict())}

    @property
    def identity(self) -> dict[str, Any]:
        return dict(self._identity)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """uint8 (B,T,H,W,3) -> float32 (B,16,F,h,w). Raises UserError as VideoEncoder.encode does."""
        latent_shape(frames)
        return self._model.normalized(self._model.encode(to_pixels(frames.to(self._model.mean.device)))).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B,16,F,h,w) -> uint8 (B,T,H,W,3), T = 4 (F - 1) + 1."""
        pixels = self._model.decode(self._model.denormalized(latents.to(self._model.mean)))
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()


class TinyAutoencoder(nn.Module):
    """The encoder and decoder as they are trained.

    Attributes:
        mean, std: of the latents' channels over the training frames, (16,).
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = _Encoder(), _Decoder()
        self.register_buffer("mean", torch.zeros(LATENT_CHANNELS))
        self.register_buffer("std", torch.ones(LATENT_CHANNELS))

    def encode(self, pixels: Tensor) -> Tensor:
        """(B,T,3,H,W) in [-1, 1] -> mean of the posterior (B,16,F,h,w), not normalised."""
        return self.encoder(pixels).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """(B,16,F,h,w), not normalised -> (B,T,3,H,W), not clamped."""
        return self.decoder(latents.transpose(1, 2))

    def normalized(self, latents: Tensor) -> Tensor:
        """Latents as a diffusion model sees them, (B,16,F,h,w)."""
        return (latents - self.mean.view(1, -1, 1, 1, 1)) / self.std.view(1, -1, 1, 1, 1)

    def denormalized(self, latents: Tensor) -> Tensor:
        """The inverse of `normalized`."""
        return latents * self.std.view(1, -1, 1, 1, 1) + self.mean.view(1, -1, 1, 1, 1)


def to_pixels(frames: Tensor) -> Tensor:
    """uint8 (B,T,H,W,3) -> float32 (B,T,3,H,W) in [-1, 1]."""
    return frames.permute(0, 1, 4, 2, 3).float() / 127.5 - 1


def load_tiny_vae(path: Path) -> TinyAutoencoder:
    """The model with the weights of a file that `kairos-train codec train` wrote.

    Raises:
        UserError: the file is missing, unreadable or of another model.
    """
    if not path.is_file():
        raise UserError(f"{FIELD}: {path} does not exist; {REMEDY}")
    refuse_lfs_pointer(path)
    try:
        tensors = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{FIELD}: {path} cannot be read ({one_line(error)}); {REMEDY}") from error
    model = TinyAutoencoder()
    wanted, found = ({k: tuple(v.shape) for k, v in state.items()} for state in (model.state_dict(), tensors))
    if wanted != found:
        name = next(name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name))
        raise UserError(
            f"{FIELD}: {path}: tensor {name} is {found.get(name, 'missing')}, this codec has"
            f" {wanted.get(name, 'none')}; {REMEDY}"
        )
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model


class _Block(nn.Module):
    """(N,D,y,x) + a depthwise convolution, normalised, through a pointwise bottleneck."""

    def __init__(self, channels: int, expansion: int = 3) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.GroupNorm(1, channels)
        self.widen = nn.Conv2d(channels, expansion * channels, 1)
        self.narrow = nn.Conv2d(expansion * channels, channels, 1)
        self.gain = nn.Parameter(torch.full((1, channels, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.narrow(nn.functional.silu(self.widen(self.norm(self.depthwise(x)))))


class _CausalTime(nn.Module):
    """(B,F,D,y,x) + a mix of each latent frame and the two before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.taps = nn.Parameter(torch.full((3, channels, 1, 1), 1 / 3))
        self.mix = nn.Conv2d(channels, channels, 1)
        self.gain = nn.Parameter(torch.full((1, channels, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.flatten(0, 1)).view_as(x)
        before = nn.functional.pad(y, (0, 0, 0, 0, 0, 0, 2, 0))
        y = self.taps[0] * before[:, :-2] + self.taps[1] * before[:, 1:-1] + self.taps[2] * y
        return x + (self.gain * self.mix(nn.functional.silu(y.flatten(0, 1)))).view_as(x)


class _Core(nn.Module):
    """Two rounds of space and time on latent frames (B,F,D,h,w)."""

    def __init__(self) -> None:
        super().__init__()
        self.space = nn.ModuleList([_Block(STACKED, 2), _Block(STACKED, 2)])
        self.time = nn.ModuleList([_CausalTime(STACKED), _CausalTime(STACKED)])

    def forward(self, x: Tensor) -> Tensor:
        for space, time in zip(self.space, self.time):
            x = time(space(x.flatten(0, 1)).view_as(x))
        return x


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3 * PATCH**2, FINE, 3, padding=1)
        self.fine = nn.Sequential(_Block(FINE), _Block(FINE))
        self.down = nn.Conv2d(FINE, COARSE, 2, stride=2)
        self.coarse = nn.Sequential(_Block(COARSE), _Block(COARSE))
        self.stack = nn.Conv2d(TIME_STRIDE * COARSE, STACKED, 1)
        self.core = _Core()
        self.out = nn.Conv2d(STACKED, LATENT_CHANNELS, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B,T,3,H,W) -> (B,F,16,h,w)."""
        batch = pixels.shape[0]
        pixels = torch.cat([pixels[:, :1].expand(-1, TIME_STRIDE - 1, -1, -1, -1), pixels], 1)
        x = nn.functional.pixel_unshuffle(pixels.flatten(0, 1), PATCH)
        x = self.coarse(self.down(self.fine(self.stem(x))))  # B4F,D,h,w
        x = self.stack(x.reshape(-1, TIME_STRIDE * COARSE, *x.shape[2:]))
        x = self.core(x.view(batch, -1, *x.shape[1:]))
        return self.out(x.flatten(0, 1)).view(batch, -1, LATENT_CHANNELS, *x.shape[3:])


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Conv2d(LATENT_CHANNELS, STACKED, 3, padding=1)
        self.core = _Core()
        self.unstack = nn.Conv2d(STACKED, TIME_STRIDE * COARSE, 1)
        self.coarse = nn.Sequential(_Block(COARSE), _Block(COARSE))
        self.up = nn.Conv2d(COARSE, 4 * FINE, 1)
        self.fine = nn.Sequential(_Block(FINE), _Block(FINE))
        self.out = nn.Conv2d(FINE, 3 * PATCH**2, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """(B,F,16,h,w) -> (B,T,3,H,W)."""
        batch = latents.shape[0]
        x = self.inp(latents.flatten(0, 1))
        x = self.core(x.view(batch, -1, *x.shape[1:]))
        x = self.unstack(x.flatten(0, 1))
        x = self.coarse(x.reshape(-1, COARSE, *x.shape[2:]))  # B4F,D,h,w
        x = self.fine(nn.functional.pixel_shuffle(self.up(x), 2))
        pixels = nn.functional.pixel_shuffle(self.out(x), PATCH)
        pixels = pixels.view(batch, -1, *pixels.shape[1:])
        return pixels[:, TIME_STRIDE - 1 :]
