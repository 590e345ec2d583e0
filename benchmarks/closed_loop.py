"""Success in whole episodes: a served policy beside five references, right against wrong instruction.

For each simulator every policy plays the same unseen seeds by the protocol of docs/closed_loop.md, through
`kairos-train serve`: the model of an export; the model told another task's instruction; the expert; replay of the
nearest demonstration; random actions; standing still. Without an export the model is left out, without demonstrations
the replay. --metaworld-actions names a second export for Meta-World, as one of the same budget spent on the action
stream alone, which is judged beside the first.

    python benchmarks/closed_loop.py --metaworld EXPORT --metaworld-demos DATASET [--metaworld-actions EXPORT] \\
        --push2d EXPORT --push2d-demos DATASET [--only push2d] [--episodes 50] [--out DIR] [--quick]

--quick plays the references of the pushing task alone, on a few seeds. Every simulator gives a table in Markdown; the
last line is one JSON object: machine, `checks`, and by simulator the counts with their 95 % intervals
(`closed_loop.json` in --out has every episode). What is checked: the expert's interval lies above those of chance and
of standing still; in the pushing task, whose picture does not tell which block is meant, the right instruction's above
the wrong one's. Exit code 1 when it does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REFERENCES = ("expert", "replay", "random", "hold")
ACTIONS = "model, actions alone"
QUICK_EPISODES = 10


def judge(env: str, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The content of closed_loop.json of one simulator, a second export's counts among the policies."""
    # Not at the top: a simulator process imports this file again, and has no use for torch.
    from evaluation.closed_loop.run import PolicySource, Protocol, closed_loop

    export, demos = getattr(args, env), getattr(args, f"{env}_demos")
    names = (*(("model", "wrong") if export else ()), *(name for name in REFERENCES if demos or name != "replay"))
    settings = {"episodes": args.episodes, "processes": args.processes, "concurrent": args.concurrent}
    result = closed_loop(
        Protocol(env, policies=names, **settings), PolicySource(export, device=args.device), demos=demos, out=out / env
    )
    if env == "metaworld" and args.metaworld_actions:
        alone = closed_loop(
            Protocol(env, policies=["model"], **settings),
            PolicySource(args.metaworld_actions, device=args.device),
            demos=demos,
            out=out / f"{env}_actions",
        )
        result["policies"] = {"model": result["policies"].pop("model", None), ACTIONS: alone["policies"]["model"]} | (
            result["policies"]
        )
    result["policies"] = {name: found for name, found in result["policies"].items() if found is not None}
    return result


def markdown(result: Mapping[str, Any]) -> str:
    """The table of one simulator."""
    tasks = list(next(iter(result["policies"].values()))["tasks"])
    lines = [
        f"{result['env']}, seeds {result['seed_start']} to {result['seed_start'] + result['episodes_per_task'] - 1}:",
        "",
        f"| | {' | '.join(tasks)} | all | rate, 95 % interval |",
        f"| --- |{' --- |' * (len(tasks) + 2)}",
    ]
    for name, found in result["policies"].items():
        cells = [f"{c['successes']}/{c['episodes']}" for c in (*(found["tasks"][task] for task in tasks), found["all"])]
        low, high = found["all"]["interval95"]
        lines.append(f"| {name} | {' | '.join(cells)} | {found['all']['rate']:.2f} [{low:.2f}, {high:.2f}] |")
    return "\n".join(lines)


def checks(result: Mapping[str, Any]) -> dict[str, bool]:
    """What must hold, by name."""

    def above(high: str, low: str) -> bool:
        one, other = (result["policies"][name]["all"]["interval95"] for name in (high, low))
        return one[0] > other[1]

    env = result["env"]
    found = {f"{env}_expert_above_{name}": above("expert", name) for name in ("random", "hold")}
    if env == "push2d" and "wrong" in result["policies"]:
        found["push2d_right_above_wrong_instruction"] = above("model", "wrong")
    return found


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for env in ("metaworld", "push2d"):
        parser.add_argument(f"--{env}", type=Path, metavar="EXPORT", help="judged as model and wrong")
        parser.add_argument(f"--{env}-demos", type=Path, metavar="DATASET", help="that it was trained on")
    parser.add_argument("--metaworld-actions", type=Path, metavar="EXPORT", help="judged beside --metaworld")
    parser.add_argument("--only", choices=("metaworld", "push2d"), help="this simulator alone")
    parser.add_argument("--episodes", type=int, default=50, help="of each task")
    parser.add_argument("--processes", type=int, default=2, help="of simulators")
    parser.add_argument("--concurrent", type=int, default=8, help="episodes in progress in each of them")
    parser.add_argument("--device", default="auto", help="where the policy is computed")
    parser.add_argument("--out", type=Path, help="folder for closed_loop.json and charts; none: not kept")
    parser.add_argument("--quick", action="store_true", help="references of the pushing task alone, under 50 s")
    args = parser.parse_args()
    if args.metaworld_actions and not args.metaworld:
        parser.error("--metaworld-actions is judged beside --metaworld EXPORT; give both")
    if args.quick:
        args.only, args.episodes, args.push2d, args.push2d_demos = "push2d", QUICK_EPISODES, None, None
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}; {args.episodes} episodes a task", flush=True)
    held: dict[str, bool] = {}
    counts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for env in [args.only] if args.only else ["metaworld", "push2d"]:
            began = time.monotonic()
            result = judge(env, args, args.out or Path(name))
            seconds = time.monotonic() - began
            print(f"\n{markdown(result)}\n\n{seconds:.0f} s", flush=True)
            held |= checks(result)
            policies = {name: {k: found[k] for k in ("all", "tasks")} for name, found in result["policies"].items()}
            counts[env] = {"policies": policies, "seconds": round(seconds, 1), "export": result["export"]}
    for check, holds in held.items():
        print(f"{check}: {'yes' if holds else 'NO'}")
    print(json.dumps({"machine": machine, "episodes_per_task": args.episodes, "checks": held, **counts}))
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
