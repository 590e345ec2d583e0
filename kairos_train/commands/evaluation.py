"""What a trained model is worth: `evaluate`, `compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kairos_train.basics.device import device_of
from kairos_train.commands.output import Result, Table
from kairos_train.commands.parsing import command, count, with_robot


def run_evaluate(args: argparse.Namespace) -> Result:
    from evaluation.run import Settings, evaluate
    from evaluation.video import DriftSettings

    result = evaluate(
        args.export,
        shards=args.input,
        out=args.out,
        settings=Settings(
            parts=args.parts,
            samples=args.samples,
            steps=args.steps,
            guidance=args.guidance,
            seed=args.seed,
            draws=args.draws,
            drift=DriftSettings(videos=args.videos, chunks=args.chunks, history=args.history, carried=args.carried),
            lpips=args.lpips,
            fvd=args.fvd,
            robot=args.robot,
        ),
        device=device_of(args.device),
    )
    found = summary(result, args.out)
    rows = [(part, name, value) for part, numbers in found["parts"].items() for name, value in numbers.items()]
    rows += [(part, f"left out: {why}", None) for part, why in found["left_out"].items()]
    look = {"page": found["page"], "numbers": args.out / "evaluation.json"}
    then = [f"kairos-train closed-loop {args.export} --env ENV --out {args.out}", f"kairos-train serve {args.export}"]
    return Result(found, Table(rows, ("part", "number", "value")), look=look, then=then)


def run_compare(args: argparse.Namespace) -> Result:
    from evaluation.compare import compare

    return Result(compare(args.folders, out=args.out, mixed=args.mixed) | {"page": args.out}, look={"page": args.out})


def summary(result: dict[str, Any], out: Path) -> dict[str, Any]:
    """The headlines of an evaluation: the first rows of its table."""
    from evaluation.compare import numbers

    parts = {part: {n.name: n.value for n in numbers(part, found)} for part, found in result["parts"].items()}
    return {"page": str(out / "report.html"), "parts": parts, "left_out": result["left_out"]}


def part_names(text: str) -> list[str]:
    """An argument of names with commas between them."""
    return [part.strip() for part in text.split(",") if part.strip()]


def add(commands: Any) -> None:
    """Add the subcommands."""
    evaluate = command(commands, "evaluate", run_evaluate, "judge a model on held-out windows, beside baselines")
    evaluate.add_argument("export", type=Path, metavar="EXPORT", help="written by the export command")
    evaluate.add_argument("--input", type=Path, required=True, metavar="SHARDS", help="held-out shards")
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR", help="numbers, plots and report.html")
    evaluate.add_argument(
        "--parts",
        type=part_names,
        default=None,
        metavar="PART,PART",
        help="of open_loop, losses, video, memory; none: all that the model can do",
    )
    evaluate.add_argument("--samples", type=count, default=200, help="windows of open_loop and losses")
    evaluate.add_argument("--steps", type=count, default=None, help="of the sampler; none: as the export says")
    evaluate.add_argument("--guidance", type=float, default=None, help="of the video; none: as the export says")
    evaluate.add_argument("--seed", type=int, default=0, help="of the noise")
    evaluate.add_argument("--draws", type=count, default=1, metavar="N", help="noises per window of the losses")
    evaluate.add_argument("--videos", type=count, default=8, metavar="N", help="rollouts of the video part")
    evaluate.add_argument("--chunks", type=count, default=4, metavar="N", help="windows that a rollout goes on for")
    evaluate.add_argument(
        "--history",
        type=count,
        default=None,
        metavar="K",
        help="latent frames that a chunk goes on from; none: trained",
    )
    evaluate.add_argument(
        "--carried", action="store_true", help="carry states and keys over (models of model.video.history_causal)"
    )
    evaluate.add_argument("--lpips", type=Path, default=None, metavar="FILE", help="TorchScript distance of pictures")
    evaluate.add_argument("--fvd", type=Path, default=None, metavar="FILE", help="TorchScript features of clips")
    with_robot(evaluate, "the one that SHARDS are of")
    evaluate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it is computed")

    compare = command(commands, "compare", run_compare, "put evaluations side by side on one page")
    compare.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="written by the evaluate command")
    compare.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="the page")
    compare.add_argument("--mixed", action="store_true", help="show what was measured on something else, marked, too")
