"""The protocol from its settings to its result: what is checked before, who plays what, through which server.

Demonstrations have seeds from 0, validation from 5,000, evaluation from 10,000. Every policy plays the same seeds, each
of them once; an episode that crashes has failed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataloaders.simulators.base import DEFAULT_TASKS, Simulator, check_task
from dataloaders.simulators.make import make
from evaluation.closed_loop import report, server
from evaluation.closed_loop.demonstrations import open_demonstrations, picture_side, read_demonstrations, seeds_of
from evaluation.closed_loop.episode import Episode, EpisodeOutcome
from evaluation.closed_loop.policies import POLICIES, SERVED, ServedKeys, served_keys
from evaluation.closed_loop.workers import Setup, play_all
from kairos_train.basics.errors import RunStopped, UserError
from kairos_train.basics.log import logger
from kairos_train.basics.progress import track

VALIDATION_SEEDS, EVALUATION_SEEDS = 5_000, 10_000  # first ones; demonstrations have those below
SIZE = 128  # pixels, where neither demonstrations nor an export say
MOST_BATCH = 64  # requests that the export's own server computes together


@dataclass(frozen=True)
class Protocol:
    """What is played.

    Attributes:
        env: "metaworld" or "push2d".
        tasks: none: the environment's default ones.
        episodes: of each task.
        seed_start: the episodes of every task have this seed and those after it.
        policies: out of `POLICIES`, in the order of the result.
        replan_every: actions executed of each plan.
        size: side of the pictures in pixels; None: that of the demonstrations, else what the export was trained on.
        processes: simulator processes.
        concurrent: episodes in progress at a time in each.
    """

    env: str
    tasks: Sequence[str] = ()
    episodes: int = 50
    seed_start: int = EVALUATION_SEEDS
    policies: Sequence[str] = POLICIES
    replan_every: int = 4
    size: int | None = None
    processes: int = 2
    concurrent: int = 8

    def checked_tasks(self) -> list[str]:
        """The tasks to play. UserError when one of all settings is out of range."""
        check_task(self.env, None)
        tasks = [check_task(self.env, task) for task in self.tasks] or DEFAULT_TASKS[self.env]
        for name, values, known in (("tasks", tasks, None), ("policies", self.policies, POLICIES)):
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name}={','.join(values)}: name at least one, and each once")
            for value in values if known else ():
                if value not in known:
                    raise UserError(f"policies: {value!r} is unknown; choose from {', '.join(known)}")
        for name, least in (("episodes", 1), ("seed_start", 0), ("replan_every", 1), ("processes", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: must be {least} or more")
        if not 1 <= self.concurrent <= 64:
            raise UserError(f"concurrent={self.concurrent}: must be from 1 to 64")
        return tasks


@dataclass(frozen=True)
class PolicySource:
    """The policy that is judged, and where it is computed.

    Attributes:
        export: folder to serve; None: there is only a server.
        url: of a server that runs already; None: one is started for `export`.
        token: that it asks for.
        steps: of the sampler, for a server that is started; None: as the export says.
        device: the same.
    """

    export: Path | None = None
    url: str | None = None
    token: str | None = None
    steps: int | None = None
    device: str = "auto"


def closed_loop(protocol: Protocol, source: PolicySource, *, demos: Path | None, out: Path) -> dict[str, Any]:
    """Play every episode and write `closed_loop.json` and `closed_loop.png` into `out`.

    Args:
        demos: LeRobot dataset of `data simulate`: what `replay` replays, and whose seeds are not played.

    Returns:
        The content of closed_loop.json: {"env", "policies": {name: {"tasks": {task: counts}, "all": counts,
        "episodes": [{"task", "seed", "success", "steps", "error"}]}}, "seed_start", "episodes_per_task",
        "replan_every", "max_steps", "export"}, counts being {"successes", "episodes", "rate", "interval95"}.

    Raises:
        UserError: settings, seeds, demonstrations, policy and simulator do not fit each other.
        RunStopped: the server went away, or simulators die again and again.
    """
    tasks = protocol.checked_tasks()
    needs_server = bool(set(protocol.policies) & set(SERVED))
    if needs_server and source.export is None and source.url is None:
        raise UserError(f"policies {', '.join(SERVED)}: need an export or a server; give one, or leave them out")
    if "replay" in protocol.policies and demos is None:
        raise UserError("policies: replay needs demonstrations; give --demos DATASET, or leave it out of --policies")
    simulator = make(protocol.env, tasks[0], protocol.size or SIZE)  # errors of the installation come before any work
    try:
        setup = _prepare(protocol, tasks, source, demos, simulator)
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        with _server(protocol, source, simulator, out, needed=needs_server) as (keys, url, about):
            setup = replace(setup, keys=keys, url=url, token=source.token)
            total = len(protocol.policies) * len(tasks) * protocol.episodes
            played = list(track(_play(protocol, tasks, setup), "closed loop", total, "episodes"))
    finally:
        simulator.close()
    result = {
        "env": protocol.env,
        "policies": report.summarise(played, policies=protocol.policies, tasks=tasks),
        "seed_start": protocol.seed_start,
        "episodes_per_task": protocol.episodes,
        "replan_every": protocol.replan_every,
        "max_steps": simulator.max_steps,
        "export": about,
    }
    report.write(out, result)
    return result


def _prepare(
    protocol: Protocol, tasks: list[str], source: PolicySource, demos: Path | None, simulator: Simulator
) -> Setup:
    """What simulator processes need to know, but for the server; the seeds are checked."""
    demonstrations, size = None, protocol.size
    if demos is None:
        check_seeds(protocol, None)
    else:
        dataset = open_demonstrations(demos, simulator)
        check_seeds(protocol, seeds_of(dataset))
        size = size or picture_side(dataset, simulator)
        if "replay" in protocol.policies:
            demonstrations = read_demonstrations(dataset, protocol.env, tasks, simulator.camera_key)
    if size is None and source.export is not None:
        size = server.picture_side(source.export)
    return Setup(
        size=size or SIZE,
        replan_every=protocol.replan_every,
        concurrent=protocol.concurrent,
        demonstrations=demonstrations,
    )


def check_seeds(protocol: Protocol, demonstrated: set[int] | None) -> None:
    """Raise UserError when an episode to be played may be one of the demonstrations.

    Args:
        demonstrated: seeds of the demonstrations; None or empty: not known.
    """
    first, last = protocol.seed_start, protocol.seed_start + protocol.episodes - 1
    if shared := sorted((demonstrated or set()) & set(range(first, last + 1))):
        raise UserError(
            f"seed_start={first}: seeds {shared[0]} to {shared[-1]} are those of demonstrations; start at"
            f" {EVALUATION_SEEDS}"
        )
    if not demonstrated and first < VALIDATION_SEEDS:
        raise UserError(
            f"seed_start={first}: seeds below {VALIDATION_SEEDS} are for demonstrations; start at {EVALUATION_SEEDS},"
            " or give the demonstrations, that these seeds may be seen not to be theirs"
        )


@contextmanager
def _server(
    protocol: Protocol, source: PolicySource, simulator: Simulator, out: Path, *, needed: bool
) -> Iterator[tuple[ServedKeys | None, str | None, dict[str, Any]]]:
    """How to ask, whom, and what "export" says; a server that was started is ended at the end."""
    about = {"path": None if source.export is None else str(source.export)}
    if not needed:
        yield None, None, about
    elif source.url is not None:
        yield _greet(source.url, protocol, source, simulator, about)
    else:
        with server.served(
            source.export,
            log=out / "server.log",
            camera=simulator.camera_key,
            max_batch=min(protocol.processes * protocol.concurrent, MOST_BATCH),
            steps=source.steps,
            device=source.device,
        ) as url:
            yield _greet(url, protocol, source, simulator, about)


def _greet(
    url: str, protocol: Protocol, source: PolicySource, simulator: Simulator, about: dict[str, Any]
) -> tuple[ServedKeys, str, dict[str, Any]]:
    """Check that a server's policy is the one to be judged, and plays this simulator."""
    metadata = server.ask_metadata(url, source.token)
    if source.export is not None:
        server.check_same(metadata, source.export)
    keys = served_keys(metadata, simulator, replan_every=protocol.replan_every)
    told = ("model", "statistics_sha256", "sampling_steps", "horizon")
    return keys, url, {**about, "server": source.url, **{key: metadata.get(key) for key in told}}


