"""One sample out of a shard, and samples put together into a batch.

Shapes: B batch, T frames, F latent frames, H W height and width, h w latent height and width, N context tokens,
C context width, A actions, da ds action and state dimensions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from dataloaders.files.npy import read_npy
from dataloaders.loading.access import Apart
from dataloaders.loading.memory import Rows
from dataloaders.shards import CorruptData, ShardIndex
from dataloaders.windows import action_count
from kairos_train.basics.errors import UserError, one_line
from kairos_train.basics.foreign_files import parse_json, whole
from kairos_train.basics.geometry import latent_frames, latent_sides

Context = tuple[torch.Tensor, torch.Tensor]
"""float (B, N, C), zeros where the mask is False, and the mask, bool (B, N)."""


@dataclass(frozen=True)
class Sample:
    """One window or clip, decoded. Arrays as in `Batch`, without B and as stored (float16 or float32).

    Attributes:
        contexts: unpadded (N, C), by variant; "" is the primary one.
        actions, state: None where the source has none.
        source: number of its source.
    """

    key: str
    frames: np.ndarray | None
    latents: np.ndarray | None
    contexts: dict[str, np.ndarray]
    actions: np.ndarray | None
    state: np.ndarray | None
    meta: dict[str, Any]
    source: int = 0


@dataclass(frozen=True)
class Batch:
    """What the training step takes. Actions and state are raw (not normalised), encodings are of the type they were
    packed in, mostly float16.

    Attributes:
        contexts: of captions other than the primary one, or without the picture, as packed: "text" (the primary one
            alone), "VARIANT", "VARIANT_text". Samples without a variant have a mask of False.
        action_dim_mask: which dimensions a sample's source has; the rest is padding.
        source: number of each sample's source.
        meta: each sample's JSON: text, task, episode, start, valid_actions, valid_frames, …
    """

    keys: list[str]
    frames: torch.Tensor | None  # uint8 (B, T, H, W, 3) RGB
    latents: torch.Tensor | None  # float (B, 16, F, h, w)
    text: list[str]
    context: torch.Tensor | None  # float (B, N, C), zeros where the mask is False
    context_mask: torch.Tensor | None  # bool (B, N)
    actions: torch.Tensor | None  # float32 (B, A, da), zeros where the masks are False; None: no sample has any
    action_mask: torch.Tensor | None  # bool (B, A)
    state: torch.Tensor | None  # float32 (B, 1, ds)
    meta: list[dict[str, Any]]
    action_dim_mask: torch.Tensor | None = None  # bool (B, da)
    source: list[int] = field(default_factory=list)
    contexts: dict[str, Context] = field(default_factory=dict)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by the torch DataLoader)."""
        return self._map(lambda x: x.pin_memory())

    def digest(self) -> str:
        """A hash of all there is, every tensor's type, shape and bytes included: equal on peers with the same batch."""
        digest = hashlib.sha256(json.dumps([self.keys, self.text, self.source, self.meta]).encode())
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        named |= {f"{name}/{i}": tensor for name, pair in self.contexts.items() for i, tensor in enumerate(pair)}
        for name, value in sorted(named.items()):
            if isinstance(value, torch.Tensor):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped: dict[str, Any] = {k: function(v) for k, v in tensors.items() if isinstance(v, torch.Tensor)}
        mapped["contexts"] = {name: (function(a), function(b)) for name, (a, b) in self.contexts.items()}
        return replace(self, **mapped)


@dataclass(frozen=True)
class BatchSchema:
    """Sizes that batches are padded to, so that sources of different embodiments fit into one: A, da, ds."""

    actions: int
    action_dim: int
    state_dim: int

    @classmethod
    def of(cls, indices: Sequence[ShardIndex]) -> BatchSchema:
        """The largest of all sources."""
        labelled = [index for index in indices if index.action_dim]
        return cls(
            max((action_count(index.window) for index in labelled), default=0),
            max((index.action_dim for index in labelled), default=0),
            max((index.state_dim for index in labelled), default=0),
        )


