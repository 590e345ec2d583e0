"""Others' benchmarks: `benchmark write`, `check`, `judge`, `import`, each per benchmark, with its own options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from evaluation.benchmarks.interface import VideoBenchmark
from evaluation.benchmarks.registry import VIDEO_BENCHMARKS
from kairos_train.basics.device import device_of
from kairos_train.basics.errors import UserError
from kairos_train.commands.output import Result, Table
from kairos_train.commands.parsing import command, count, group


def run_write(args: argparse.Namespace) -> Result:
    from evaluation.benchmarks.generate import write

    summary = write(
        args.benchmark,
        export=args.export,
        fps=args.fps,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        chunks=args.chunks,
        device=device_of(args.device),
        out=args.out,
        **_set_of(args),
    )
    return Result(
        summary,
        look={"videos": args.out},
        then=[f"kairos-train benchmark check {args.benchmark.name} {args.out} --prompts {args.prompts}"],
    )


def run_check(args: argparse.Namespace) -> Result:
    from evaluation.benchmarks.completeness import check

    return _verdict(check(args.benchmark, videos=args.videos, **_set_of(args)))


def run_judge(args: argparse.Namespace) -> Result:
    from evaluation.benchmarks.results import judge

    content = judge(args.benchmark, videos=args.videos, entry=args.judge, out=args.out, **_set_of(args))
    return Result({key: value for key, value in content.items() if key != "videos"}, look={"scores": args.out})


def run_import(args: argparse.Namespace) -> Result:
    from evaluation.benchmarks.results import import_results

    files: dict[str, Path] = {}
    for word in args.results:
        kind, found, path = word.partition("=")
        if not found or kind not in args.benchmark.results:
            kinds = ", ".join(f"{kind}=FILE" for kind in args.benchmark.results)
            raise UserError(f"--results {word}: {args.benchmark.name} takes {kinds}")
        if kind in files:
            raise UserError(f"--results {word}: {kind} is given twice; give one file of each kind")
        files[kind] = Path(path)
    return _imported(import_results(args.benchmark, files=files, out=args.out, **_set_of(args)), args.out)


def run_write_robotwin(args: argparse.Namespace) -> Result:
    from evaluation.benchmarks.robotwin import write_policy

    summary = write_policy(
        args.out,
        url=args.url,
        setting=args.setting,
        seed=args.seed,
        replan_steps=args.replan_steps,
        cameras=args.cameras,
    )
    return Result(summary, look={"policy": args.out})


def run_check_robotwin(args: argparse.Namespace) -> Result:
    from evaluation.benchmarks.robotwin import check_robotwin

    return _verdict(check_robotwin(args.results, policy=args.policy, setting=args.setting, configs=args.configs))


def run_import_robotwin(args: argparse.Namespace) -> Result:
    from evaluation.benchmarks.robotwin import import_robotwin

    content = import_robotwin(
        args.results, policy=args.policy, setting=args.setting, configs=args.configs, out=args.out
    )
    return _imported(content, args.out)


def run_check_libero(args: argparse.Namespace) -> Result:
    from evaluation.benchmarks.libero import check_libero

    return _verdict(check_libero(args.results, benchmark=args.benchmark, classification=args.classification))


def run_import_libero(args: argparse.Namespace) -> Result:
    from evaluation.benchmarks.libero import import_libero

    content = import_libero(args.results, benchmark=args.benchmark, classification=args.classification, out=args.out)
    return _imported(content, args.out)


def _verdict(report: dict[str, Any]) -> Result:
    """What was found; exit code 1 unless it is complete."""
    return Result(report, Table(list(report.items())), code=0 if report["complete"] else 1)


def _imported(content: dict[str, Any], out: Path) -> Result:
    return Result(content, look={"results": out})


def _set_of(args: argparse.Namespace) -> dict[str, Any]:
    """What says which videos there must be."""
    return {"prompts": args.prompts, "images": args.images, "samples": args.samples}


# --- the parser ---


def add(commands: Any) -> None:
    """Add the subcommands."""
    actions = group(commands, "benchmark", "files for others' benchmarks, whether they are complete, and their results")
    write = group(actions, "write", "generate a benchmark's videos, or a policy's files for its simulator")
    check = group(actions, "check", "whether a set is complete; exit code 1 if not")
    judge = group(actions, "judge", "have a Python function judge a complete set of videos")
    imported = group(actions, "import", "turn official result files into JSON with n and intervals")
    for benchmark in VIDEO_BENCHMARKS.values():
        _add_write(command(write, benchmark.name, run_write, benchmark.about), benchmark)
        parser = command(check, benchmark.name, run_check, benchmark.about)
        parser.add_argument("videos", type=Path, metavar="VIDEOS", help="the folder that is to be judged")
        _add_set(parser, benchmark)
        parser = command(judge, benchmark.name, run_judge, benchmark.about)
        parser.add_argument("videos", type=Path, metavar="VIDEOS", help="the complete folder")
        parser.add_argument("--judge", required=True, metavar="MODULE:FUNCTION", help="(video, job) -> scores")
        _add_out(parser)
        _add_set(parser, benchmark)
        parser = command(imported, benchmark.name, run_import, benchmark.about)
        kinds = "; ".join(f"{kind}: {what}" for kind, what in benchmark.results.items())
        parser.add_argument("--results", nargs="+", required=True, metavar="KIND=FILE", help=kinds)
        _add_out(parser)
        _add_set(parser, benchmark)
    _add_robotwin(write, check, imported)
    _add_libero(check, imported)


def _add_set(parser: argparse.ArgumentParser, benchmark: VideoBenchmark) -> None:
    parser.set_defaults(benchmark=benchmark, images=None, samples=1)
    parser.add_argument("--prompts", type=Path, required=True, metavar="PATH", help=benchmark.prompts)
    if benchmark.takes_images:
        parser.add_argument("--images", type=Path, default=None, metavar="DIR", help="first frames; none: as official")
    if benchmark.takes_samples:
        parser.add_argument("--samples", type=count, default=1, metavar="N", help="videos of each prompt")


def _add_write(parser: argparse.ArgumentParser, benchmark: VideoBenchmark) -> None:
    parser.add_argument("export", type=Path, metavar="EXPORT", help="written by the export command")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the videos; continued if it is there")
    parser.add_argument("--fps", type=float, required=True, help="of the frames that the model was trained on")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; every video has its own")
    parser.add_argument("--steps", type=count, default=None, help="of the sampler; none: as the export says")
    parser.add_argument("--guidance", type=float, default=None, help="of the video; none: as the export says")
    parser.add_argument("--chunks", type=count, default=1, metavar="N", help="windows, each going on from the last")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it is computed")
    _add_set(parser, benchmark)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write")


def _add_robotwin(write: Any, check: Any, imported: Any) -> None:
    from evaluation.benchmarks.robotwin import CONFIGS

    about = "RoboTwin 2.0: 50 tasks, clean and randomized, 100 episodes each"
    parser = command(write, "robotwin", run_write_robotwin, about)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="RoboTwin's policy/NAME")
    parser.add_argument("--url", default="ws://127.0.0.1:8000", help="of the policy server")
    parser.add_argument(
        "--setting", required=True, metavar="NAME", help="of the result folders; one per set of weights"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the official script, and of all noise")
    parser.add_argument("--replan-steps", type=count, default=None, help="actions executed per chunk; none: all")
    parser.add_argument("--cameras", default="", metavar="KEY=CAMERA,…", help="where names do not tell")
    readers = [command(check, "robotwin", run_check_robotwin, about)]
    readers.append(command(imported, "robotwin", run_import_robotwin, about))
    for parser in readers:
        parser.add_argument("results", type=Path, metavar="DIR", help="RoboTwin's eval_result")
        parser.add_argument("--policy", required=True, metavar="NAME", help="the policy's folder")
        parser.add_argument("--setting", required=True, metavar="NAME", help="as it was written")
        parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="of the set")
    _add_out(readers[1])


def _add_libero(check: Any, imported: Any) -> None:
    for name, about in (
        ("libero", "LIBERO: four suites of ten tasks, 50 trials each"),
        ("libero_plus", "LIBERO-Plus: 10,030 tasks in seven perturbations, one trial each"),
    ):
        readers = [command(check, name, run_check_libero, about), command(imported, name, run_import_libero, about)]
        for parser in readers:
            parser.set_defaults(benchmark=name, classification=None)
            parser.add_argument("results", type=Path, nargs="+", metavar="FILE", help="of the client, .jsonl")
            if name == "libero_plus":
                what = "LIBERO-Plus's task_classification.json"
                parser.add_argument("--classification", type=Path, required=True, metavar="FILE", help=what)
        _add_out(readers[1])
