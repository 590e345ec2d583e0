"""One sample out of a shard, and samples put together into a batch.

Shapes: B batch, T frames, F latent frames, H W height and width, h w latent height and width, N context tokens,
C context width, A actions, da ds action and state dimensions.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from dataloaders.shards import CorruptData, ShardIndex
from dataloaders.windows import action_count


@dataclass(frozen=True)
class Sample:
    """One window, decoded. Arrays as in `Batch`, without B; `context` unpadded (N, C)."""

    key: str
    frames: np.ndarray | None
    latents: np.ndarray | None
    context: np.ndarray | None
    actions: np.ndarray
    state: np.ndarray
    meta: dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """What the training step takes. Actions and state are raw (not normalised)."""

    keys: list[str]
    frames: torch.Tensor | None  # uint8 (B, T, H, W, 3) RGB
    latents: torch.Tensor | None  # float32 (B, 16, F, h, w)
    text: list[str]
    context: torch.Tensor | None  # float32 (B, N, C), zeros where the mask is False
    context_mask: torch.Tensor | None  # bool (B, N)
    actions: torch.Tensor  # float32 (B, A, da), zeros where the mask is False
    action_mask: torch.Tensor  # bool (B, A)
    state: torch.Tensor  # float32 (B, 1, ds)
    meta: list[dict[str, Any]]  # each sample's JSON: text, task, episode, start, valid_actions, valid_frames, …

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by the torch DataLoader)."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, function) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in tensors.items() if isinstance(v, torch.Tensor)})


def decode_sample(raw: dict[str, Any], index: ShardIndex, *, with_frames: bool) -> Sample:
    """Members of one sample (bytes by extension, as `read_shard` gives them) -> Sample.

    Raises:
        CorruptData: naming the sample: a member is missing, unreadable, not finite, or has not the index's shape.
    """
    key = raw["__key__"]
    try:
        meta = json.loads(raw["json"])
        actions = _array(raw, "action.npy", (action_count(index.window), index.action_dim))
        state = _array(raw, "state.npy", (1, index.state_dim))
        latents = context = frames = None
        if "latents.npy" in raw:
            latents = _array(raw, "latents.npy", (None, (index.window.frames - 1) // 4 + 1, None, None))
        if "context.npy" in raw:
            context = _array(raw, "context.npy", (None, None))
        if with_frames:
            frames = _frames(raw["mp4"], index)
        if not (isinstance(meta["text"], str) and 0 <= int(meta["valid_actions"]) <= len(actions)):
            raise ValueError("its JSON has a text or valid_actions that do not fit")
    except (ImportError, MemoryError):
        raise  # the machine's fault, not the sample's
    except KeyError as error:
        raise CorruptData(key, f"lacks {error.args[0]}") from error
    except Exception as error:  # decoders raise whatever they like on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorruptData(key, f"cannot be decoded ({reason})") from error
    return Sample(key, frames, latents, context, actions, state, meta)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples. Contexts of unequal length are padded on the right; latents, context or frames that any sample
    lacks are None for the whole batch."""
    valid = torch.tensor([sample.meta["valid_actions"] for sample in samples])
    actions = torch.from_numpy(np.stack([sample.actions for sample in samples]))
    context, mask = _pad([sample.context for sample in samples])
    return Batch(
        keys=[sample.key for sample in samples],
        frames=_stack([sample.frames for sample in samples]),
        latents=_stack([sample.latents for sample in samples]),
        text=[sample.meta["text"] for sample in samples],
        context=context,
        context_mask=mask,
        actions=actions,
        action_mask=torch.arange(actions.shape[1])[None, :] < valid[:, None],
        state=torch.from_numpy(np.stack([sample.state for sample in samples])),
        meta=[sample.meta for sample in samples],
    )


def _array(raw: dict[str, Any], member: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """float32 array of a .npy member whose shape fits (None: any); pickled content is refused."""
    value = np.load(io.BytesIO(raw[member]), allow_pickle=False)
    if value.ndim != len(shape) or any(want is not None and want != got for want, got in zip(shape, value.shape)):
        raise ValueError(f"{member} has shape {value.shape}, expected {shape}")
    value = value.astype(np.float32)
    if not np.isfinite(value).all():
        raise ValueError(f"{member} has values that are not finite")
    return value


def _frames(mp4: bytes, index: ShardIndex) -> np.ndarray:
    from dataloaders.video import decode_mp4

    frames, window = decode_mp4(mp4), index.window
    if len(frames) != window.frames or frames.shape[1] != window.height or frames.shape[2] % window.width:
        wanted = f"({window.frames}, {window.height}, n*{window.width}, 3)"
        raise ValueError(f"mp4 has frames of shape {frames.shape}, expected {wanted}")
    return frames


def _stack(values: Sequence[np.ndarray | None]) -> torch.Tensor | None:
    return None if any(v is None for v in values) else torch.from_numpy(np.stack(values))


def _pad(contexts: Sequence[np.ndarray | None]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if any(c is None for c in contexts):
        return None, None
    lengths = torch.tensor([len(c) for c in contexts])
    out = np.zeros((len(contexts), int(lengths.max()), contexts[0].shape[1]), dtype=np.float32)
    for row, context in zip(out, contexts):
        row[: len(context)] = context
    return torch.from_numpy(out), torch.arange(out.shape[1])[None, :] < lengths[:, None]