def decode_sample(
    raw: dict[str, Any],
    index: ShardIndex,
    *,
    with_frames: bool,
    shape: tuple[int, int, int] | None = None,
    source: int = 0,
    frames_into: np.ndarray | None = None,
) -> Sample:
    """Members of one sample (bytes by extension, as `read_shard` gives them) -> Sample.

    Args:
        shape: frames, height and width that the clip must have; None: those of the index's windows.
        frames_into: uint8 (T, H, W, 3) that takes the decoded clip.

    Raises:
        CorruptData: naming the sample: a member is missing, unreadable, not finite, or has not the shape.
    """
    key = raw["__key__"]
    try:
        meta = parse_json(raw["json"])
        actions = state = None
        if index.action_dim:
            actions = _array(raw, "action.npy", (action_count(index.window), index.action_dim))
            state = _array(raw, "state.npy", (1, index.state_dim))
        latents = _latents(raw, index, shape) if "latents.npy" in raw else None
        contexts = {_variant(name): _array(raw, name, (None, None)) for name in raw if name.startswith("context")}
        if not isinstance(meta["text"], str):
            raise ValueError("its JSON has a text that is no text")
        if actions is not None and whole(meta["valid_actions"], "valid_actions") > len(actions):
            raise ValueError("its JSON has valid_actions that do not fit")
        pictures = _frames(raw["mp4"], index, shape, frames_into) if with_frames else None
    except (ImportError, MemoryError):
        raise  # the machine's fault, not the sample's
    except KeyError as error:
        raise CorruptData(key, f"lacks {error.args[0]}") from error
    except Exception as error:  # decoders raise whatever they like on damaged bytes
        reason = one_line(error)
        raise CorruptData(key, f"cannot be decoded ({reason})") from error
    return Sample(key, pictures, latents, contexts, actions, state, meta, source)


def collate(
    samples: Sequence[Sample],
    layout: BatchSchema | None = None,
    *,
    frames: Rows | None = None,
    latents: Rows | None = None,
) -> Batch:
    """Stack samples. Contexts of unequal length are padded on the right; latents, context or frames that any sample
    lacks are None for the whole batch.

    Args:
        layout: what actions and state are padded to; None: the samples' own sizes.
        frames, latents: memory where the samples' own may lie already.

    Raises:
        UserError: clips, latents or contexts of different sizes.
    """
    context, mask = _pad(samples, [sample.contexts.get("") for sample in samples]) or (None, None)
    variants = sorted({name for sample in samples for name in sample.contexts if name})
    return Batch(
        keys=[sample.key for sample in samples],
        frames=_stack(samples, "frames", frames),
        latents=_stack(samples, "latents", latents),
        text=[sample.meta["text"] for sample in samples],
        context=context,
        context_mask=mask,
        meta=[sample.meta for sample in samples],
        source=[sample.source for sample in samples],
        contexts={} if context is None else {name: _variant_of(samples, name) for name in variants},
        **_actions(samples, layout),
    )


def _variant(member: str) -> str:
    return member.removesuffix(".npy").removeprefix("context").removeprefix("_")


def _actions(samples: Sequence[Sample], layout: BatchSchema | None) -> dict[str, torch.Tensor | None]:
    """actions, action_mask, action_dim_mask and state of a batch."""
    given = [sample for sample in samples if sample.actions is not None]
    if not given:
        return {"actions": None, "action_mask": None, "action_dim_mask": None, "state": None}
    if layout is None:
        layout = BatchSchema(*given[0].actions.shape, given[0].state.shape[1])
    actions = torch.zeros(len(samples), layout.actions, layout.action_dim)
    state = torch.zeros(len(samples), 1, layout.state_dim)
    mask = torch.zeros(len(samples), layout.actions, dtype=torch.bool)
    dims = torch.zeros(len(samples), layout.action_dim, dtype=torch.bool)
    for i, sample in enumerate(samples):
        if sample.actions is not None:
            steps, size = sample.actions.shape
            actions[i, :steps, :size] = _tensor(sample.actions)
            state[i, :, : sample.state.shape[1]] = _tensor(sample.state)
            mask[i, : int(sample.meta["valid_actions"])] = True
            dims[i, :size] = True
    return {"actions": actions, "action_mask": mask, "action_dim_mask": dims, "state": state}


