"""Windows of packed shards that a trained model is judged on: which ones, and as what the model sees them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from dataloaders.loading.batch import Batch, Sample, collate, decode_sample
from dataloaders.shards import CorruptData, ShardIndex, read_index, read_shard
from dataloaders.windows import POLICY_FIELDS
from kairos_train.basics.errors import UserError
from kairos_train.basics.geometry import video_frames
from kairos_train.basics.progress import progress
from kairos_train.conditioning.interfaces import identities_match
from kairos_train.inference.load import Policy, for_robot, load
from kairos_train.inference.predict import Predictor
from kairos_train.inference.robots import matching
from kairos_train.inference.sampler import Conditions


def open_policy(
    export: Path, shards: Path, *, robot: str | None = None, device: str = "cpu", dtype: str | None = None
) -> tuple[Policy, ShardIndex]:
    """An export and the shards that it is judged on; of several robots it is loaded for the one that these are of.

    Args:
        robot: its name; None: by the shards' dataset, or else their windows and sizes.

    Raises:
        UserError: as `load` and `open_shards`; shards that may be of several robots.
    """
    policy = load(export, device=device, dtype=dtype, robot=robot)
    if robot is None and policy.robots:
        index = read_index(shards)
        window, sizes = asdict(index.window), {"action_dim": index.action_dim, "state_dim": index.state_dim}
        found = matching(policy.robots, index.source.get("dataset"), window=window, **sizes)
        if len(found) > 1:
            names = ", ".join(one.name for one in found)
            raise UserError(
                f"{shards}: may be of several robots of {export} ({names}); say which one with --robot NAME"
            )
        if found:
            policy = for_robot(policy, found[0])
    return policy, open_shards(shards, policy)


def open_shards(shards: Path, policy: Policy) -> ShardIndex:
    """The index of a shard folder that fits a policy.

    Raises:
        UserError: no shard folder, or one with other windows, dimensions or encoders than the model was trained with.
    """
    index = read_index(shards)
    _check_sizes(index)
    trained = policy.config.data.window
    pairs = [(f"window.{name}", getattr(index.window, name), getattr(trained, name)) for name in POLICY_FIELDS]
    if policy.acts:
        pairs += [("action_dim", index.action_dim, policy.action_dim), ("state_dim", index.state_dim, policy.state_dim)]
    for name, found, wanted in pairs:
        if found != wanted:
            raise UserError(f"{shards}: {name} is {found}, the model was trained with {wanted}; pack them alike")
    if policy.cameras and index.cameras and policy.cameras != index.cameras:
        found, wanted = ",".join(index.cameras), ",".join(policy.cameras)
        raise UserError(f"{shards}: cameras are {found}, the model was trained with {wanted}; pack them alike")
    if index.encoders is not None and policy.encoders is not None:
        identities_match(index.encoders, policy.encoders)
    return index


def spread_batches(
    index: ShardIndex, *, count: int, batch_size: int, with_frames: bool, what: str = "windows"
) -> Iterator[Batch]:
    """`count` windows evenly spread over all shards (all of them when there are fewer), the same at every call.

    Args:
        what: is done with them, for the report of how far that is.

    Raises:
        UserError: `count` or `batch_size` below 1; a shard or sample is damaged.
    """
    for name, value in (("samples", count), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    samples, done = _spread(index, count, with_frames), 0
    with progress(what, min(count, index.samples), "windows") as advance:
        while chunk := list(itertools.islice(samples, batch_size)):
            yield collate(chunk)
            advance(done := done + len(chunk))


def window_seed(seed: int, key: str) -> int:
    """Seed of a window's noise: a function of the evaluation's seed and the window's key, whatever the batching."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:6], "big")


def observe(predictor: Predictor, batch: Batch) -> Conditions:
    """What the model is given of a batch: its first frames, state and text; stored encodings are taken as they are.

    Raises:
        UserError: stored texts were read together with pictures that this model is not given.
    """
    given = predictor.policy.history_frames
    latents, frames = None if batch.latents is None else batch.latents.float(), batch.frames
    return predictor.conditions(
        texts=batch.text,
        state=batch.state if predictor.policy.acts else None,
        frames=frames[:, : given_frames(given)] if given and frames is not None else None,
        history=latents[:, :, :given] if given and latents is not None else None,
        context=_stored_context(predictor, batch),
    )


def given_frames(history_frames: int) -> int:
    """Video frames that K history latent frames stand for."""
    return video_frames(history_frames) if history_frames else 0


def mean_of(policy: Policy, group: str) -> torch.Tensor:
    """Dataset mean of "action" or "state" in raw units, float32 (D,)."""
    window = policy.config.data.window
    key = window.action_key if group == "action" else window.state_key
    return torch.tensor(policy.statistics[group][key]["global_mean"], dtype=torch.float32)


def _check_sizes(index: ShardIndex) -> None:
    """Raise UserError when samples differ in size: the model's windows are of one."""
    window = index.window
    for shape in index.shapes if index.clips is not None else []:
        found = (shape["frames"], shape["height"], shape["width"])
        if found != (window.frames, window.height, window.width):
            raise UserError(
                f"{index.folder}: holds clips of {found[0]} frames of {found[1]}×{found[2]} pixels, windows are of "
                f"{window.frames} frames of {window.height}×{window.width}; pack windows of a dataset to evaluate on"
            )


def _stored_context(predictor: Predictor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The text's encoding in the shards, float32 (B, N, C) and mask: with the first frame where the model is given it;
    None: there is none."""
    if batch.context is None:
        return None
    context, mask = batch.context, batch.context_mask
    if not predictor.policy.history_frames and predictor.encoders.text.identity.get("image", True):
        if "text" not in batch.contexts or not batch.contexts["text"][1].any(1).all():
            raise UserError(f"sample {batch.keys[0]} lacks context_text.npy: pack the source again with --encode")
        context, mask = batch.contexts["text"]
    return context.float(), mask


def _spread(index: ShardIndex, count: int, with_frames: bool) -> Iterator[Sample]:
    wanted = set(np.linspace(0, index.samples - 1, min(count, index.samples)).round().astype(int).tolist())
    first = 0
    try:
        for shard in index.shards:
            inside = {position - first for position in wanted if first <= position < first + shard.samples}
            if inside:
                for position, raw in enumerate(read_shard(index.folder, shard)):
                    if position in inside:
                        yield decode_sample(raw, index, with_frames=with_frames)
            first += shard.samples
    except CorruptData as error:
        raise UserError(f"{index.folder}: {error}; restore or repack the shards") from error
