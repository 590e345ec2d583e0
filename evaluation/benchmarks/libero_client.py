"""LIBERO and LIBERO-Plus through a policy server; runs in the simulator's own environment, with this code on its path.

    python -m evaluation.benchmarks.libero_client --suite libero_spatial --out spatial.jsonl --url ws://HOST:8000

Needs numpy, websockets and msgpack beside the simulator, Python 3.10 or newer, and no torch of ours. The protocol is
that of github.com/Physical-Intelligence/openpi, examples/libero/main.py: 256² pictures turned by 180°, 10 steps of
nothing while objects fall, limits by suite. Other than there, an error ends the run and is not counted as a failure,
initial states are never used twice, and the noise of every request is its own. LIBERO-Plus (README.md of
github.com/sylvestf/LIBERO-plus) takes LIBERO's place in its environment and asks for one trial per task.

Neither benchmark writes a result file; this one writes a line per trial and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.benchmarks.interface import repeated
from evaluation.benchmarks.replanning import Replanner
from kairos_train.basics.errors import UserError

FORMAT = "kairos-libero-1"
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
TRIALS = {"libero": 50, "libero_plus": 1}
WAIT_STEPS = 10
SIZE = 256
NO_OP = [0.0] * 6 + [-1.0]  # no motion, gripper open
GRIPPERS: dict[str, Callable[[float], float]] = {
    "minus1_open": lambda value: value,
    "0_open": lambda value: 2 * value - 1,
    "1_open": lambda value: 1 - 2 * value,
}
"""What the policy's seventh number says -> LIBERO's convention, -1 open and +1 closed."""


def run_suite(
    suite: Any,
    make_env: Callable[[Any], Any],
    stream: Replanner,
    *,
    header: dict[str, Any],
    out: Path,
    tell: Callable[[str], None] = print,
) -> None:
    """Run every trial of a suite that `out` does not hold yet.

    Args:
        suite: LIBERO's: `n_tasks`, `get_task(i)` with `name` and `language`, `get_task_init_states(i)`.
        make_env: task -> simulator; `reset`, `set_init_state`, `step`, `close`.
        stream: of the connected policy.
        header: of `header_of`; `out` is continued only under the same.
        out: one line of JSON per trial behind the header.
        tell: takes one line per trial.

    Raises:
        UserError: more trials than different initial states, or an `out` of other settings.
        PolicyError: from the server; trials so far are kept.
    """
    done = _open_results(out, header)
    for task_id, name in enumerate(header["tasks"]):
        left = [trial for trial in range(header["trials"]) if (name, trial) not in done]
        if not left:
            continue
        states = initial_states(suite, task_id, header["trials"])
        task, env = suite.get_task(task_id), None
        try:
            env = make_env(task)
            for trial in left:
                stream.begin(f"{header['benchmark']}/{header['suite']}/{name}/{trial}")
                success, steps = run_trial(env, states[trial], task.language, stream, header)
                line = {"task": name, "trial": trial, "success": success, "steps": steps}
                with out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                tell(f"{name} {trial}: {'success' if success else 'failure'} after {steps} steps")
        finally:
            if env is not None:
                env.close()


def run_trial(env: Any, state: Any, instruction: str, stream: Replanner, header: dict[str, Any]) -> tuple[bool, int]:
    """(success, steps of the policy) from one initial state."""
    env.reset()
    raw = env.set_init_state(state)
    for _ in range(header["wait_steps"]):
        raw = env.step(NO_OP)[0]
    close = GRIPPERS[header["gripper"]]
    for step in range(1, header["max_steps"] + 1):
        action = stream.act(observation(raw), instruction)
        raw, _, success, _ = env.step([*action[:6].tolist(), close(float(action[6]))])
        if success:
            return True, step
    return False, header["max_steps"]


def observation(raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """LIBERO's observation by openpi's keys: pictures (256, 256, 3) turned by 180°, state (8,)."""
    position, gripper = raw["robot0_eef_pos"], raw["robot0_gripper_qpos"]
    return {
        "observation/image": np.ascontiguousarray(raw["agentview_image"][::-1, ::-1]),
        "observation/wrist_image": np.ascontiguousarray(raw["robot0_eye_in_hand_image"][::-1, ::-1]),
        "observation/state": np.concatenate([position, axis_angle(raw["robot0_eef_quat"]), gripper], dtype=np.float32),
    }


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """(x, y, z, w) -> rotation axis times angle, (3,)."""
    w = min(max(float(quaternion[3]), -1.0), 1.0)
    sine = math.sqrt(1 - w * w)
    return np.zeros(3) if math.isclose(sine, 0) else quaternion[:3] * 2 * math.acos(w) / sine


def initial_states(suite: Any, task_id: int, trials: int) -> Sequence[Any]:
    """The first `trials` of a task; UserError unless there are as many, all different."""
    states = suite.get_task_init_states(task_id)[:trials]
    different = {np.asarray(state).tobytes() for state in states}
    if len(different) < trials:
        raise UserError(
            f"trials={trials}: task {task_id} has {len(different)} different initial states; use at most as many"
        )
    return states


def header_of(suite: Any, stream: Replanner, metadata: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """All that decides what a run's trials are.

    Raises:
        UserError: a policy that does not take LIBERO's observations or give its actions; LIBERO-Plus with more trials.
    """
    trials = TRIALS[args.benchmark] if args.trials is None else args.trials
    if trials < 1 or (args.benchmark == "libero_plus" and trials != 1):
        raise UserError(f"trials={trials}: libero_plus has one per task, libero at least one")
    if "libero" not in metadata["observation_keys"] or metadata["action_dim"] != 7:
        raise UserError(
            f"policy: takes {metadata['observation_keys']} and gives {metadata['action_dim']} numbers; LIBERO has"
            " observation/image, observation/wrist_image, observation/state (8) and 7"
        )
    tasks = [suite.get_task(i).name for i in range(suite.n_tasks)]
    if twice := repeated(tasks):
        raise UserError(f"{args.suite}: has two tasks named {twice[0]}; their trials could not be told apart")
    return {
        "format": FORMAT,
        "benchmark": args.benchmark,
        "suite": args.suite,
        "tasks": tasks,
        "trials": trials,
        "max_steps": MAX_STEPS[args.suite],
        "wait_steps": WAIT_STEPS,
        "replan_steps": stream.replan_steps,
        "gripper": args.gripper,
        "seed": args.seed,
        "policy": {key: metadata[key] for key in ("model", "statistics_sha256", "sampling_steps")},
    }


def _open_results(out: Path, header: dict[str, Any]) -> set[tuple[str, int]]:
    """(task, trial) that a file already holds; makes it where there is none."""
    if not out.exists():
        out.write_text(json.dumps(header) + "\n")
        return set()
    text = out.read_text()
    if not text.endswith("\n"):  # the run was killed while it wrote
        text = text[: text.rfind("\n") + 1]
        out.write_text(text)
    lines = [json.loads(line) for line in text.splitlines()]
    before = lines[0] if lines else {}
    if other := [key for key in header if before.get(key) != header[key]]:
        raise UserError(f"{out}: is of a run with another {other[0]}; give another file")
    return {(line["task"], line["trial"]) for line in lines[1:]}


# --- in the simulator's environment ---


def main(argv: Sequence[str] | None = None) -> int:
    """Run one suite; the exit code."""
    args = parse(argv)
    try:
        _run(args)
    except UserError as error:
        print(f"libero_client: error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="libero_client", description="Run a LIBERO suite through a policy server.")
    parser.add_argument("--benchmark", choices=tuple(TRIALS), default="libero", help="which one is installed here")
    parser.add_argument("--suite", choices=tuple(MAX_STEPS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file; continued if it is there")
    parser.add_argument("--url", default="ws://127.0.0.1:8000", help="of the policy server")
    parser.add_argument("--token-file", type=Path, default=None, help="what the server asks for")
    parser.add_argument("--trials", type=int, default=None, help="per task; none: 50, or 1 for libero_plus")
    parser.add_argument("--replan-steps", type=int, default=None, help="actions executed per chunk; none: all")
    parser.add_argument("--gripper", choices=tuple(GRIPPERS), default="minus1_open", help="the policy's convention")
    parser.add_argument("--seed", type=int, default=7, help="of the simulator, and of all noise")
    return parser.parse_args(argv)


def _run(args: argparse.Namespace) -> None:
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs import OffScreenRenderEnv

    from kairos_train.serving.client import PolicyClient

    def make_env(task: Any) -> Any:
        file = Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
        env = OffScreenRenderEnv(bddl_file_name=str(file), camera_heights=SIZE, camera_widths=SIZE)
        env.seed(args.seed)  # moves objects even under a fixed initial state
        return env

    token = None if args.token_file is None else args.token_file.read_text().strip()
    suite = benchmark.get_benchmark_dict()[args.suite]()
    with PolicyClient(args.url, token=token) as policy:
        stream = Replanner(policy, replan_steps=args.replan_steps, seed=args.seed)
        header = header_of(suite, stream, policy.metadata, args)
        run_suite(suite, make_env, stream, header=header, out=args.out)


if __name__ == "__main__":
    sys.exit(main())