def _array(raw: dict[str, Any], member: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """Array of a .npy member whose shape fits (None: any), float16 or float32; pickled content is refused."""
    value = read_npy(*stored) if isinstance(stored := raw[member], Apart) else read_npy(stored)
    if value.ndim != len(shape) or any(want is not None and want != got for want, got in zip(shape, value.shape)):
        raise ValueError(f"{member} has shape {value.shape}, expected {shape}")
    if value.dtype not in (np.float16, np.float32):
        value = value.astype(np.float32)
    if not _finite(value):
        raise ValueError(f"{member} has values that are not finite")
    return value


def _finite(value: np.ndarray) -> bool:
    if value.dtype != np.float16:
        return bool(np.isfinite(value).all())
    # numpy has no fast path for float16. By their bits, infinities and NaN are the largest of either sign: 0x7C00 and
    # above as integers with a sign, 0xFC00 and above as integers without one.
    return not value.size or (int(value.view(np.int16).max()) < 0x7C00 and int(value.view(np.uint16).max()) < 0xFC00)


def _frames(
    mp4: bytes | memoryview, index: ShardIndex, shape: tuple[int, int, int] | None, into: np.ndarray | None
) -> np.ndarray:
    from dataloaders.files.video import decode_mp4, stored_shape

    data, window = bytes(mp4), index.window
    if shape is None:
        shape = stored_shape(data)
        if shape[:2] != (window.frames, window.height) or shape[2] % window.width:
            wanted = f"({window.frames}, {window.height}, n*{window.width}, 3)"
            raise ValueError(f"mp4 has frames of shape {(*shape, 3)}, expected {wanted}")
    return decode_mp4(data, suffix=".mp4", out=np.empty((*shape, 3), np.uint8) if into is None else into)


def _latents(raw: dict[str, Any], index: ShardIndex, shape: tuple[int, int, int] | None) -> np.ndarray:
    frames, height, width = shape or (index.window.frames, index.window.height, index.window.width)
    rows, columns = latent_sides(height, width)
    latents = _array(raw, "latents.npy", (None, latent_frames(frames), rows, None))
    if latents.shape[3] % columns or (shape and latents.shape[3] != columns):
        raise ValueError(f"latents.npy has shape {latents.shape}, expected a width of {columns}")
    return latents


def _stack(samples: Sequence[Sample], name: str, rows: Rows | None) -> torch.Tensor | None:
    values = [getattr(sample, name) for sample in samples]
    if rows is not None and rows.hold(values):
        return rows.whole
    if any(v is None for v in values):
        return None
    for sample, value in zip(samples, values):
        if value.shape != values[0].shape:
            raise _misfit(samples[0], sample, name, values[0].shape, value.shape)
    out = torch.empty((len(values), *values[0].shape), dtype=_type_of(values))
    for row, value in zip(out, values):
        row.copy_(_tensor(value))
    return out


def _type_of(values: Sequence[np.ndarray]) -> torch.dtype:
    """The type that holds all of them."""
    return torch.from_numpy(np.empty(0, np.result_type(*{value.dtype for value in values}))).dtype


def _pad(samples: Sequence[Sample], contexts: Sequence[np.ndarray | None]) -> tuple[torch.Tensor, torch.Tensor] | None:
    if any(c is None for c in contexts):
        return None
    for sample, context in zip(samples, contexts):
        if context.shape[1] != contexts[0].shape[1]:
            raise _misfit(samples[0], sample, "contexts", contexts[0].shape, context.shape)
    lengths = torch.tensor([len(c) for c in contexts])
    out = torch.zeros(len(contexts), int(lengths.max()), contexts[0].shape[1], dtype=_type_of(contexts))
    for row, context in zip(out, contexts):
        row[: len(context)] = _tensor(context)
    return out, torch.arange(out.shape[1])[None, :] < lengths[:, None]


def _variant_of(samples: Sequence[Sample], name: str) -> Context:
    nothing = np.zeros((0, samples[0].contexts[""].shape[1]), samples[0].contexts[""].dtype)
    return _pad(samples, [sample.contexts.get(name, nothing) for sample in samples])


def _tensor(value: np.ndarray) -> torch.Tensor:
    """Without a copy where torch can write to it (it never does)."""
    return torch.from_numpy(value if value.flags.writeable else value.copy())


def _misfit(a: Sample, b: Sample, what: str, first: tuple[int, ...], second: tuple[int, ...]) -> UserError:
    return UserError(
        f"samples {a.key} and {b.key}: {what} of shapes {first} and {second} do not make one batch; pack them alike"
    )
