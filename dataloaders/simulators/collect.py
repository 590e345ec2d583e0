"""Demonstrations by the scripted experts, written as a LeRobot v3.0 dataset.

Every episode is a function of (task, seed, noise): in every second seed noise is added to what is executed while the
clean action of the expert is recorded, so that the policy sees states beside the expert's way and what to do there. An
episode goes on for 5 steps after success; those that fail are dropped, counted, and replaced by further seeds. The
result does not depend on the number of processes.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.simulators.base import CAMERA_KEY, DEFAULT_TASKS, TASKS, Simulator, check_task
from dataloaders.simulators.make import make
from kairos_train.basics.errors import UserError
from kairos_train.basics.progress import progress

STEPS_AFTER_SUCCESS = 5
_AHEAD = 2  # jobs handed to a worker at a time: it need not wait for the writer
_FAILURES = 20  # failed episodes of a task, beyond as many as are wanted, after which something must be wrong


@dataclass(frozen=True)
class EpisodeJob:
    """One episode to be played."""

    env: str
    task: str
    size: int
    seed: int
    noise: float


@dataclass(frozen=True)
class Demonstration:
    """One solved episode: frames uint8 (T, H, W, 3), state float32 (T, ds), and the actions then taken, (T, da)."""

    frames: np.ndarray
    state: np.ndarray
    action: np.ndarray


def simulate(
    *,
    env: str,
    tasks: list[str],
    episodes_per_task: int,
    out: Path,
    size: int = 128,
    seed_start: int = 0,
    noise: float = 0.2,
    codec: str = "h264",
    processes: int = 2,
) -> dict[str, Any]:
    """Collect `episodes_per_task` solved episodes of each task into the dataset folder `out`.

    Args:
        env: "metaworld" or "push2d".
        tasks: task names; empty: the environment's default ones.
        size: pixels of the square pictures, even.
        seed_start: first seed of every task; failed episodes use up further ones.
        noise: standard deviation of what is added to every second episode's executed actions.
        codec: "h264" or "av1".
        processes: simulators at work; 1 plays in this process.

    Returns:
        {"env", "tasks", "episodes", "frames", "dropped", "dropped_by_task", "seconds", "seeds": [first, last]}.

    Raises:
        UserError: a setting is out of range, `out` exists, the simulator cannot be made, or the expert keeps failing.
    """
    from dataloaders.lerobot.writer import LeRobotWriter

    started = time.monotonic()
    check_task(env, None)
    tasks = [check_task(env, task) for task in tasks or DEFAULT_TASKS[env]]
    _check(tasks, episodes_per_task, seed_start, noise, processes)
    probe = make(env, tasks[0], size)  # errors of the installation come before any work
    try:
        writer = LeRobotWriter(
            Path(out),
            fps=probe.fps,
            robot_type=probe.robot_type,
            cameras={CAMERA_KEY: (size, size)},
            state_names=probe.state_names,
            action_names=probe.action_names,
            codec=codec,
        )
    finally:
        probe.close()
    wanted = dict.fromkeys(tasks, episodes_per_task)
    next_seed = dict.fromkeys(tasks, seed_start)
    dropped = dict.fromkeys(tasks, 0)
    frames, total = 0, len(tasks) * episodes_per_task
    with writer, progress("simulate", total, "episodes") as advance:
        while any(wanted.values()):
            jobs = []
            for task in tasks:
                jobs += [EpisodeJob(env, task, size, next_seed[task] + i, noise) for i in range(wanted[task])]
                next_seed[task] += wanted[task]
            for job, demonstration in zip(jobs, _play_all(jobs, min(processes, len(jobs)))):
                if demonstration is None:
                    dropped[job.task] += 1
                    continue
                wanted[job.task] -= 1
                frames += len(demonstration.action)
                _write(writer, job, demonstration)
                advance(total - sum(wanted.values()))
            _check_failures(env, dropped, episodes_per_task)
    return {
        "env": env,
        "tasks": tasks,
        "episodes": len(tasks) * episodes_per_task,
        "frames": frames,
        "dropped": sum(dropped.values()),
        "dropped_by_task": dropped,
        "seconds": round(time.monotonic() - started, 2),
        "seeds": [seed_start, max(next_seed.values()) - 1],
    }


def play(simulator: Simulator, job: EpisodeJob) -> Demonstration | None:
    """One episode of the expert; None when it is not solved in time."""
    noisy = job.seed % 2 == 1 and job.noise > 0
    rng = np.random.default_rng([job.seed, *job.task.encode()])
    observation = simulator.reset(job.seed)
    frames, states, actions = [], [], []
    left = None  # steps still to be kept once solved
    while left != 0:
        if left is None and len(actions) == simulator.max_steps:
            return None
        action = simulator.expert_action()
        frames.append(observation.frame)
        states.append(observation.state)
        actions.append(action)
        executed = np.clip(action + rng.normal(0, job.noise, action.shape), -1, 1) if noisy else action
        observation, solved = simulator.step(executed)
        if left is not None:
            left -= 1
        elif solved:
            left = STEPS_AFTER_SUCCESS
    return Demonstration(np.stack(frames), np.stack(states), np.stack(actions))


def _check(tasks: list[str], episodes_per_task: int, seed_start: int, noise: float, processes: int) -> None:
    if len(set(tasks)) < len(tasks):
        raise UserError(f"tasks is {tasks}; every task may be named once")
    for name, value, least in (
        ("episodes_per_task", episodes_per_task, 1),
        ("seed_start", seed_start, 0),
        ("noise", noise, 0),
        ("processes", processes, 1),
    ):
        if value < least:
            raise UserError(f"{name} is {value}; it must be {least} or more")


def _check_failures(env: str, dropped: dict[str, int], episodes_per_task: int) -> None:
    for task, count in dropped.items():
        if count > episodes_per_task + _FAILURES:
            raise UserError(f"{env} {task}: the expert failed {count} episodes; lower noise or leave the task out")


def _write(writer, job: EpisodeJob, demonstration: Demonstration) -> None:
    writer.add_episode(
        {CAMERA_KEY: demonstration.frames},
        demonstration.state,
        demonstration.action,
        TASKS[job.env][job.task],
        extra={"seed": job.seed, "success": True},
    )


def _play_all(jobs: list[EpisodeJob], processes: int) -> Iterator[Demonstration | None]:
    """The outcome of every job in the order of the jobs."""
    if processes > 1:
        yield from _play_apart(jobs, processes)
        return
    player = _Player()
    try:
        for job in jobs:
            yield player.play(job)
    finally:
        player.close()


class _Player:
    """Plays jobs one after another and keeps the simulator as long as the task stays the same."""

    def __init__(self) -> None:
        self._made: tuple[str, str, int] | None = None
        self._simulator: Simulator | None = None

    def play(self, job: EpisodeJob) -> Demonstration | None:
        if self._made != (job.env, job.task, job.size):
            self.close()
            self._simulator = make(job.env, job.task, job.size)
            self._made = (job.env, job.task, job.size)
        return play(self._simulator, job)

    def close(self) -> None:
        if self._simulator is not None:
            self._simulator.close()
            self._simulator, self._made = None, None


def _play_apart(jobs: list[EpisodeJob], processes: int) -> Iterator[Demonstration | None]:
    """As `_play_all`, in processes of their own; outcomes that come early wait for their turn."""
    context = multiprocessing.get_context("spawn")  # GL contexts and threads do not survive a fork
    workers: dict[Connection, multiprocessing.Process] = {}
    coming = iter(enumerate(jobs))
    early: dict[int, Demonstration | None] = {}
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs,), daemon=True)
            worker.start()
            theirs.close()
            workers[ours] = worker
        for _ in range(_AHEAD):
            for pipe in workers:
                _send_next(pipe, coming)
        for turn in range(len(jobs)):
            while turn not in early:
                for pipe in wait(list(workers)):
                    number, outcome = _receive(pipe, workers[pipe])
                    early[number] = outcome
                    _send_next(pipe, coming)
            yield early.pop(turn)
    finally:
        for pipe, worker in workers.items():
            pipe.close()  # a worker that waits for its next job ends by this
            worker.join(timeout=10)
            if worker.is_alive():
                worker.terminate()


def _send_next(pipe: Connection, coming: Iterator[tuple[int, EpisodeJob]]) -> None:
    if (item := next(coming, None)) is not None:
        pipe.send(item)


def _receive(pipe: Connection, worker: multiprocessing.Process) -> tuple[int, Demonstration | None]:
    try:
        number, outcome, error = pipe.recv()
    except (EOFError, ConnectionError):
        worker.join(timeout=10)
        raise RuntimeError(f"a simulator process died with exit code {worker.exitcode}") from None
    if isinstance(error, UserError):
        raise error
    if error is not None:
        raise RuntimeError(f"a simulator process failed:\n{error}")
    return number, outcome


def _work(pipe: Connection) -> None:
    """A worker: (number, job) in, (number, outcome, error) out, until the pipe closes."""
    player = _Player()
    try:
        while True:
            number, job = pipe.recv()
            try:
                answer = (number, player.play(job), None)
            except UserError as error:
                answer = (number, None, error)
            except Exception:
                answer = (number, None, traceback.format_exc())
            pipe.send(answer)
    except (EOFError, ConnectionError, KeyboardInterrupt):
        pass  # the collecting process has no more use for this one
    finally:
        player.close()
