"""Success in a simulator, through the policy server: `closed-loop`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kairos_train.commands.output import Result
from kairos_train.commands.parsing import command, count

POLICIES = "model,random,hold,replay,expert,wrong"


def run_closed_loop(args: argparse.Namespace) -> Result:
    import msgpack  # noqa: F401, before anything is played
    import websockets  # noqa: F401

    from evaluation.closed_loop.report import format_table
    from evaluation.closed_loop.run import PolicySource, Protocol, closed_loop
    from evaluation.report import write_page

    token = None
    if args.token_file is not None:
        from kairos_train.serving.run import read_token

        token = read_token(args.token_file)
    protocol = Protocol(
        env=args.env,
        tasks=_words(args.tasks),
        episodes=args.episodes,
        seed_start=args.seed_start,
        policies=_words(args.policies),
        replan_every=args.replan_every,
        size=args.size,
        processes=args.processes,
        concurrent=args.concurrent,
    )
    source = PolicySource(export=args.export, url=args.server, token=token, steps=args.steps, device=args.device)
    result = closed_loop(protocol, source, demos=args.demos, out=args.out)
    write_page(args.out)
    counts = {name: {"tasks": found["tasks"], "all": found["all"]} for name, found in result["policies"].items()}
    found = {**result, "policies": counts, "out": args.out}
    return Result(found, format_table(result), look={"page": args.out / "report.html"})


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def add(commands: Any) -> None:
    """Add the subcommand."""
    loop = command(commands, "closed-loop", run_closed_loop, "play whole episodes in a simulator, beside references")
    loop.add_argument(
        "export", type=Path, nargs="?", default=None, metavar="EXPORT", help="written by the export command"
    )
    loop.add_argument("--env", choices=("metaworld", "push2d"), required=True, help="the simulator")
    loop.add_argument("--tasks", default="", metavar="A,B", help="none: the simulator's default ones")
    loop.add_argument("--episodes", type=count, default=50, help="of each task")
    loop.add_argument("--seed-start", type=int, default=10_000, help="of every task's first episode")
    loop.add_argument("--policies", default=POLICIES, metavar="A,B", help="who plays; all on the same seeds")
    loop.add_argument("--demos", type=Path, default=None, metavar="DATASET", help="demonstrations of `data simulate`")
    loop.add_argument("--server", default=None, metavar="URL", help="ws://…; none: one is started for EXPORT")
    loop.add_argument("--token-file", type=Path, default=None, metavar="FILE", help="what that server asks for")
    loop.add_argument("--out", type=Path, required=True, metavar="DIR", help="JSON, a chart and report.html")
    loop.add_argument("--replan-every", type=count, default=4, metavar="N", help="actions executed of each plan")
    loop.add_argument("--size", type=count, default=None, help="of the pictures; none: as demonstrated, or trained")
    loop.add_argument("--processes", type=count, default=2, help="of simulators")
    loop.add_argument("--concurrent", type=count, default=8, help="episodes in progress in each of them")
    loop.add_argument("--steps", type=count, default=None, help="of the sampler; none: as the export says")
    loop.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the policy is computed")
