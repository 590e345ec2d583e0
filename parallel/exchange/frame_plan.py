"""Which rank computes which frames of a windowed attention layer, and which frames move for it. Arithmetic, no group.

Each rank owns one contiguous shard of the frames (`parallel.topology.split_frames`). Attention of a frame's queries
needs the keys and values of the frames it reads. Two layouts:

    contiguous   a rank computes the frames it owns.             owned = queries → keys
    residue      a rank computes frames of the same f mod period, which a dilated window reads as its neighbours:
                                                       owned → queries → keys, and the outputs go back to their owners

    rank                 0         1         2         3         4         5         6         7
    owned, 8 ranks       0-7       8-15      16-23     24-31     32-39     40-47     48-55     56-63
    residue, 8 ranks     0,4…28    1,5…29    2,6…30    3,7…31    32,36…60  33,37…61  34,38…62  35,39…63

The deal of residue classes moves frames between neighbouring ranks only. With ranks that divide the period, a rank has
whole classes and no key moves; with a multiple of it, equal runs of one class, so that windows reach over the ends of a
run; otherwise the classes form a row that is cut evenly. A rank computes as many frames as it owns.

Elements received by a rank in the forward pass, h elements of hidden state and s of keys and values in a frame:

    h · (|queries \\ owned| + |owned \\ queries|) + s · |keys \\ queries|
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import gcd

from parallel.topology import split_frames

Frames = tuple[int, ...]
"""Ascending numbers of frames."""

LAYOUTS = ("contiguous", "residue")


@dataclass(frozen=True)
class Route:
    """How frames get from where they are to where they are needed. Positions count within a rank's own frames.

    Attributes:
        source: the frames that each rank holds; every frame has one holder.
        target: the frames that each rank needs.
        send: [rank][peer] positions in source[rank] of what it sends to peer, in the order of their frames.
        receive: [rank][peer] positions in target[rank] of what comes from peer, in the same order.
        kept: [rank] (positions in source, positions in target) of local frames, which `send` and `receive` leave out.
    """

    source: tuple[Frames, ...]
    target: tuple[Frames, ...]
    send: tuple[tuple[Frames, ...], ...]
    receive: tuple[tuple[Frames, ...], ...]
    kept: tuple[tuple[Frames, Frames], ...]

    @classmethod
    def between(cls, source: tuple[Frames, ...], target: tuple[Frames, ...]) -> Route:
        """The route on which each rank gets the frames of `target[rank]` from their holders."""
        ranks = range(len(source))
        holder = {frame: rank for rank in ranks for frame in source[rank]}
        common: list[list[list[int]]] = [[[] for _ in ranks] for _ in ranks]  # [holder][rank that needs it]
        for b in ranks:
            for frame in target[b]:
                common[holder[frame]][b].append(frame)
        return cls(
            source=source,
            target=target,
            send=tuple(tuple(_elsewhere(source[a], common[a][b], a != b) for b in ranks) for a in ranks),
            receive=tuple(tuple(_elsewhere(target[b], common[a][b], a != b) for a in ranks) for b in ranks),
            kept=tuple((positions(source[a], common[a][a]), positions(target[a], common[a][a])) for a in ranks),
        )

    @cached_property
    def stays(self) -> bool:
        """Every rank needs just the frames that it holds: no exchange, no copy."""
        return self.source == self.target

    @cached_property
    def replicates(self) -> bool:
        """Several ranks need the same frame: its gradient is a sum."""
        return sum(map(len, self.target)) > sum(map(len, self.source))

    def sent(self, rank: int) -> int:
        """Frames that leave `rank`, once per peer that needs them; their gradients come back."""
        return sum(map(len, self.send[rank]))

    def received(self, rank: int) -> int:
        """Frames that reach `rank`."""
        return sum(map(len, self.receive[rank]))


def positions(frames: Sequence[int], wanted: Iterable[int]) -> Frames:
    """Positions of the `wanted` frames in `frames`."""
    position = {frame: i for i, frame in enumerate(frames)}
    return tuple(position[frame] for frame in wanted)


def _elsewhere(frames: Frames, wanted: list[int], moves: bool) -> Frames:
    return positions(frames, wanted) if wanted and moves else ()


@dataclass(frozen=True)
class FramePlan:
    """One layer's frames over the ranks of a context group. Made by `plan_frames`.

    Attributes:
        layout: "contiguous" or "residue".
        owned: the frames of each rank between layers, contiguous.
        queries: the frames for which each rank computes attention. It projects their queries, keys and values.
        keys: the frames whose keys and values each rank has after the exchange; a superset of `queries`.
        hidden_elements: of one frame's hidden state on one rank.
        kv_elements: of one frame's keys and values together on one rank.
    """

    layout: str
    owned: tuple[Frames, ...]
    queries: tuple[Frames, ...]
    keys: tuple[Frames, ...]
    hidden_elements: int
    kv_elements: int

    @property
    def ranks(self) -> int:
        """Ranks of the context group."""
        return len(self.owned)

    @cached_property
    def moving(self) -> Route:
        """Of hidden states, to the ranks that compute them."""
        return Route.between(self.owned, self.queries)

    @cached_property
    def collecting(self) -> Route:
        """Of keys and values, to the ranks that read them."""
        return Route.between(self.queries, self.keys)

    @cached_property
    def restoring(self) -> Route:
        """Of attention outputs, back to their owners."""
        return Route.between(self.queries, self.owned)

    def received(self, rank: int) -> int:
        """Elements that reach `rank` in the forward pass: hidden states there and back, keys and values."""
        hidden = self.moving.received(rank) + self.restoring.received(rank)
        return self.hidden_elements * hidden + self.kv_elements * self.collecting.received(rank)

    def returned(self, rank: int) -> int:
        """Elements that reach `rank` in the backward pass: a gradient for everything it sent, from each receiver."""
        hidden = self.moving.sent(rank) + self.restoring.sent(rank)
        return self.hidden_elements * hidden + self.kv_elements * self.collecting.sent(rank)

    @cached_property
    def most_received(self) -> int:
        """Elements that the busiest rank receives in the forward pass."""
        return max(self.received(rank) for rank in range(self.ranks))

    @cached_property
    def total_received(self) -> int:
        """Elements that all ranks receive in the forward pass; as many return in the backward pass."""
        return sum(self.received(rank) for rank in range(self.ranks))


@lru_cache(maxsize=512)
def plan_frames(
    frames: int,
    reads: tuple[Frames, ...],
    on_all_ranks: Frames,
    *,
    ranks: int,
    period: int,
    hidden: int,
    kv: int,
    choice: str = "auto",
) -> FramePlan:
    """The plan of one layer; the same on every rank, as long as the arguments are.

    Args:
        frames: F, of every sample of the batch.
        reads: for each frame the frames whose keys its queries read, over all samples of the batch, its own included.
        on_all_ranks: frames whose keys every rank needs besides (history keys that the action stream reads).
        ranks: of the context group; more than F leave some without frames.
        period: distance in frames between neighbours of a dilated window; 1: there are no residue classes.
        hidden: elements of one frame's hidden state on one rank.
        kv: elements of one frame's keys and values together on one rank.
        choice: "contiguous", "residue" (contiguous where period is 1), or "auto": the one whose busiest rank receives
            fewer elements, contiguous when they are equal.

    Raises:
        ValueError: `reads` are not of F frames, leave out a frame's own or name a frame that does not exist.
    """
    if len(reads) != frames or any(f not in read for f, read in enumerate(reads)):
        raise ValueError(f"reads name what each of the {frames} frames reads, its own keys included")
    if any(not 0 <= g < frames for read in (*reads, on_all_ranks) for g in read):
        raise ValueError(f"frames are numbered 0 to {frames - 1}: zero padding is not exchanged")
    if choice not in ("auto", *LAYOUTS) or period < 1:
        raise ValueError(f"choice={choice!r}, period={period}: no such layout")
    owned = tuple(tuple(shard) for shard in split_frames(frames, ranks))
    computed = {"contiguous": owned}
    if period > 1:
        computed["residue"] = residue_frames(frames, ranks, period)
    layouts = list(computed) if choice == "auto" else [choice if choice in computed else "contiguous"]
    plans = [
        FramePlan(
            layout=layout,
            owned=owned,
            queries=computed[layout],
            keys=_keys_read(computed[layout], reads, on_all_ranks),
            hidden_elements=hidden,
            kv_elements=kv,
        )
        for layout in layouts
    ]
    return min(plans, key=lambda plan: plan.most_received)


def residue_frames(frames: int, ranks: int, period: int) -> tuple[Frames, ...]:
    """The frames of each rank in the residue layout (see the top of this file).

    gcd(ranks, period) groups of ranks deal the classes among themselves, class c to group c mod gcd; a group puts its
    frames in a row, class by class, and cuts it evenly. Neighbouring ranks are of different groups, so that the ranks
    that own a stretch of the video also get the run of each class there.
    """
    groups = gcd(ranks, period)
    runs: list[Frames] = [()] * ranks
    for group in range(groups):
        row = [f for c in range(group, period, groups) for f in range(c, frames, period)]
        for j, run in enumerate(split_frames(len(row), ranks // groups)):
            runs[j * groups + group] = tuple(sorted(row[i] for i in run))
    return tuple(runs)


def _keys_read(queries: tuple[Frames, ...], reads: tuple[Frames, ...], on_all_ranks: Frames) -> tuple[Frames, ...]:
    return tuple(tuple(sorted({g for f in own for g in reads[f]} | set(on_all_ranks))) for own in queries)
