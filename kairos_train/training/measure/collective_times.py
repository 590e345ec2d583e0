"""How long a step waits for other ranks: seconds in collectives, by the group that they run in.

    with CollectiveTimes(topology) as times:
        ...one step...
    times.seconds                     # {"tensor": 0.12, "gradient": 0.30, "world": 0.01}
    times.elapsed - sum(…) = times.busy

All communication, of this project, Megatron-core or DeepSpeed, goes by a method of torch's `ProcessGroup` and, where
that returned a `Work`, by `Work.wait`: functions of `torch.distributed`, which each of them looks up at another place
and some of which call one another, end there, once each. So within the block these methods are replaced by timed ones,
for all groups of the process, and put back at its end. Outside of the block nothing is different.

What is counted is exposed waiting, no bytes: the time by which computing was held up, be it for the network or for a
rank that came later.

    gloo    seconds of the process in the call and in `wait`
    NCCL    seconds of the stream that was current when the block began, between events around the call and around
            `wait`; of a collective on another stream (overlapping gradients, states between context ranks), the seconds
            that this stream then waits for that one (`Stream.wait_stream`)

Groups are named by the topology. With one context rank, "gradient" and "data" are one group and count as "gradient".
"world" is everybody, of which a step needs little; "other" is what the topology did not make. Groups of this process
alone, where nobody is waited for, do not count. Functional collectives (`torch.ops._c10d_functional`), which nothing
here uses, pass by.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from parallel.topology import AXES, Topology

METHODS = (
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier", "monitored_barrier"),
    *("allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "_allgather_base"),
    *("all_gather_single", "all_gather_single_coalesced", "gather", "scatter"),
    *("reduce_scatter", "reduce_scatter_tensor_coalesced", "_reduce_scatter_base"),
    *("reduce_scatter_single", "reduce_scatter_single_coalesced"),
    *("alltoall", "alltoall_base", "all_to_all_single", "send", "recv", "recv_anysource", "_end_coalescing"),
)
"""Methods of `ProcessGroup` that communicate, of this and earlier versions of torch."""


class CollectiveTimes:
    """Times the collectives of this process within a `with` block. Not for use twice, nor one inside of another.

    Attributes:
        seconds: by kind of group; of each kind that this process has in the topology, "world" with them, and "other"
            where there was any.
        elapsed: seconds of the whole block.
        calls: collectives by kind.
    """

    def __init__(self, topology: Topology) -> None:
        groups = {kind: getattr(topology, f"{kind}_group") for kind in AXES}
        self._kinds: dict[str, str] = {}
        if dist.is_initialized() and topology.size > 1:
            self._kinds[dist.group.WORLD.group_name] = "world"
        for kind in ("data", "gradient", "context", "tensor"):  # one group may be two of them
            if groups[kind] is not None:
                self._kinds[groups[kind].group_name] = kind
        self.seconds = dict.fromkeys(self._kinds.values(), 0.0)
        self.calls = dict.fromkeys(self._kinds.values(), 0)
        self.elapsed = 0.0
        self._timer: _HostTimer | _StreamTimer = (
            _StreamTimer(topology.device) if topology.device.type == "cuda" else _HostTimer()
        )
        self._works: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        self._replaced: list[tuple[type, str, Any]] = []
        self._begin = 0.0

    @property
    def busy(self) -> float:
        """Seconds that this process did not wait for others."""
        return max(0.0, self.elapsed - sum(self.seconds.values()))

    def __enter__(self) -> CollectiveTimes:
        self._timer.start()
        for name in METHODS:
            if name in vars(dist.ProcessGroup):
                self._replace(dist.ProcessGroup, name, self._timed_call)
        self._replace(dist.Work, "wait", self._timed_wait)
        if isinstance(self._timer, _StreamTimer):
            self._replace(torch.cuda.Stream, "wait_stream", self._timed_wait_stream)
        self._begin = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.elapsed = time.perf_counter() - self._begin
        while self._replaced:
            owner, name, original = self._replaced.pop()
            setattr(owner, name, original)
        if kind is None:  # after an error a stream may never get there
            for group, seconds in self._timer.read().items():
                self.seconds[group] = self.seconds.get(group, 0.0) + seconds

    def _replace(self, owner: type, name: str, timed: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        original = getattr(owner, name)
        # Put back is what the class holds: looked up, a method of C++ has lost what binds it to its object.
        self._replaced.append((owner, name, vars(owner)[name]))
        setattr(owner, name, functools.wraps(original)(timed(original)))

    def _kind(self, group: dist.ProcessGroup) -> str | None:
        kind = self._kinds.get(group.group_name)
        return kind if kind is not None or group.size() == 1 else "other"

    def _timed_call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            kind = self._kind(group)
            if kind is None:
                return original(group, *args, **kwargs)
            with self._timer.interval(kind):
                work = original(group, *args, **kwargs)
            self.calls[kind] = self.calls.get(kind, 0) + 1
            if work is not None:
                self._works[work] = kind
            return work

        return call

    def _timed_wait(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wait(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
            kind = self._works.get(work)
            if kind is None:  # begun before the block, or of a group of one
                return original(work, *args, **kwargs)
            with self._timer.interval(kind):
                return original(work, *args, **kwargs)

        return wait

    def _timed_wait_stream(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wait_stream(waiting: torch.cuda.Stream, stream: torch.cuda.Stream) -> None:
            with self._timer.handover(waiting, stream):
                original(waiting, stream)

        return wait_stream


class _HostTimer:
    """Seconds of the process: a collective on the CPU holds up the thread that waits for it."""

    def __init__(self) -> None:
        self._spent: list[tuple[str, float]] = []  # appended to by autograd's threads, too

    def start(self) -> None:
        """Nothing to get ready."""

    @contextmanager
    def interval(self, kind: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._spent.append((kind, time.perf_counter() - begin))

    def read(self) -> dict[str, float]:
        return _added(self._spent)


class _StreamTimer:
    """Seconds of the stream that was current at the start."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = 0
        self._carrying: dict[int, str] = {}  # other streams, with what was last sent on them
        self._pairs: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        self._stream = torch.cuda.current_stream(self._device).cuda_stream

    @contextmanager
    def interval(self, kind: str) -> Iterator[None]:
        current = torch.cuda.current_stream(self._device)
        if current.cuda_stream != self._stream:
            self._carrying[current.cuda_stream] = kind
            yield
            return
        with self._between_events(kind, current):
            yield

    @contextmanager
    def handover(self, waiting: torch.cuda.Stream, stream: torch.cuda.Stream) -> Iterator[None]:
        kind = self._carrying.get(stream.cuda_stream)
        if kind is None or waiting.cuda_stream != self._stream:
            yield
            return
        with self._between_events(kind, waiting):
            yield

    @contextmanager
    def _between_events(self, kind: str, stream: torch.cuda.Stream) -> Iterator[None]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        try:
            yield
        finally:
            end.record(stream)
            self._pairs.append((kind, begin, end))

    def read(self) -> dict[str, float]:
        if self._pairs:  # a step ends by reading its results: nothing is left to wait for
            torch.cuda.current_stream(self._device).synchronize()
        return _added([(kind, begin.elapsed_time(end) / 1000) for kind, begin, end in self._pairs])


def _added(parts: list[tuple[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for kind, seconds in parts:
        total[kind] = total.get(kind, 0.0) + seconds
    return total
