"""Training of the small video codec (`kairos_train.conditioning.tiny_vae`) on packed windows.

Each step takes random crops of random parts of the windows of every source in equal numbers. The loss is the squared
and, less, the absolute error of the decoded pixels, more where a pixel differs from the clip's first frame (robots are
small, tables are large), and a light pull of the latents towards zero (the KL term of a posterior of fixed spread).
What is kept is the moving average of the weights, with the latents' mean and spread measured under it.

Shapes: B crops, T frames, F latent frames, H W pixels.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dataloaders.config import DataConfig
from dataloaders.loading.cursor import LoaderShard
from dataloaders.loading.loader import ShardLoader
from kairos_train.basics.errors import UserError, one_line
from kairos_train.basics.files import describe_file, new_folder, replacing, write_json
from kairos_train.basics.geometry import SPACE_STRIDE, TIME_STRIDE
from kairos_train.conditioning.tiny_vae import NOISE, TinyAutoencoder, to_pixels
from kairos_train.config.codec_recipe import CodecRecipe

ABSOLUTE, KL = 0.025, 1e-5  # weights beside the squared error
MOVING, MOVED = 5.0, 0.08  # weight of pixels that differ by more than this (of 2) from the clip's first frame
BETAS, WEIGHT_DECAY, WARMUP, FINAL = (0.9, 0.98), 1e-4, 100, 0.02  # the cosine ends at this share of the rate
EMA = 0.998
MEASURED = 20  # batches from which the latents' mean and spread are taken


def train_codec(
    shards: Sequence[Path],
    out: Path,
    recipe: CodecRecipe,
    *,
    say: Callable[[str], object] = print,
    say_every: int = 100,
) -> dict[str, Any]:
    """Train a codec and write `model.safetensors` and `codec.json` into the new folder `out`.

    The state of an unfinished training is beside `out`, as NAME.training.pt; the same call goes on from it
    exactly as if it had never stopped, and removes it at the end.

    Args:
        shards: folders of windows.
        say: takes a line of progress every `say_every` steps.

    Returns:
        What codec.json holds.

    Raises:
        UserError: `out` exists; a recipe that cannot be trained by, or windows of fewer than 5 frames; a state that
            cannot be read, or is of other shards or another recipe.
    """
    if recipe.crop % SPACE_STRIDE:
        raise UserError(f"--crop {recipe.crop}: must be a multiple of {SPACE_STRIDE}")
    if not 0 < recipe.lr < math.inf:
        raise UserError(f"--lr {recipe.lr}: must be above 0 and finite")
    if out.exists():
        raise UserError(f"--out {out}: exists; name a new folder")
    started = time.monotonic()
    training = _Training(shards, recipe)
    state = out.with_name(out.name + ".training.pt")
    if state.exists():
        training.load(state)
        say(f"continues at step {training.step} of {recipe.steps}")
    error = 0.0
    while training.step < recipe.steps:
        error += training.next() / say_every
        if training.step % say_every == 0:
            say(f"step {training.step} of {recipe.steps}: {decibels(error):.2f} dB on the crops")
            error = 0.0
        if training.step % recipe.save_every == 0 and training.step < recipe.steps:
            training.save(state, seconds=time.monotonic() - started)
    model = training.finish()
    with new_folder(out) as folder:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
        about = {
            "kind": "tiny_vae",
            "parameters": sum(p.numel() for p in model.parameters()),
            "recipe": vars(recipe),
            "shards": [loader.index.fingerprint for loader in training.loaders],
            "hours": (training.seconds + time.monotonic() - started) / 3600,
            "threads": torch.get_num_threads(),
            "weights": describe_file(folder / "model.safetensors"),
        }
        write_json(folder / "codec.json", about)
    state.unlink(missing_ok=True)
    return about


def decibels(error: float) -> float:
    """PSNR of a mean squared error of pixels in [-1, 1]."""
    return 10 * math.log10(4 / max(error, 1e-12))


class _Training:
    """The loop's state. `seconds`: what earlier processes took."""

    def __init__(self, shards: Sequence[Path], recipe: CodecRecipe) -> None:
        if not 1 <= len(shards) <= recipe.batch:
            raise UserError(f"--batch {recipe.batch}: must hold a crop of each of {len(shards)} folders of shards")
        self.recipe, self.step, self.seconds = recipe, 0, 0.0
        torch.manual_seed(recipe.seed)
        self.model = TinyAutoencoder()
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.lr, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.loaders = []
        for number, folder in enumerate(shards):
            count = recipe.batch // len(shards) + (number < recipe.batch % len(shards))
            data = DataConfig(shards=str(folder), workers=recipe.workers)
            loader = ShardLoader(data, LoaderShard(count, 1, 0, 1), seed=recipe.seed)
            window = loader.index.window
            if window.frames <= TIME_STRIDE:
                raise UserError(f"{folder}: its windows are of {window.frames} frames; the codec needs 5 or more")
            self.loaders.append(loader)

    def next(self) -> float:
        """One optimiser step; the mean squared error of its crops."""
        recipe, step = self.recipe, self.step
        for group in self.optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
            group["lr"] = recipe.lr * min(1.0, (step + 1) / WARMUP) * (FINAL + (1 - FINAL) * cosine)
        squared = 0.0
        clips = list(self._clips())
        for pixels in clips:  # of one shape each
            share = len(pixels) / recipe.batch
            loss, error = self._loss(pixels)
            (share * loss).backward()
            squared += share * error
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        keep = min(EMA, self.step / (self.step + 20))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 1 - keep)
        return squared

    def finish(self) -> TinyAutoencoder:
        """The averaged model with its latents' mean and spread."""
        model = TinyAutoencoder()
        model.load_state_dict(self.average)
        with torch.no_grad():
            parts = [model.encode(pixels) for _ in range(MEASURED) for pixels in self._clips()]
        flat = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1)  # 16, all places
        model.mean.copy_(flat.mean(1))
        model.std.copy_(flat.std(1))
        for loader in self.loaders:
            loader.close()
        return model

    def save(self, path: Path, *, seconds: float) -> None:
        with replacing(path) as temporary:
            torch.save(
                {
                    "step": self.step,
                    "seconds": self.seconds + seconds,
                    "recipe": vars(self.recipe),
                    "model": self.model.state_dict(),
                    "average": self.average,
                    "optimizer": self.optimizer.state_dict(),
                    "generator": self.generator.get_state(),
                    "random": torch.get_rng_state(),
                    "loaders": [loader.state_dict() for loader in self.loaders],
                },
                temporary,
            )

    def load(self, path: Path) -> None:
        try:
            state = torch.load(path, weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(f"{path}: cannot be read ({one_line(error)}); remove it to begin again") from error
        if state["recipe"] != vars(self.recipe) or len(state["loaders"]) != len(self.loaders):
            raise UserError(f"{path}: is of another training ({state['recipe']}); repeat its command, or remove it")
        for loader, position in zip(self.loaders, state["loaders"]):
            loader.load_state_dict(position)
        self.step, self.seconds, self.average = state["step"], state["seconds"], state["average"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["random"])

    def _clips(self) -> Iterator[Tensor]:
        """Crops of a step, float32 (B,T,3,H,W) in [-1, 1], by source; T the same for all."""
        longest = min(loader.index.window.frames for loader in self.loaders)
        frames = TIME_STRIDE * self._below(min(3, (longest - 1) // TIME_STRIDE)) + TIME_STRIDE + 1  # 5, 9 or 13
        for loader in self.loaders:
            clips = next(loader).frames
            crops = [self._crop(clip, frames) for clip in clips]
            yield to_pixels(torch.stack(crops))

    def _crop(self, clip: Tensor, frames: int) -> Tensor:
        """A random part of uint8 (T,H,W,3)."""
        begin = self._below(len(clip) - frames + 1)
        sides = [min(self.recipe.crop, size) for size in clip.shape[1:3]]
        top, left = (self._below(size - side + 1) for size, side in zip(clip.shape[1:3], sides))
        return clip[begin : begin + frames, top : top + sides[0], left : left + sides[1]]

    def _below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))

    def _loss(self, pixels: Tensor) -> tuple[Tensor, float]:
        with torch.autocast("cpu", torch.bfloat16):
            latents = self.model.encode(pixels)
            decoded = self.model.decode(latents + NOISE * torch.randn_like(latents))
        difference = decoded.float() - pixels
        moved = (pixels - pixels[:, :1]).abs().amax(2, keepdim=True) > MOVED
        squared = difference.square()
        weighted = (squared * torch.where(moved, MOVING, 1.0)).mean()
        loss = weighted + ABSOLUTE * difference.abs().mean() + KL * latents.float().square().mean()
        return loss, float(squared.detach().mean())
