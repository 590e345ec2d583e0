"""The attention windows of the video stream, by attention kind, in frames (model specification, "The attention kinds"
and "Token-window variant").

A `WindowSpec` has two forms. `attends` decides for one pair of tokens: a dense mask (the oracle) and FlexAttention
evaluate it. `window_plan` lists which query frames read which key frames, so that a backend gathers windows and builds
no S×S mask.

Shapes: B batch, F latent frames, L tokens per frame.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kairos_train.config.schema import VideoStreamConfig


@dataclass(frozen=True)
class WindowSpec:
    """The windows of one layer.

    Attributes:
        kind: SWA, DSWA or FA.
        window: in frames.
        dilation: of DSWA, in frames.
        token_window: the public video-only reading, |i − j| ≤ window·L tokens, history like any other frame.
        restrict_history: a history query sees history keys only.
        all_attend_history: every query sees all history keys as well.
        history_causal: a history query sees its own frame and earlier ones only.
    """

    kind: str
    window: int
    dilation: int
    token_window: bool
    restrict_history: bool
    all_attend_history: bool
    history_causal: bool = False

    @classmethod
    def of(cls, kind: str, config: VideoStreamConfig) -> "WindowSpec":
        """The windows of a layer of `kind` in a video stream."""
        return cls(
            kind=kind,
            window=config.window_frames,
            dilation=config.dilation,
            token_window=config.window_semantics == "token",
            restrict_history=config.restrict_history_query_to_history,
            all_attend_history=config.all_attend_history,
            history_causal=config.history_causal,
        )

    def step(self, frames: int) -> int:
        """Distance in frames between neighbouring keys of a window of `frames` frames."""
        if self.kind != "DSWA":
            return 1
        # The token reading falls back to the undilated window when there is no more than one whole group.
        return 1 if self.token_window and frames // self.dilation <= 1 else self.dilation

    def reach(self) -> int | None:
        """How many frames back a query reads keys, in the frame reading; None: all."""
        return None if self.kind == "FA" else (self.window - 1) * (self.dilation if self.kind == "DSWA" else 1)

    def padded_frames(self, frames: int) -> int:
        """Frames after zero padding: DSWA read in tokens pads to whole groups, a full one when it divides evenly."""
        step = self.step(frames)
        return frames + step - frames % step if self.token_window and step > 1 else frames


def key_frames(spec: WindowSpec, frame: int, frames: int, num_history: int) -> tuple[int, ...]:
    """The frames that queries of `frame` read, ascending; numbers ≥ `frames` are zero padding (token reading only).

    Args:
        frames: F.
        num_history: K, the sample's history frames.
    """
    if spec.token_window:
        if spec.kind == "FA":
            return tuple(range(frames))
        step = spec.step(frames)
        reach = [frame + step * o for o in range(-spec.window, spec.window + 1)]
        return tuple(g for g in reach if 0 <= g < spec.padded_frames(frames))
    step = spec.step(frames)
    keys = {
        g
        for g in range(frames)
        if spec.kind == "FA" or ((g - frame) % step == 0 and abs(g - frame) < spec.window * step)
    }
    if spec.restrict_history and frame < num_history:
        keys = {g for g in keys if g < num_history}
    if spec.all_attend_history:
        keys |= set(range(num_history))
    if spec.history_causal and frame < num_history:
        keys = {g for g in keys if g <= frame}
    return tuple(sorted(keys))


@lru_cache(maxsize=256)
def frames_read(spec: WindowSpec, frames: int, history: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """For each of F frames, the frames that its queries read in any sample of a batch; padding is not counted.

    Args:
        frames: F, of every sample.
        history: K of each sample, length B.
    """
    lengths = sorted(set(history))
    unions = [{g for k in lengths for g in key_frames(spec, f, frames, k)} for f in range(frames)]
    return tuple(tuple(sorted(g for g in union if g < frames)) for union in unions)


@dataclass(frozen=True)
class WindowGroup:
    """n independent attention problems of equal shape: `query[i]` (a frames) reads `key[i]` (m frames).

    Indices count the local frames of the flattened batch: B·Fq query frames; B·Fk key frames, then one all-zero frame
    for padding.

    Attributes:
        query: int64 (n, a).
        key: int64 (n, m).
        offsets: token reading only: distance of each key frame to the query frame in window steps, length m; the
            outermost frames are then seen in part (see `band_mask`).
    """

    query: Tensor
    key: Tensor
    offsets: tuple[int, ...] | None


@lru_cache(maxsize=256)
def window_plan(
    spec: WindowSpec,
    frames: int,
    history: tuple[int, ...],
    query_frames: tuple[int, ...],
    at: tuple[int, ...],
    device: torch.device,
) -> tuple[WindowGroup, ...]:
    """All windows of a batch as few, equally shaped groups. Every query frame stands in exactly one.

    Args:
        frames: F, of every whole sample.
        history: K of each sample, length B.
        query_frames: numbers of the frames whose queries this rank has (Fq).
        at: numbers of the frames whose keys this rank has (Fk), all that the queries read.
    """
    windows: dict[tuple, list[int]] = {}  # keys → the query frames that read them
    position_of = {g: i for i, g in enumerate(at)}
    for b, num_history in enumerate(history):
        for position, f in enumerate(query_frames):
            keys = key_frames(spec, f, frames, num_history)
            offsets = None
            if spec.token_window and spec.kind != "FA":
                offsets = tuple((g - f) // spec.step(frames) for g in keys)
            padding = len(history) * len(at)
            ids = tuple(b * len(at) + position_of[g] if g < frames else padding for g in keys)
            # Frames that read the same whole frames share one problem; a band depends on the query frame.
            windows.setdefault((ids, offsets, f if offsets else None, b), []).append(b * len(query_frames) + position)
    shapes: dict[tuple, list[tuple[list[int], tuple[int, ...]]]] = {}
    for (ids, offsets, _, _), queries in windows.items():
        shapes.setdefault((len(queries), len(ids), offsets), []).append((queries, ids))
    return tuple(
        WindowGroup(
            query=torch.tensor([q for q, _ in members], device=device),
            key=torch.tensor([k for _, k in members], device=device),
            offsets=offsets,
        )
        for (_, _, offsets), members in shapes.items()
    )


def band_mask(offsets: tuple[int, ...], tokens: int, window: int, device: torch.device) -> Tensor | None:
    """Bool (L, m·L): |i − j| ≤ window·L for a query frame and key frames at `offsets`; None when all is seen."""
    if all(abs(o) < window for o in offsets):
        return None
    position = torch.arange(tokens, device=device)
    keys = torch.tensor(offsets, device=device)[:, None] * tokens + position
    return (keys.flatten() - position[:, None]).abs() <= window * tokens


def attends(spec: WindowSpec, frames: int, tokens: int, history: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The windows for one pair of tokens: `f(b, q, k) -> bool`, elementwise on broadcast index tensors.

    k may run to `spec.padded_frames(frames) · L` (zero padding). `history` is K per sample, int64 (B,).
    """
    step = spec.step(frames)

    def token_window(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if spec.kind == "FA":
            return (q >= 0) & (k >= 0) & (b >= 0)
        fq, fk = q // tokens, k // tokens
        distance = (fq // step * tokens + q % tokens) - (fk // step * tokens + k % tokens)
        return ((fq - fk) % step == 0) & (distance.abs() <= spec.window * tokens) & (b >= 0)

    def frame_window(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        fq, fk, num_history = q // tokens, k // tokens, history[b]
        seen = (fq >= 0) & (fk >= 0)
        if spec.kind != "FA":
            seen = ((fk - fq) % step == 0) & ((fk - fq).abs() < spec.window * step)
        if spec.restrict_history:
            seen = seen & ((fq >= num_history) | (fk < num_history))
        if spec.all_attend_history:
            seen = seen | (fk < num_history)
        if spec.history_causal:
            seen = seen & ((fq >= num_history) | (fk <= fq))
        return seen

    return token_window if spec.token_window else frame_window
