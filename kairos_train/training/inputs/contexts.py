"""Which text conditions a sample, and whether with the first frame: by its condition and the stage's captions.

t2v and t2i samples are given the caption alone, for what is generated includes the first frame; ti2v samples the
caption read together with it, where the text encoder looks at pictures. (i2v takes the empty prompt, null2v and n2i
zeros, dropout either: `FlowMatching` puts them in the place of what is chosen here.)

`stage.captions` is a schedule over captions by name: shares that change linearly from the stage's beginning to its end.
A sample that has only some of the captions draws among those; one that has none is given its primary caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dataloaders.loading.batch import Batch
from dataloaders.shards import ShardIndex
from kairos_train.basics.errors import UserError
from kairos_train.conditioning.interfaces import TextEncoder
from kairos_train.config.schema import CaptionShare
from kairos_train.objective.randomness import Choices, pick

WITH_PICTURE = ("ti2v",)


class Contexts:
    """Chooses, from what is cached or by encoding.

    Args:
        captions: the stage's schedule; empty: primary captions.
        encoder: for batches without cached contexts; None: there are none.
        sees_pictures: whether the text encoder looks at the first frame.
        device: where the results lie.
    """

    def __init__(
        self,
        captions: Sequence[CaptionShare],
        encoder: TextEncoder | None,
        *,
        sees_pictures: bool,
        device: torch.device,
    ) -> None:
        self._captions, self._encoder = captions, encoder
        self._sees_pictures, self._device = sees_pictures, device

    def of(self, batch: Batch, choices: Sequence[Choices], *, progress: float) -> tuple[Tensor, Tensor]:
        """Contexts float32 (B, N, C), zero where the mask is False, and masks bool (B, N).

        Args:
            progress: share of the stage that is done.

        Raises:
            UserError: cached contexts lack the one that is needed.
        """
        names = [self._caption(meta, choice.caption, progress) for meta, choice in zip(batch.meta, choices)]
        pictured = [self._sees_pictures and choice.condition in WITH_PICTURE for choice in choices]
        rows = (self._cached if batch.context is not None else self._encoded)(batch, names, pictured)
        longest = max(len(row) for row in rows)
        context = torch.zeros(len(rows), longest, rows[0].shape[1], device=self._device)
        for place, row in zip(context, rows):
            place[: len(row)] = row
        lengths = torch.tensor([len(row) for row in rows], device=self._device)
        return context, torch.arange(longest, device=self._device) < lengths[:, None]

    def _caption(self, meta: dict[str, Any], draw: float, progress: float) -> str:
        """The name of a sample's caption; "" is the primary one."""
        shares = caption_shares(self._captions, progress)
        own = {name: share for name, share in shares.items() if share > 0 and name in meta.get("captions", {})}
        if not own:
            return ""
        name = pick({name: share / sum(own.values()) for name, share in own.items()}, draw)
        return "" if name == meta.get("primary_caption") else name

    def _cached(self, batch: Batch, names: list[str], pictured: list[bool]) -> list[Tensor]:
        rows = []
        for i, (name, picture) in enumerate(zip(names, pictured)):
            variant = name if picture or not self._sees_pictures else f"{name}_text" if name else "text"
            context, mask = (
                (batch.context, batch.context_mask) if not variant else batch.contexts.get(variant, (None, None))
            )
            if context is None or not mask[i].any():
                what = "context_" + variant + ".npy"
                raise UserError(f"sample {batch.keys[i]} lacks {what}: pack the source again with --encode")
            rows.append(context[i, mask[i]].to(self._device).float())
        return rows

    def _encoded(self, batch: Batch, names: list[str], pictured: list[bool]) -> list[Tensor]:
        texts = [meta["captions"][name] if name else text for meta, name, text in zip(batch.meta, names, batch.text)]
        rows: dict[int, Tensor] = {}
        for picture in sorted(set(pictured)):
            some = [i for i, wanted in enumerate(pictured) if wanted == picture]
            images = batch.frames[some, 0].to(self._device) if picture else None
            context, mask = self._encoder.encode([texts[i] for i in some], images)
            rows |= {i: context[row, mask[row]].to(self._device).float() for row, i in enumerate(some)}
        return [rows[i] for i in range(len(texts))]


def caption_shares(captions: Sequence[CaptionShare], progress: float) -> dict[str, float]:
    """Share of each caption at `progress` in [0, 1] of the stage."""
    return {c.name: c.start if c.end is None else c.start + (c.end - c.start) * progress for c in captions}


def check_captions(captions: Sequence[CaptionShare], indices: Sequence[ShardIndex]) -> None:
    """Raise UserError when no source has a caption of the schedule."""
    there = {name for index in indices for name in index.captions}
    for share in captions:
        if share.name not in there:
            found = ", ".join(sorted(there)) or "one caption without a name"
            raise UserError(
                f"stage.captions: no source has a caption called {share.name!r}; there are: {found}; name those, or "
                "set stage.captions=[] for the primary one of each sample"
            )