def _play(protocol: Protocol, tasks: list[str], setup: Setup) -> Iterator[tuple[Episode, EpisodeOutcome]]:
    """Every episode of the protocol with its outcome; says on stderr how far it is.

    One policy after another; tasks take turns, so that a process needs few simulators of each.
    """
    seeds = range(protocol.seed_start, protocol.seed_start + protocol.episodes)
    episodes = [
        Episode(name, protocol.env, task, seed) for name in protocol.policies for seed in seeds for task in tasks
    ]
    each = len(seeds) * len(tasks)
    ended, solved = dict.fromkeys(protocol.policies, 0), dict.fromkeys(protocol.policies, 0)
    for episode, outcome in play_all(episodes, setup, processes=protocol.processes):
        name = episode.policy
        ended[name] += 1
        solved[name] += outcome.success
        if outcome.error is not None:
            logger.warning(f"{name}, {episode.task}, seed {episode.seed} crashed: {outcome.error}")
            if outcome.error.startswith("PolicyLost"):
                _still_there(setup)
        if ended[name] == each:
            logger.info(f"{name}: {solved[name]} of {each} episodes solved")
        yield episode, outcome


def _still_there(setup: Setup) -> None:
    """RunStopped when the server has gone for good: what is left would fail for no fault of the policy."""
    try:
        server.ask_metadata(setup.url, setup.token)
    except UserError as error:
        raise RunStopped(f"the policy server went away: {error}") from error
