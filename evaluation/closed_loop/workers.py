"""Episodes in processes of their own, several at a time in each, so that the policy server has batches to compute.

A process simulates in one thread, because GL contexts belong to threads. Where an episode waits for a plan from the
server, a thread beside it waits, and the other episodes of the process go on.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_pipes

import numpy as np

from dataloaders.simulators.base import Simulator
from dataloaders.simulators.make import make
from evaluation.closed_loop import policies
from evaluation.closed_loop.demonstrations import Demonstrations
from evaluation.closed_loop.episode import Episode, EpisodeOutcome
from evaluation.closed_loop.episodes import Game, play
from kairos_train.basics.errors import RunStopped, one_line
from kairos_train.serving.client import PolicyClient

REPLY_SECONDS = 600.0  # for one plan: a large model on a CPU, behind the requests of others
CONNECT_SECONDS = 20.0
LOOK_SECONDS = 0.05  # between two looks for further episodes while plans are awaited
MOST_DEATHS = 3  # of simulator processes, after which something must be wrong


@dataclass(frozen=True)
class Setup:
    """What a simulator process needs to know.

    Attributes:
        size: side of the pictures in pixels.
        replan_every: actions executed of each plan.
        concurrent: episodes in progress at a time.
        url, token, keys: of the policy server; None where no policy is served.
        demonstrations: for `replay`.
    """

    size: int
    replan_every: int
    concurrent: int
    url: str | None = None
    token: str | None = None
    keys: policies.ServedKeys | None = None
    demonstrations: Demonstrations | None = None


def play_all(episodes: Sequence[Episode], setup: Setup, *, processes: int) -> Iterator[tuple[Episode, EpisodeOutcome]]:
    """Every episode with its outcome, in the order in which they end.

    Where a simulator process dies, the episodes that it had in progress have failed, and another one goes on.

    Raises:
        RunStopped: simulator processes die again and again.
    """
    coming = iter(episodes)
    crew: list[_Process] = []
    deaths = 0
    try:
        for _ in range(min(processes, len(episodes))):
            crew.append(_Process(setup))
        while True:
            for process in crew:
                while len(process.doing) < setup.concurrent and (episode := next(coming, None)) is not None:
                    process.give(episode)
            busy = {process.pipe: process for process in crew if process.doing}
            if not busy:
                return
            for pipe in wait_for_pipes(list(busy)):
                process = busy[pipe]
                try:
                    yield process.take()
                except (EOFError, ConnectionError):
                    crew.remove(process)
                    code = process.end()
                    for episode in process.doing.values():
                        yield episode, EpisodeOutcome(False, 0, f"its simulator process died with exit code {code}")
                    if (deaths := deaths + 1) == MOST_DEATHS:
                        raise RunStopped(f"{deaths} simulator processes died, the last with exit code {code}") from None
                    crew.append(_Process(setup))
    finally:
        for process in crew:
            process.end()


class _Process:
    """A simulator process, and the episodes that it has in progress, by number."""

    def __init__(self, setup: Setup) -> None:
        context = multiprocessing.get_context("spawn")  # GL contexts and threads do not survive a fork
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, setup), daemon=True)
        self._process.start()
        theirs.close()
        self.doing: dict[int, Episode] = {}
        self._given = 0

    def give(self, episode: Episode) -> None:
        """Another episode to play."""
        self.doing[self._given] = episode
        with contextlib.suppress(ConnectionError):  # it has died, which `take` will find
            self.pipe.send((self._given, episode))
        self._given += 1

    def take(self) -> tuple[Episode, EpisodeOutcome]:
        """The next episode that ended. EOFError or ConnectionError when the process has died."""
        number, outcome = self.pipe.recv()
        return self.doing.pop(number), outcome

    def end(self) -> int | None:
        """End it; its exit code."""
        self.pipe.close()  # a process that waits for its next episode ends by this
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()
        return self._process.exitcode


def _work(pipe: Connection, setup: Setup) -> None:
    """A simulator process: (number, episode) in, (number, outcome) out, until the pipe closes."""
    table = Table(setup)
    try:
        while True:
            while not table.waiting or (len(table.waiting) < setup.concurrent and pipe.poll()):
                number, episode = pipe.recv()
                for ended in table.begin(number, episode):
                    pipe.send(ended)
            for ended in table.go_on():
                pipe.send(ended)
    except (EOFError, ConnectionError, KeyboardInterrupt):
        pass  # nobody wants more
    finally:
        table.close()


@dataclass
class _Seat:
    """One episode in progress."""

    number: int
    episode: Episode
    simulator: Simulator
    client: PolicyClient | None
    policy: policies.EpisodePolicy
    game: Game


@dataclass
class Table:
    """The episodes of one process; simulators and connections are kept for the next ones.

    Attributes:
        waiting: episodes whose plan is being computed elsewhere.
    """

    setup: Setup
    waiting: dict[Future, _Seat] = field(default_factory=dict)
    _simulators: dict[tuple[str, str], list[Simulator]] = field(default_factory=dict)
    _clients: list[PolicyClient] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(self.setup.concurrent, thread_name_prefix="plans")

    def begin(self, number: int, episode: Episode) -> list[tuple[int, EpisodeOutcome]]:
        """Play an episode up to its first wait; what has ended: it, or nothing."""
        try:
            simulator = self._simulator(episode)
        except Exception as error:
            return [(number, EpisodeOutcome(False, 0, f"{type(error).__name__}: {one_line(error)}"))]
        client = self._client() if episode.policy in policies.SERVED else None
        policy = _policy(episode.policy, client, self.setup)
        game = play(simulator, policy, episode, replan_every=self.setup.replan_every)
        seat = _Seat(number, episode, simulator, client, policy, game)
        return self._drive(seat, lambda: next(game))

    def go_on(self) -> list[tuple[int, EpisodeOutcome]]:
        """Go on with every episode whose plan is there by now; those that have ended."""
        done, _ = wait(self.waiting, timeout=LOOK_SECONDS, return_when=FIRST_COMPLETED)
        ended = []
        for future in done:
            seat = self.waiting.pop(future)
            ended += self._drive(seat, _resumption(seat.game, future.result()))
        return ended

    def close(self) -> None:
        """Give connections and GL contexts back."""
        for client in [*self._clients, *(seat.client for seat in self.waiting.values())]:
            client.close()  # a thread that waits for a reply ends by this
        self._threads.shutdown(cancel_futures=True)
        for simulator in [
            *(simulator for free in self._simulators.values() for simulator in free),
            *(seat.simulator for seat in self.waiting.values()),
        ]:
            simulator.close()

    def _drive(self, seat: _Seat, advance: Callable[[], Callable[[], np.ndarray]]) -> list[tuple[int, EpisodeOutcome]]:
        """Advance an episode until it waits or has ended."""
        try:
            wanted = advance()
            while not seat.policy.waits:
                wanted = _resumption(seat.game, _attempt(wanted))()
        except StopIteration as end:
            self._free(seat, sound=end.value.error is None)
            return [(seat.number, end.value)]
        self.waiting[self._threads.submit(_attempt, wanted)] = seat
        return []

    def _simulator(self, episode: Episode) -> Simulator:
        free = self._simulators.setdefault((episode.env, episode.task), [])
        return free.pop() if free else make(episode.env, episode.task, self.setup.size)

    def _client(self) -> PolicyClient:
        if self._clients:
            return self._clients.pop()
        setup = self.setup
        return PolicyClient(setup.url, token=setup.token, timeout=REPLY_SECONDS, connect_timeout=CONNECT_SECONDS)

    def _free(self, seat: _Seat, *, sound: bool) -> None:
        """Keep what an episode used; after a crash nobody knows what state it is in."""
        if seat.client is not None:
            if not sound:
                seat.client.close()  # makes a new connection when it is used again
            self._clients.append(seat.client)
        if sound:
            self._simulators[seat.episode.env, seat.episode.task].append(seat.simulator)
        else:
            seat.simulator.close()


def _policy(name: str, client: PolicyClient | None, setup: Setup) -> policies.EpisodePolicy:
    if name in policies.SERVED:
        return policies.RemotePolicy(client, setup.keys, wrong=name == "wrong")
    if name == "replay":
        return policies.ReplayPolicy(setup.demonstrations)
    return {"random": policies.RandomPolicy, "hold": policies.HoldPolicy, "expert": policies.ExpertPolicy}[name]()


def _attempt(wanted: Callable[[], np.ndarray]) -> np.ndarray | Exception:
    """A plan, or its exception as a value."""
    try:
        return wanted()
    except Exception as error:
        return error


def _resumption(game: Game, plan: np.ndarray | Exception) -> Callable[[], Callable[[], np.ndarray]]:
    """What goes on with an episode."""
    return (lambda: game.throw(plan)) if isinstance(plan, Exception) else (lambda: game.send(plan))
