"""Requests that wait are computed together, in one thread beside the event loop.

While a batch is computed, requests collect. When the thread is free, up to `max_batch` of them, oldest first, make the
next batch; with fewer there, the batch waits for more, but no longer than the window, and not at all when every
connected client has asked: one client alone never waits.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from kairos_train.basics.log import logger
from kairos_train.serving.metrics import Metrics
from kairos_train.serving.observation import Observation
from kairos_train.serving.policy import ModelInput, ObservationHistory


class Answer(NamedTuple):
    """actions: float32 (A, D), raw; seconds: the batch's time in the thread."""

    actions: np.ndarray
    seconds: float


@dataclass(frozen=True)
class _Request:
    history: ObservationHistory
    observation: Observation
    answer: asyncio.Future[Answer]

    def window(self) -> ModelInput:
        return self.history.window(self.observation)


class Batcher:
    """Turns observations into actions, several at a time.

    Args:
        act: `ServedPolicy.act`; called in the thread alone.
        max_batch: requests of one batch at most.
        window: seconds that a batch waits for more requests.
        clients: number of clients that may ask.
        metrics: where batches are counted.
    """

    def __init__(
        self,
        act: Callable[[Sequence[ModelInput]], np.ndarray],
        *,
        max_batch: int,
        window: float,
        clients: Callable[[], int],
        metrics: Metrics,
    ) -> None:
        self._act, self._max_batch, self._window = act, max_batch, window
        self._clients, self._metrics = clients, metrics
        self._requests: deque[_Request] = deque()
        self._arrived = asyncio.Event()

    def submit(self, history: ObservationHistory, observation: Observation) -> asyncio.Future[Answer]:
        """The answer to come; its exception is the model's own. A cancelled one is left out of the next batch."""
        answer = asyncio.get_running_loop().create_future()
        self._requests.append(_Request(history, observation, answer))
        self._arrived.set()
        return answer

    async def run(self) -> None:
        """Compute batches until cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="policy") as thread:
            while True:
                await self._collect()
                batch = [self._requests.popleft() for _ in range(min(len(self._requests), self._max_batch))]
                if batch := [request for request in batch if not request.answer.done()]:
                    results, seconds = await loop.run_in_executor(thread, self._compute, batch)
                    self._metrics.batch_size.observe(len(batch))
                    self._metrics.inference.observe(seconds)
                    _deliver(batch, results, seconds)

    async def _collect(self) -> None:
        """Wait for the first request, and then for as many as make a batch."""
        while not self._requests:
            await self._until_next()
        deadline = time.monotonic() + self._window
        while len(self._requests) < min(self._max_batch, self._clients()):
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._until_next()
            except TimeoutError:
                return

    async def _until_next(self) -> None:
        self._arrived.clear()
        await self._arrived.wait()

    def _compute(self, batch: Sequence[_Request]) -> tuple[list[np.ndarray | Exception], float]:
        """In the thread: actions (A, D) of each request, or what went wrong with it; seconds it took."""
        started = time.monotonic()
        windows = [_attempt(request.window) for request in batch]
        sound = [window for window in windows if not isinstance(window, Exception)]
        results = iter(self._act_on(sound))
        merged = [window if isinstance(window, Exception) else next(results) for window in windows]
        return merged, time.monotonic() - started

    def _act_on(self, windows: Sequence[ModelInput]) -> Sequence[np.ndarray | Exception]:
        """Together; when that fails each alone, so that the one at fault does not fail the others."""
        if not windows:
            return []
        together = _attempt(partial(self._act, windows))
        if not isinstance(together, Exception):
            return [row if np.isfinite(row).all() else FloatingPointError("actions are not finite") for row in together]
        if len(windows) == 1:
            return [together]
        logger.warning("a batch of %d failed (%r); trying each alone", len(windows), together)
        return [result for window in windows for result in self._act_on([window])]


def _attempt(compute: Callable[[], Any]) -> Any:
    """The result of a call, or its exception as a value."""
    try:
        return compute()
    except Exception as error:
        return error


def _deliver(batch: Sequence[_Request], results: Sequence[np.ndarray | Exception], seconds: float) -> None:
    for request, result in zip(batch, results):
        if request.answer.done():  # its client has gone
            continue
        if isinstance(result, Exception):
            request.answer.set_exception(result)
        else:
            request.answer.set_result(Answer(result, seconds))
